"""Memory, disk and time of a conversion before anything is loaded, and how to keep it below a limit.

Memory is counted from the sizes of tensors that are alive at once; what the process takes without any is measured. Time
is counted in operations, and their rates are measured on this machine in about a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from quantize.calibration.tokens import TokenSet
from quantize.convert.draft import draft
from quantize.convert.plan import Plan
from quantize.convert.request import Request
from quantize.cost.footprint import BlockSizes, Effort, total
from quantize.cost.peak import resident
from quantize.cost.stopwatch import watch
from quantize.cost.units import gigabytes
from quantize.errors import RoomError
from quantize.files.offload import Place
from quantize.methods.encode import Encode

_SLACK = 64 << 20
"""Bytes that threads, allocators and libraries take once they work."""
_LEAST_BATCH = 512
"""Tokens of a pass below which smaller ones would cost more time than they save room."""
_HASHED = 1.2e9
"""Bytes a second that are read, compared with their hash and checked for NaN."""


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take, in bytes and seconds."""

    ram: int
    """At most, of the process."""
    vram: int
    """At most, of the accelerator; 0 on a CPU."""
    disk: int
    """At most, beside the output and in the work folder, the output included."""
    output: int
    """Weights of the output."""
    seconds: float
    seconds_per_block: float
    parts: dict[str, int]
    """What the peak of the device that computes consists of."""
    batch_tokens: int
    states_on: str
    split: bool

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    products: float
    """Operations of matrix products in float32."""
    touched: float
    """Bytes read and written by element-wise steps."""


def estimate(request: Request, rates: Rates | None = None) -> Estimate:
    """What `convert` will take. rates: measured where None. Raises what `convert` raises before it loads weights."""
    plan, _, tokens = draft(request)
    return _estimate(plan, request, tokens, rates or measure_rates(request.device))


def within(request: Request) -> Request:
    """The request, changed as far as it must be to stay below its limits; what costs most time is done last.

    All ranks get what suits the first. RoomError with the least that would do where nothing suffices.
    """
    if request.max_ram is None and request.max_vram is None:
        return request
    with request.ranks.explained():
        plan, _, tokens = draft(request)
        choices = _frugal(request)
        found = [_estimate(plan, choice, tokens, Rates(1, 1)) for choice in choices]
        limits = (request.max_ram or math.inf, request.max_vram or math.inf)
        fitting = (i for i, one in enumerate(found) if one.ram <= limits[0] and one.vram <= limits[1])
        chosen = request.ranks.tell(next(fitting, None))
    if chosen is None:
        least = min(found, key=lambda one: (one.vram, one.ram))
        needed = [f"--max-ram {gigabytes(least.ram)}"] if request.max_ram is not None else []
        needed += [f"--max-vram {gigabytes(least.vram)}"] if request.max_vram is not None else []
        raise RoomError(
            f"recipe {request.recipe.name} on {request.model} needs {' and '.join(needed)} at least; "
            f"most of it is {max(least.parts, key=lambda part: least.parts[part])}"
        )
    return choices[int(chosen)]


def _frugal(request: Request) -> list[Request]:
    """The request and ever more frugal ones."""
    cpu = request.device.type == "cpu"
    states: tuple[Place, ...] = ("device", "disk") if cpu else ("device", "host", "disk")
    out = [replace(request, states_on=place) for place in states]
    out.append(replace(out[-1], split=True))
    batch = request.batch_tokens // 2
    while batch >= _LEAST_BATCH:
        out.append(replace(out[-1], batch_tokens=batch))
        batch //= 2
    return out


def _blocks(plan: Plan, request: Request, tokens: TokenSet | None) -> list[BlockSizes]:
    """Sizes of every kind of block that the source has."""
    B, T = (0, 1) if tokens is None else tokens.tokens.shape
    seen: dict[Any, BlockSizes] = {}
    for index in range(plan.shape.n_blocks):
        linears = plan.skeleton.linear_shapes(index)
        key = tuple(linears.items())
        if key in seen:
            continue
        arch = plan.skeleton.block_arch(index)
        seen[key] = BlockSizes(
            linears=linears,
            groups=arch.calibration_order,
            residual=frozenset(arch.residual),
            routed=frozenset(name for name in linears if arch.is_routed(name)),
            hidden=plan.shape.hidden,
            heads=plan.shape.n_heads,
            kv_heads=plan.shape.n_kv_heads,
            window=T,
            batch=min(B * T, max(T, request.batch_tokens // T * T)),
            tokens=B * T,
            itemsize=request.dtype.itemsize,
        )
    return list(seen.values())


def _estimate(plan: Plan, request: Request, tokens: TokenSet | None, rates: Rates) -> Estimate:
    stages, kinds = request.recipe.stages, _blocks(plan, request, tokens)
    reference = any(stage.needs_reference for stage in stages)
    inputs = tokens is not None and any(stage.needs_inputs for stage in stages)
    item, cpu = request.dtype.itemsize, request.device.type == "cpu"
    streams = (2 if reference else 1) if inputs else 0
    states = streams * kinds[0].tokens * plan.shape.hidden * item
    block = max(kinds, key=lambda sizes: _working(plan, sizes))
    outside = [_bytes(plan, module) for module in (plan.arch.embedding, plan.arch.head)]
    output, packed = _output(plan), _packed(plan, block)
    parts = {
        "weights of a block": _kept_weights(request, block),
        "what was encoded of it": _encoded(request, block, reference),
        "work on one layer": _working(plan, block),
    }
    writing = 2 * max(*outside, packed)
    computed = max(sum(parts.values()), writing if cpu else 0)
    if computed == writing:
        parts = {"embedding and its copy": writing}
    on_device = states if request.states_on == "device" else 0
    parts |= {"hidden states": on_device} if on_device else {}
    base = resident() + _SLACK
    host = states if request.states_on == "host" or (cpu and request.states_on == "device") else 0
    batches = streams * block.batch * plan.shape.hidden * item
    spilled = states if request.states_on == "disk" else 0
    files = item * block.weights * (1 + reference) if request.split and cpu else 0
    state = states if request.work is not None and request.resume in ("auto", "required") else 0
    effort = _effort(plan, kinds, streams)
    read = sum((plan.source.folder / shard).stat().st_size for shard in plan.source.shards)
    per_block = effort.products / rates.products + effort.touched / rates.touched
    return Estimate(
        ram=base + (computed + (0 if on_device else batches) + host if cpu else host + writing + batches),
        vram=0 if cpu else computed + on_device,
        # Two states are there while one replaces the other; the finished shards move, the source's are not touched.
        disk=output + spilled + files + 2 * state,
        output=output,
        seconds=per_block * plan.shape.n_blocks + 2 * read / _HASHED + 3 * output / _HASHED,
        seconds_per_block=per_block,
        parts={"the program": base} | parts if cpu else parts,
        batch_tokens=block.batch or request.batch_tokens,
        states_on=request.states_on,
        split=request.split,
    )


def _working(plan: Plan, sizes: BlockSizes) -> int:
    """Bytes of the most demanding step beside weights and hidden states."""
    statistics = 3 * 4 * sizes.largest
    return max(statistics, sizes.forward(), *(stage.room(sizes) for stage in plan.recipe.stages))


def _kept_weights(request: Request, sizes: BlockSizes) -> int:
    """Bytes of a block's weights that are in memory: all, or those that one step needs."""
    return request.dtype.itemsize * (sizes.together if request.split else sizes.weights)


def _encoded(request: Request, sizes: BlockSizes, reference: bool) -> int:
    """Bytes of codes, and where the parent's weights are still needed, of the weights that took their place."""
    encodes = any(isinstance(stage, Encode) for stage in request.recipe.stages)
    again = request.dtype.itemsize if reference and not request.split else 0
    restructured = any(stage.kind == "restructure" for stage in request.recipe.stages)
    return (encodes + again * (1 + restructured)) * (sizes.weights - sizes.largest) if encodes or restructured else 0


def _packed(plan: Plan, sizes: BlockSizes) -> int:
    return int(sum(_stored(plan, 0, name, shape) for name, shape in sizes.linears.items()))


def _stored(plan: Plan, index: int, name: str, shape: tuple[int, int]) -> float:
    """Bytes of a linear in the output."""
    full = f"{plan.arch.blocks}.{index}.{name}"
    encoder = next((s for s in plan.recipe.stages if isinstance(s, Encode) and s.selects(full)), None)
    bits = 16.0 if encoder is None else encoder.stored_bits(*shape)
    return shape[0] * shape[1] * bits / 8


def _output(plan: Plan) -> int:
    """Bytes of the output's weights."""
    blocks = sum(
        _stored(plan, index, name, shape)
        for index in range(plan.shape.n_blocks)
        for name, shape in plan.skeleton.linear_shapes(index).items()
    )
    return int(blocks) + sum(_bytes(plan, module) for module in (plan.arch.embedding, plan.arch.head))


def _bytes(plan: Plan, module: str) -> int:
    """Bytes of a matrix outside the blocks, in 16 bits."""
    shape = plan.source.shapes.get(f"{module}.weight", (0,))
    return 2 * int(torch.Size(shape).numel())


def _effort(plan: Plan, kinds: list[BlockSizes], streams: int) -> Effort:
    """What the mean block computes."""
    stages = plan.recipe.stages
    each = []
    for sizes in kinds:
        profiled = Effort(0, 60.0 * sizes.weights) * (1 + any(stage.kind == "smooth" for stage in stages))
        each.append(total([*(stage.effort(sizes) for stage in stages), profiled, sizes.passes() * streams]))
    return total(each) * (1 / len(each))


def measure_rates(device: torch.device) -> Rates:
    """Rates of a matrix product and of element-wise steps on the device."""
    a = torch.randn(1536, 1536, device=device)
    flat = torch.randn(1 << 22, device=device)
    products = _seconds(lambda: a @ a, device)
    touched = _seconds(lambda: torch.addcmul(flat, flat, flat), device)
    return Rates(2 * 1536**3 / products, 4 * 4 * flat.numel() / touched)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    seconds = watch([step], device, as_graph=False)
    return min(seconds() for _ in range(5))


def shown(found: Estimate) -> Mapping[str, str]:
    """The figures in words, for a table."""
    rows = {"RAM": gigabytes(found.ram)}
    rows |= {"VRAM": gigabytes(found.vram)} if found.vram else {}
    rows |= {f"  {part}": gigabytes(size) for part, size in found.parts.items()}
    return rows | {"disk": gigabytes(found.disk), "output": gigabytes(found.output)}
