"""Time of products with `bitvec` weights against torch's own linear, shape by shape and
for all linears of a model."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.cost.stopwatch import Compared, device_name, take_turns, versions, watch
from quantize.errors import QualityError
from quantize.formats.bitvec import BitVecScheme
from quantize.kernels.bitvec.reference import multiply_reference
from quantize.serving.bitvec_linear import BitVecLinear

Shape = tuple[int, int]
LLAMA_3_8B: tuple[Shape, ...] = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""Shapes [N, K] of Llama-3-8B's linears."""
_PAIRS: tuple[Shape, ...] = ((4096, 4096), (1024, 4096), (14336, 4096))
LLAMA_3_8B_BLOCK: tuple[Shape, ...] = (*_PAIRS, *_PAIRS, (4096, 14336))
"""Linears of one of its 32 blocks: q and o, k and v, gate and up, down."""

# of the largest output; bfloat16 tiles round the weights, too
_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
_COPIED = {"cuda": 1 << 30}  # bytes moved to measure the memory: far more than the caches hold
_COPIED_ELSEWHERE = 1 << 26  # more than caches of desktop CPUs hold, and quick to copy
# bytes; weights beside each other fill more, so that none is read from a cache (an H100's: 50 MiB)
_CACHES = 1 << 27


@dataclass(frozen=True)
class Timing(Compared):
    """One shape at one batch: seconds of a call, medians over rounds."""

    N: int
    K: int
    M: int
    """Rows of activations."""
    bits: int
    seconds: float
    fastest: float
    slowest: float
    plain_seconds: float
    """F.linear with a weight in the activations' dtype: bfloat16 on CUDA, else float32."""
    bandwidth: float
    """Bytes of weight, activations and outputs in a second, as a part of
    what a copy of memory moves."""


@dataclass(frozen=True)
class TokenTiming(Compared):
    """All linears of a model, one after the other, for M rows of activations: median seconds."""

    M: int
    bits: int
    linears: int
    seconds: float
    plain_seconds: float


@dataclass(frozen=True)
class MultiplyBench:
    """All that was timed, and where."""

    scheme: BitVecScheme
    device: str
    baseline: str
    """What `plain_seconds` are of."""
    shapes: list[Timing]
    tokens: list[TokenTiming]
    versions: dict[str, str]
    threads: int

    def as_json(self) -> dict[str, Any]:
        """All figures, the ratios among them."""
        facts: dict[str, Any] = dataclasses.asdict(self)
        facts["shapes"] = [
            dataclasses.asdict(timing) | {"speedup": timing.speedup} for timing in self.shapes
        ]
        facts["tokens"] = [
            dataclasses.asdict(timing) | {"speedup": timing.speedup} for timing in self.tokens
        ]
        return facts


def bench(
    shapes: Sequence[Shape],
    batches: Sequence[int],
    scheme: BitVecScheme,
    device: torch.device,
    rounds: int = 20,
    blocks: int = 0,
) -> MultiplyBench:
    """`bench_multiply`, and `bench_token` over so many blocks of
    Llama-3-8B where `blocks` is not 0."""
    tokens = [
        bench_token(LLAMA_3_8B_BLOCK, blocks, M, scheme, device, rounds) for M in batches if blocks
    ]
    return MultiplyBench(
        scheme=scheme,
        device=device_name(device),
        baseline="torch bfloat16 (cuBLAS)" if device.type == "cuda" else "torch float32",
        shapes=bench_multiply(shapes, batches, scheme, device, rounds),
        tokens=tokens,
        versions=versions(),
        threads=torch.get_num_threads(),
    )


def bench_multiply(
    shapes: Sequence[Shape],
    batches: Sequence[int],
    scheme: BitVecScheme,
    device: torch.device,
    rounds: int = 20,
    cache_bytes: int = _CACHES,
) -> list[Timing]:
    """Time every shape [N, K] at every batch M with random weights.

    QualityError when a product is not what the reference computes: then nothing is timed. On CUDA
    the calls of a round are replayed as one graph between two events. Copies of the weight that are
    together larger than `cache_bytes` take turns, so that none is found in a cache.
    """
    copied, out = copy_rate(device, rounds), []
    for N, K in shapes:
        layers = _layers([(N, K)], scheme, device, cache_bytes)
        plain = _weights([(N, K)], device, cache_bytes)
        for M in batches:
            x = _activations(M, K, device)
            require_correct(layers[0], x)
            ours = _round_seconds([_call(layer, x) for layer in layers], device, rounds)
            torchs = _round_seconds([_call_plain(weight, x) for weight in plain], device, rounds)
            ours = [seconds / len(layers) for seconds in ours]
            seconds = statistics.median(ours)
            moved = scheme.stored_bits(N, K) * N * K / 8 + M * (N + K) * x.element_size()
            figures = (
                seconds,
                min(ours),
                max(ours),
                statistics.median(torchs) / len(plain),
                moved / seconds / copied,
            )
            out.append(Timing(N, K, M, scheme.bits, *figures))
    return out


def bench_token(
    block: Sequence[Shape],
    blocks: int,
    M: int,
    scheme: BitVecScheme,
    device: torch.device,
    rounds: int = 20,
) -> TokenTiming:
    """Time all linears of a model, `blocks` times those of one `block`, for M rows;
    QualityError as `bench_multiply`.

    Weights of all blocks are made, in `bitvec` and then in full: Llama-3-8B's take
    3.6 GB at 4 bits, and 14 GB.
    """
    shapes = list(block) * blocks
    x = {K: _activations(M, K, device) for K in {K for _, K in shapes}}
    layers = _layers(shapes, scheme, device)
    for layer in layers[: len(block)]:
        require_correct(layer, x[layer.in_features])
    ours = _round_seconds([_call(layer, x[layer.in_features]) for layer in layers], device, rounds)
    del layers
    plain = _round_seconds(
        [_call_plain(w, x[w.shape[1]]) for w in _weights(shapes, device)], device, rounds
    )
    return TokenTiming(
        M, scheme.bits, len(shapes), statistics.median(ours), statistics.median(plain)
    )


def copy_rate(device: torch.device, rounds: int = 20) -> float:
    """Bytes that a copy within the device's memory reads and writes in a second."""
    size = _COPIED.get(device.type, _COPIED_ELSEWHERE)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return (
        2 * size / statistics.median(_round_seconds([lambda: target.copy_(source)], device, rounds))
    )


def require_correct(layer: BitVecLinear, x: Tensor) -> None:
    """QualityError unless the layer's product with x [M, K] is the reference's."""
    tensors = (layer.weight_planes, layer.weight_index, layer.weight_lines, layer.weight_scales)
    bits, group_size = layer.scheme.bits, layer.scheme.group_size
    expected = multiply_reference(x.float(), *tensors, layer.bias, bits=bits, group_size=group_size)
    with torch.no_grad():
        difference = (layer(x).float() - expected).abs().max() / expected.abs().max()
    if not float(difference) <= _LIMITS[x.dtype]:
        shape = f"{layer.out_features} × {layer.in_features}"
        raise QualityError(
            f"bitvec product {shape}, {len(x)} rows: off by {float(difference):.1e} of the "
            f"largest output (limit {_LIMITS[x.dtype]:.0e}), so it is not timed; run "
            "tests/kernels/test_bitvec_kernels.py"
        )


def _round_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
) -> list[float]:
    return take_turns([watch(calls, device)], rounds)[0]


def _layers(
    shapes: Sequence[Shape], scheme: BitVecScheme, device: torch.device, least: int = 0
) -> list[BitVecLinear]:
    # Random layers: all shapes in turn, until they hold `least` bytes.
    out: list[BitVecLinear] = []
    held = 0
    while len(out) < len(shapes) or held < least:
        N, K = shapes[len(out) % len(shapes)]
        out.append(_random_layer(N, K, scheme, device))
        held += sum(parameter.nbytes for parameter in out[-1].parameters())
    return out


def _random_layer(N: int, K: int, scheme: BitVecScheme, device: torch.device) -> BitVecLinear:
    with torch.device(device):
        layer = BitVecLinear(K, N, False, scheme)
        index = torch.randint(0, scheme.lines * scheme.scales, layer.weight_index.shape)
        tensors = {
            "weight_planes": torch.randint(
                -(1 << 31), 1 << 31, layer.weight_planes.shape, dtype=torch.int32
            ),
            "weight_index": index.to(layer.weight_index.dtype),
            "weight_lines": torch.randn(layer.weight_lines.shape).half() * 0.02,
            "weight_scales": torch.rand(layer.weight_scales.shape) + 0.5,
            "weight_shape": torch.tensor([N, K]),
        }
    layer.load_state_dict(tensors)
    return layer


def _weights(shapes: Sequence[Shape], device: torch.device, least: int = 0) -> list[Tensor]:
    out: list[Tensor] = []
    held = 0
    while len(out) < len(shapes) or held < least:
        out.append(_activations(*shapes[len(out) % len(shapes)], device))
        held += out[-1].nbytes
    return out


def _activations(M: int, K: int, device: torch.device) -> Tensor:
    return torch.randn(
        M, K, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )


def _call(layer: BitVecLinear, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _call_plain(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, weight)
