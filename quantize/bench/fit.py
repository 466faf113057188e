"""How fast and how closely a method fits a random weight: what `pq bench fit` measures."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import UsageError
from quantize.formats.bitvec import MAX_LINES, BitVec, BitVecScheme
from quantize.formats.packed_int import PackedInt
from quantize.methods.sbvr.fit import CodebookKind, fit
from quantize.solvers.grid import Grid

METHODS = ("sbvr", "rtn", "rtn-mse")
CODEBOOKS: tuple[CodebookKind, ...] = ("auto", "lines", "shapes")
DISTRIBUTIONS = ("gaussian", "laplace", "student")
_STUDENT_FREEDOM = 5  # heavy tails, and still a finite kurtosis
_AT_ONCE = 1 << 20  # weights compared at once


@dataclass(frozen=True)
class FitSettings:
    """What is fitted, and how. `bias`, `lines` and `codebook` are sbvr's."""

    method: str
    """`sbvr`, or round to nearest: the largest weight ends the grid (`rtn`), or the
    scale errs least (`rtn-mse`)."""
    bits: int
    shape: tuple[int, int]
    """[N, K] of the weight."""
    group_size: int = 128
    bias: bool = False
    lines: int = 256
    codebook: CodebookKind = "auto"
    distribution: str = "gaussian"
    """Of the independent weights: `gaussian`, `laplace` or `student` (5 degrees of freedom)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("method", self.method, METHODS),
            ("codebook", self.codebook, CODEBOOKS),
            ("distribution", self.distribution, DISTRIBUTIONS),
        ):
            if chosen not in known:
                raise UsageError(f"--{name} {chosen}: choose one of {', '.join(known)}")
        if min(self.shape) < 1:
            raise UsageError(
                f"--shape {self.shape[0]}x{self.shape[1]}: both numbers must be at least 1"
            )
        if self.method == "sbvr":
            self._check_sbvr()
        else:
            self._check_rtn()

    def _check_sbvr(self) -> None:
        if not 1 <= self.lines <= MAX_LINES:
            raise UsageError(f"--lines {self.lines}: choose 1 … {MAX_LINES}")
        try:
            BitVecScheme(self.bits, self.group_size, self.bias, 1, 1)
        except ValueError as err:
            raise UsageError(f"--method sbvr: {err}") from None

    def _check_rtn(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"--bits {self.bits}: choose 2 … 8")
        if self.bias:
            raise UsageError(f"--bias: {self.method} has none, only sbvr")
        if self.group_size < 1 or self.shape[1] % self.group_size:
            raise UsageError(
                f"--group-size {self.group_size}: must divide the {self.shape[1]} inputs of --shape"
            )


@dataclass(frozen=True)
class FitBench:
    """What was measured, with what."""

    settings: FitSettings
    relative_mse: float
    """Σ (w − ŵ)² / Σ w² of the weight packed and unpacked."""
    bits_per_weight: float
    """Stored, everything counted."""
    seconds: float
    """Median over the repeats: training, assignment and codes; packing not counted."""
    weights_per_second: float
    peak_rss_bytes: int
    """Largest resident size of the process up to the end of the last fit, the
    weight and libraries included."""
    peak_device_bytes: int | None
    """Largest memory in tensors on the CUDA device, the weight included; None elsewhere."""
    shapes: int | None
    """Shapes (or free lines) of the chosen codebook; None for rtn."""
    scales: int | None
    device: str
    threads: int
    repeat: int
    torch: str


def bench_fit(settings: FitSettings, device: torch.device, repeat: int = 3) -> FitBench:
    """Fit the same random weight `repeat` times, then pack it, unpack it and compare."""
    w = random_weight(settings.shape, settings.distribution, settings.seed).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        packed = _fit(settings, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak, median = _peak_rss(), statistics.median(seconds)
    return FitBench(
        settings=settings,
        peak_device_bytes=torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else None,
        relative_mse=relative_mse(w, _round_trip(packed)),
        bits_per_weight=packed.bits_per_weight,
        seconds=median,
        weights_per_second=w.numel() / median,
        peak_rss_bytes=peak,
        shapes=len(packed.lines) if isinstance(packed, BitVec) else None,
        scales=len(packed.scales) if isinstance(packed, BitVec) else None,
        device=str(device),
        threads=torch.get_num_threads(),
        repeat=repeat,
        torch=torch.__version__,
    )


def random_weight(shape: tuple[int, int], distribution: str, seed: int) -> Tensor:
    """Independent weights [N, K] of variance 1 in float32 on the CPU, the same for a
    seed wherever they are used."""
    generator = torch.Generator().manual_seed(seed)
    if distribution == "laplace":
        halves = (torch.empty(shape).exponential_(generator=generator) for _ in range(2))
        return next(halves).sub_(next(halves)).div_(2**0.5)
    w = torch.randn(shape, generator=generator)
    if distribution == "student":
        squares = torch.zeros(shape)
        for _ in range(_STUDENT_FREEDOM):
            squares += torch.randn(shape, generator=generator).square_()
        w *= squares.div_(_STUDENT_FREEDOM - 2).rsqrt_()
    return w


def relative_mse(w: Tensor, quantized: Tensor) -> float:
    """Σ (w − ŵ)² / Σ w² of weights [N, K], summed up in float64."""
    step = max(1, _AT_ONCE // w.shape[1])
    error = size = 0.0
    for first in range(0, len(w), step):
        rows = w[first : first + step].double()
        error += float((quantized[first : first + step] - rows).square_().sum())
        size += float(rows.square_().sum())
    return error / size


def _fit(settings: FitSettings, w: Tensor) -> BitVec | PackedInt:
    if settings.method == "sbvr":
        return fit(
            w,
            settings.bits,
            settings.group_size,
            bias=settings.bias,
            lines=settings.lines,
            kind=settings.codebook,
            seed=settings.seed,
        )
    grid = Grid(settings.bits, settings.group_size)
    find: Callable[[Tensor], tuple[Tensor, Tensor]] = (
        grid.absmax_scale if settings.method == "rtn" else grid.fit_scale
    )
    scale, factor = find(w)
    return grid.pack(grid.round(w, scale, factor)[0], scale)


def _round_trip(packed: BitVec | PackedInt) -> Tensor:
    if isinstance(packed, BitVec):
        return BitVec.from_tensors(packed.tensors(), packed.scheme()).unpack()
    return PackedInt.from_tensors(packed.tensors(), packed.bits, packed.group_size).unpack()


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
