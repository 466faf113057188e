"""Memory, disk and time of a conversion before it starts, and how to keep it below a limit.

Memory is counted from the sizes of tensors that are alive at once; what the process takes
without any is measured. Time
is measured: a trial runs the conversion's own steps on a block of every
kind (`quantize.conversion.trial`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from quantize.calibration.tokens import TokenSet
from quantize.conversion.beside import part_sizes
from quantize.conversion.draft import draft
from quantize.conversion.held_out_cost import room_of_look
from quantize.conversion.plan import Plan
from quantize.conversion.request import Request
from quantize.conversion.trial import Timing, timing
from quantize.conversion.waits import waits_before
from quantize.cost.footprint import FLOAT, BlockSizes
from quantize.cost.peak import peak_resident, resident
from quantize.cost.units import gigabytes
from quantize.errors import RoomError
from quantize.files.offload import Place
from quantize.methods.encode import Encode
from quantize.threads import spare_threads

_SLACK = 64 << 20
"""Bytes that threads, allocators and libraries take once they work."""
_LEAST_BATCH = 512
"""Tokens of a pass below which smaller ones would cost more time than they save room."""


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take: bytes, and where a trial was run, seconds."""

    ram: int
    """At most, of the process."""
    vram: int
    """At most, of the accelerator; 0 on a CPU."""
    disk: int
    """At most, beside the output and in the work folder, the output included."""
    output: int
    """Weights of the output."""
    check: int
    """Of the device that computes, at most, while held-out windows are looked at; 0 without a look.
    `ram` or `vram` is no less."""
    parts: dict[str, int]
    """What the peak of the device that computes consists of."""
    batch_tokens: int
    states_on: str
    split: bool
    time: Timing | None = None
    """None where it was not measured."""

    def with_check(self, request: Request) -> Estimate:
        """The same with room for the look at the end."""
        if request.device.type == "cpu":
            return replace(self, ram=max(self.ram, self.check))
        return replace(self, vram=max(self.vram, self.check))

    def as_json(self) -> dict[str, Any]:
        """All fields, those of `time` among them; null where it was not measured."""
        out = asdict(self)
        measured = out.pop("time") or dict.fromkeys(field.name for field in fields(Timing))
        return out | measured


def estimate(request: Request, timed: bool = True) -> Estimate:
    """What `convert` will take. timed: whether to run a trial, which loads weights.

    Raises what `convert` raises before it loads weights, and with a trial what
    it raises on the blocks tried.
    """
    started = time.monotonic()
    plan, space, tokens = draft(request)
    opening = time.monotonic() - started
    found = _estimate(plan, request, tokens).with_check(
        request
    )  # before the trial, whose leavings would be counted
    if not timed:
        return found
    return replace(
        found,
        time=timing(plan, space, tokens, opening, found.output, _state(plan, request, tokens)),
    )


def within(request: Request) -> Request:
    """The request, changed as far as it must be to stay below its limits; what
    costs most time is done last.

    All ranks get what suits the first. RoomError with the least that
    would do where nothing suffices.
    """
    if request.max_ram is None and request.max_vram is None:
        return request
    with request.ranks.explain():
        # what is to be said of the text is said where the request is carried out
        plan, _, tokens = draft(request, aloud=False)
        choices = _frugal(request)
        found = [_estimate(plan, choice, tokens) for choice in choices]
        limits = (request.max_ram or math.inf, request.max_vram or math.inf)
        choices[0] = replace(
            choices[0], hold=_hold(request, found[0], _standing(plan, request, tokens))
        )
        fitting = (
            i for i, one in enumerate(found) if one.ram <= limits[0] and one.vram <= limits[1]
        )
        chosen = request.ranks.tell(next(fitting, None))
    taken = peak_resident() or 0
    if chosen is None or (request.max_ram is not None and taken > request.max_ram):
        least = min(found, key=lambda one: (one.vram, one.ram))
        needed = (
            [f"--max-ram {gigabytes(max(least.ram, taken))}"] if request.max_ram is not None else []
        )
        needed += [f"--max-vram {gigabytes(least.vram)}"] if request.max_vram is not None else []
        raise RoomError(
            f"recipe {request.recipe.name} on {request.model} needs {' and '.join(needed)} at "
            f"least; most of it is {max(least.parts, key=lambda part: least.parts[part])}"
        )
    return _with_look(choices[int(chosen)], found[int(chosen)])


def _with_look(request: Request, found: Estimate) -> Request:
    """Without the look at held-out windows where a limit leaves no room for it."""
    cpu = request.device.type == "cpu"
    limit = request.max_ram if cpu else request.max_vram
    if limit is None or found.check <= limit:
        return request
    option = "--max-ram" if cpu else "--max-vram"
    reason = f"a look at held-out windows takes {gigabytes(found.check)}, {option} allows less"
    return replace(request, check_windows=0, unchecked=reason)


def _hold(request: Request, found: Estimate, wanted: int) -> int | None:
    """Bytes for passes that wait, which spare time alone: most of what a limit leaves; None where
    that is as much as is wanted."""
    cpu = request.device.type == "cpu"
    limit, taken = (request.max_ram, found.ram) if cpu else (request.max_vram, found.vram)
    left = None if limit is None else max(0, (limit - taken) * 4 // 5)
    return None if left is None or left >= wanted else left


def _frugal(request: Request) -> list[Request]:
    """The request and ever more frugal ones; in none do passes wait."""
    request = replace(request, hold=0)
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
            stops=waits_before(plan, index),
            goes_ahead=request.device.type == "cpu" and request.holds > 0 and spare_threads() > 0,
            stream=plan.skeleton.stream.width,
        )
    return list(seen.values())


def _estimate(plan: Plan, request: Request, tokens: TokenSet | None) -> Estimate:
    stages = request.recipe.stages
    kinds = _blocks(plan, request, tokens)
    reference = any(stage.needs_parent for stage in stages)
    inputs = tokens is not None and any(stage.needs_inputs for stage in stages)
    item = request.dtype.itemsize
    cpu = request.device.type == "cpu"
    streams = (2 if reference else 1) if inputs else 0
    states = _states(plan, request, tokens)
    block = max(kinds, key=lambda sizes: _working(plan, sizes))
    outside = [_bytes(plan, module) for module in (*plan.arch.before, *plan.arch.after)]
    output = _output(plan)
    packed = _block_bytes(plan, block)
    parts = {
        "weights of a block": _kept_weights(request, block),
        "what was encoded of it": _encoded_bytes(request, block, reference),
        "work on one layer": _working(plan, block),
    }
    waiting = min(request.holds, _standing(plan, request, tokens))
    # They wait while linears are worked on, and not yet when the block is looked at as a whole.
    most = max(stage.room(block) for stage in stages) + waiting
    waiting = max(0, most - parts["work on one layer"])
    parts |= {"passes that wait": waiting} if waiting else {}
    writing = 2 * max(*outside, packed, *part_sizes(plan))
    computed = max(sum(parts.values()), writing if cpu else 0)
    if computed == writing:
        parts = {"embedding and its copy": writing}
    on_device = states if request.states_on == "device" else 0
    parts |= {"hidden states": on_device} if on_device else {}
    base = resident() + _SLACK
    host = states if request.states_on == "host" or (cpu and request.states_on == "device") else 0
    batches = streams * block.batch * plan.skeleton.stream.width * item
    spilled = states if request.states_on == "disk" else 0
    files = item * block.weights * (1 + reference) if request.split and cpu else 0
    state = _state(plan, request, tokens)
    largest = max(kinds, key=lambda sizes: sizes.weights)
    check = room_of_look(plan, largest, tokens)
    check += base if check and cpu else 0
    return Estimate(
        ram=base
        + (computed + (0 if on_device else batches) + host if cpu else host + writing + batches),
        vram=0 if cpu else computed + on_device,
        # Two states are there while one replaces the other; the finished shards move,
        # the source's are not touched.
        disk=output * plan.format.copies + spilled + files + 2 * state,
        output=output,
        check=check,
        parts={"the program": base} | parts if cpu else parts,
        batch_tokens=block.batch or request.batch_tokens,
        states_on=request.states_on,
        split=request.split,
    )


def _states(plan: Plan, request: Request, tokens: TokenSet | None) -> int:
    """Bytes of the hidden states of all streams."""
    stages = request.recipe.stages
    if tokens is None or not any(stage.needs_inputs for stage in stages):
        return 0
    streams = 2 if any(stage.needs_parent for stage in stages) else 1
    return int(
        streams * tokens.tokens.numel() * plan.skeleton.stream.width * request.dtype.itemsize
    )


def _standing(plan: Plan, request: Request, tokens: TokenSet | None) -> int:
    """Bytes of the passes of all streams where they wait in a block."""
    streams = _states(plan, request, tokens) and (
        2 if any(stage.needs_parent for stage in plan.recipe.stages) else 1
    )
    return streams * max(sizes.standing() for sizes in _blocks(plan, request, tokens))


def _state(plan: Plan, request: Request, tokens: TokenSet | None) -> int:
    """Bytes of hidden states that are kept after every block, for a run that may be stopped."""
    keeps = request.work is not None and request.resume in ("auto", "required")
    return _states(plan, request, tokens) if keeps else 0


def _working(plan: Plan, sizes: BlockSizes) -> int:
    """Bytes of the most demanding step beside weights and hidden states."""
    statistics = 3 * 4 * sizes.largest
    return max(statistics, sizes.profiling(), *(stage.room(sizes) for stage in plan.recipe.stages))


def _kept_weights(request: Request, sizes: BlockSizes) -> int:
    """Bytes of a block's weights that are in memory: all, or those that one step needs."""
    return request.dtype.itemsize * (sizes.together if request.split else sizes.weights)


def _encoded_bytes(request: Request, sizes: BlockSizes, reference: bool) -> int:
    """Bytes of codes, and where the parent's weights are still needed, of the
    weights that took their place."""
    encodes = any(isinstance(stage, Encode) for stage in request.recipe.stages)
    again = request.dtype.itemsize if reference and not request.split else 0
    restructured = any(stage.kind == "restructure" for stage in request.recipe.stages)
    return (
        (encodes + again * (1 + restructured)) * (sizes.weights - sizes.largest)
        if encodes or restructured
        else 0
    )


def _block_bytes(plan: Plan, sizes: BlockSizes) -> int:
    """Bytes of the first block's linears and of its cache in the output."""
    return int(_linears_bytes(plan, 0, sizes.linears)) + _cache_bytes(plan, 0)


def _linears_bytes(plan: Plan, index: int, linears: Mapping[str, tuple[int, int]]) -> float:
    """Bytes of the linears of a block in the output."""
    total = 0.0
    left = dict(linears)
    target = plan.recipe.target_bpw if plan.request.target_bpw is None else plan.request.target_bpw
    for stage in plan.recipe.stages:
        if not isinstance(stage, Encode):
            continue
        taken = [name for name in left if stage.selects(f"{plan.arch.blocks}.{index}.{name}")]
        mine = {name: left.pop(name) for name in taken}
        known = stage.schemes(plan.skeleton.block_arch(index), mine)
        for name, (N, K) in mine.items():
            # What is known to have a scheme shares a target of bits, which choices come close to.
            bits = known.get(name, stage).stored_bits(N, K)
            total += N * K * (target if target and name in known else bits) / 8
    return total + sum(2 * N * K for N, K in left.values())


def _cache_bytes(plan: Plan, index: int) -> int:
    """Bytes of the scales, shifts and rotations of a block's INT4 cache in the output."""
    return sum(FLOAT * math.prod(size) for size in plan.cache_tensors(index).values())


def _output(plan: Plan) -> int:
    """Bytes of the output's weights."""
    blocks = sum(
        _linears_bytes(plan, index, plan.skeleton.linear_shapes(index)) + _cache_bytes(plan, index)
        for index in range(plan.shape.n_blocks)
    )
    outside = sum(_bytes(plan, module) for module in (*plan.arch.before, *plan.arch.after))
    return int(blocks) + outside + sum(part_sizes(plan))


def _bytes(plan: Plan, module: str) -> int:
    """Bytes of a matrix outside the blocks, in 16 bits."""
    shape = plan.source.shapes.get(f"{module}.weight", (0,))
    return 2 * int(torch.Size(shape).numel())


def rows_of(found: Estimate) -> Mapping[str, str]:
    """The figures in words, for a table."""
    rows = {"RAM": gigabytes(found.ram)}
    rows |= {"VRAM": gigabytes(found.vram)} if found.vram else {}
    rows |= {f"  {part}": gigabytes(size) for part, size in found.parts.items()}
    return rows | {"disk": gigabytes(found.disk), "output": gigabytes(found.output)}
