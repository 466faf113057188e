"""Time of dense FFNs against Mixtures of Experts that stand in for them."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantize.cost.stopwatch import Compared, device_name, take_turns, versions, watch
from quantize.errors import ModelError, QualityError
from quantize.model.arch import CONTAINER, Experts, ExpertSizes
from quantize.model.dequantized import open_source
from quantize.model.load import shape_of
from quantize.model.moe import Expert, MoeFfn, Threshold, TopK
from quantize.model.skeleton import Skeleton
from quantize.model.stored import open_stored

_Module = TypeVar("_Module", bound=nn.Module)

_LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # of the largest output
_CACHES = 1 << 27  # bytes; layers beside each other fill more, so that none is read from a cache
# random tokens that set a threshold: more would set it nearer to the mean asked for
_PROFILED = 4096


@dataclass(frozen=True)
class Form:
    """Sizes of a Mixture of Experts."""

    shared: int
    """Hidden neurons of the shared expert."""
    n: int
    """Routed experts."""
    size: int
    """Hidden neurons of each of them."""
    k: float
    """Routed experts that a token visits in the mean; a whole number is top-k, else
    scores above a threshold."""

    def __str__(self) -> str:
        return f"{self.shared}+{self.n}x{self.size}@{self.k:g}"


@dataclass(frozen=True)
class FfnTiming(Compared):
    """One form at one batch: seconds of an FFN, medians over rounds.
    `plain_seconds` are the dense FFN's."""

    form: Form
    M: int
    """Rows of activations."""
    seconds: float
    fastest: float
    slowest: float
    plain_seconds: float
    plain_fastest: float
    plain_slowest: float
    loop_seconds: float
    """The same mixture with its experts called one after the other."""
    experts_per_token: float
    """Routed experts that a token visited, in the mean of all rows and layers."""
    bytes_read: float
    """Weights of what the rows visited, activations and outputs, in the mean of the layers."""
    plain_bytes_read: float
    activated: float
    """Parameters that a token meets, routers included, as a part of the dense FFN's."""
    layers: int
    """Mixtures of weights of their own that took turns."""


@dataclass(frozen=True)
class FfnBench:
    """All that was timed, and where."""

    hidden: int
    intermediate: int
    """Hidden neurons of the dense FFN."""
    dtype: str
    device: str
    timings: list[FfnTiming]
    versions: dict[str, str]
    threads: int

    def as_json(self) -> dict[str, Any]:
        """All figures, the ratio among them."""
        facts: dict[str, Any] = dataclasses.asdict(self)
        facts["timings"] = [
            dataclasses.asdict(timing) | {"speedup": timing.speedup} for timing in self.timings
        ]
        return facts


def bench_forms(
    hidden: int,
    intermediate: int,
    forms: Sequence[Form],
    batches: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 20,
) -> FfnBench:
    """Time forms with random weights at every batch; QualityError as `time_mixture`,
    ValueError for absurd forms."""
    makers = {form: partial(random_mixture, hidden, form, device, dtype) for form in forms}
    return _bench(hidden, intermediate, makers, batches, device, dtype, rounds)


def bench_model(
    folder: Path, batches: Sequence[int], device: torch.device, dtype: torch.dtype, rounds: int = 20
) -> FfnBench:
    """Time the first Mixture of Experts of an unpacked checkpoint against a random
    dense FFN of as many neurons.

    Copies of the mixture take turns; activations are random. QualityError as `time_mixture`,
    ModelError for a model without experts.
    """
    source = open_source(folder)
    kind = source.config.get("model_type")
    if kind != CONTAINER and (source.config.get("quantization_config") or {}).get("experts"):
        raise ModelError(
            f"{folder}: experts of a {kind} model route by policies of their own, which this does "
            "not time; give their sizes by --form instead"
        )
    if kind != CONTAINER:
        raise ModelError(f"{folder}: a {kind} model has no experts of LaDiMo's; convert it first")
    sizes, shape = ExpertSizes.of(source.config), shape_of(source)
    index = min(set(range(shape.n_blocks)) - sizes.dense_blocks, default=None)
    if index is None:
        raise ModelError(f"{folder}: config.json says that every block is dense")
    stored, model = open_stored(source, dtype)
    skeleton = Skeleton(folder, device, dtype, model=model)
    block = skeleton.layer(index, stored.tensors(f"{skeleton.parts.blocks}.{index}."))
    mixture = block.get_submodule(Experts().ffn)
    form = Form(sizes.shared, sizes.n, sizes.size, sizes.top_k)
    intermediate = form.shared + form.n * form.size
    makers = {form: lambda: _stack(copy.deepcopy(mixture))}
    return _bench(shape.hidden, intermediate, makers, batches, device, dtype, rounds)


def _bench(
    hidden: int,
    intermediate: int,
    makers: Mapping[Form, Callable[[], MoeFfn]],
    batches: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> FfnBench:
    timings: list[FfnTiming] = []
    dense = _fill(lambda: _random_dense(hidden, intermediate, device, dtype))
    for form, maker in makers.items():
        mixtures = _fill(maker)
        timings += [time_mixture(form, mixtures, dense, M, rounds) for M in batches]
    name = str(dtype).removeprefix("torch.")
    where = device_name(device), timings, versions(), torch.get_num_threads()
    return FfnBench(hidden, intermediate, name, *where)


def time_mixture(
    form: Form, mixtures: Sequence[MoeFfn], dense: Sequence[Expert], M: int, rounds: int = 20
) -> FfnTiming:
    """Time mixtures, their loops over experts and dense FFNs in turns, for the same
    M rows of random activations.

    QualityError when a mixture is not what float64 computes: then nothing is timed. On CUDA all but
    the loops are replayed as graphs.
    """
    weight = dense[0].up_proj.weight
    x = torch.randn(M, weight.shape[1], device=weight.device, dtype=weight.dtype)
    loops = [copy.copy(mixture) for mixture in mixtures]  # share the weights, but are not stacked
    require_right(mixtures[0], x)
    require_right(loops[0], x)
    ours = watch([partial(mixture, x) for mixture in mixtures], x.device)
    plain = watch([partial(ffn, x) for ffn in dense], x.device)
    by_loop = watch([partial(loop, x) for loop in loops], x.device, as_graph=False)
    seconds, plain_seconds, loop_seconds = take_turns([ours, plain, by_loop], rounds)
    seconds = [s / len(mixtures) for s in seconds]
    plain_seconds = [s / len(dense) for s in plain_seconds]
    visits = [_visits(mixture, x) for mixture in mixtures]
    k = statistics.fmean(float(v.sum()) / M for v in visits)
    moved = 2 * x.nbytes
    return FfnTiming(
        form=form,
        M=M,
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        plain_seconds=statistics.median(plain_seconds),
        plain_fastest=min(plain_seconds),
        plain_slowest=max(plain_seconds),
        loop_seconds=statistics.median(loop_seconds) / len(loops),
        experts_per_token=k,
        bytes_read=moved
        + weight.itemsize
        * _visited_parameters(mixtures[0], statistics.fmean(int(v.any(0).sum()) for v in visits)),
        plain_bytes_read=moved + weight.itemsize * _parameters(dense[0]),
        activated=_visited_parameters(mixtures[0], k) / _parameters(dense[0]),
        layers=len(mixtures),
    )


def require_right(mixture: MoeFfn, x: Tensor) -> None:
    """QualityError unless the mixture of x [M, D] is what float64 computes with
    the same routing weights."""
    with torch.no_grad():
        expected, y = _exact(mixture, x), mixture(x).double()
    difference = float((y - expected).abs().max() / expected.abs().max())
    if not difference <= _LIMITS[x.dtype]:
        way = "stacked" if mixture.is_stacked else "looped"
        raise QualityError(
            f"{way} experts, {len(x)} rows: off by {difference:.1e} of the largest output (limit "
            f"{_LIMITS[x.dtype]:.0e}), so they are not timed; run "
            "tests/kernels/test_experts_kernels.py"
        )


def _exact(mixture: MoeFfn, x: Tensor) -> Tensor:
    def of(module: nn.Module) -> Tensor:
        y: Tensor = copy.deepcopy(module).double()(x.double())
        return y

    y = torch.sigmoid(of(mixture.shared_expert_gate)) * of(mixture.shared_expert)
    weights = mixture.weights(x).double()
    for e, expert in enumerate(mixture.experts):
        y += weights[:, e, None] * of(expert)
    return y


def random_mixture(hidden: int, form: Form, device: torch.device, dtype: torch.dtype) -> MoeFfn:
    """A stacked mixture with weights as torch starts linears, that routes normal
    activations as the form says."""
    if not 0 < form.k <= form.n:
        raise ValueError(f"form {form}: {form.k:g} of {form.n} experts a token")
    k = math.ceil(form.k)
    sizes = ExpertSizes(
        form.n, form.size, form.shared, k, renormalize=False, dense_blocks=frozenset()
    )
    with torch.device(device), torch.no_grad():
        mixture = MoeFfn(hidden, sizes, nn.SiLU(), TopK(k)).to(dtype)
        if form.k != k:
            scores = mixture.gate(torch.randn(_PROFILED, hidden, dtype=dtype)).float()
            mixture.policy = Threshold(float(scores.quantile(1 - form.k / form.n)))
    return _stack(mixture)


def _stack(mixture: nn.Module) -> MoeFfn:
    assert isinstance(mixture, MoeFfn)
    mixture.requires_grad_(False)
    assert mixture.stack(), "its experts are plain linears of one dtype"
    return mixture


def _random_dense(
    hidden: int, intermediate: int, device: torch.device, dtype: torch.dtype
) -> Expert:
    with torch.device(device):
        return Expert(hidden, intermediate, nn.SiLU()).to(dtype).requires_grad_(False)


def _fill(make: Callable[[], _Module]) -> list[_Module]:
    # Two at least: routes differ.
    out = [make(), make()]
    return out + [
        make()
        for _ in range(_CACHES // (_parameters(out[0]) * next(out[0].parameters()).itemsize) - 1)
    ]


def _visits(mixture: MoeFfn, x: Tensor) -> Tensor:
    with torch.no_grad():
        return mixture.weights(x) != 0


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _visited_parameters(mixture: MoeFfn, experts: float) -> float:
    # Parameters of the mixture with so many of its routed experts.
    routed = _parameters(mixture.experts)
    return _parameters(mixture) - routed + experts * routed / len(mixture.experts)
