"""The parent under a plan: its blocks, the tensors outside them, and the hidden states that enter
block 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence
from pathlib import Path

import torch
from torch import Tensor

from quantize.block.block import Block
from quantize.block.view import ModelView
from quantize.block.walk import Pass
from quantize.calibration.tokens import TokenSet
from quantize.conversion.allocation import SAMPLE_TOKENS
from quantize.conversion.plan import Plan
from quantize.conversion.request import Progress
from quantize.conversion.waits import waits_before
from quantize.cost.footprint import standing
from quantize.files.disk import report_errors
from quantize.files.finite import require_finite_floats
from quantize.files.memo import Memo
from quantize.files.offload import Parking, place_states
from quantize.model.logits import log_probs
from quantize.model.prove import prove
from quantize.model.skeleton import as_computed


def open_block(
    plan: Plan,
    index: int,
    inputs: MutableSequence[Tensor],
    parent_inputs: MutableSequence[Tensor] | None = None,
) -> Block:
    """Load one block; inputs: the hidden states [B, T, D] that reach it, parent_inputs: the
    parent's.

    They come in the basis of the output and are replaced by the same in the parent's, which the
    weights are in.
    """
    request = plan.request
    prefix = f"{plan.arch.blocks}.{index}."
    parking = Parking(request.device, _scratch(plan)) if request.split else None
    weights: dict[str, Tensor] = {}
    storage: dict[str, torch.dtype] = {}
    # One by one: all in both dtypes would take half as much again.
    for name in plan.source.names(prefix):
        tensor = plan.source.tensor(name)
        require_finite_floats({name: tensor}, "")
        storage[name.removeprefix(prefix)] = tensor.dtype
        tensor = as_computed(tensor, request.device, request.dtype)
        weights[name.removeprefix(prefix)] = parking.put(tensor) if parking else tensor
    block = Block(
        index=index,
        arch=plan.skeleton.block_arch(index),
        shape=plan.skeleton.block_shape(index, plan.shape),
        module=plan.skeleton.layer(index, weights, placed=True),
        storage=storage,
        forward=Pass(plan.skeleton, index, parking),
        inputs=inputs,
        parent_inputs=parent_inputs,
        device=request.device,
        stream=plan.skeleton.stream,
        keeps_post_scales=plan.format.keeps_post_scales,
        parking=parking,
        memo=Memo(request.work, request.ranks),
        ranks=request.ranks,
        holds=_passes(plan, index, inputs, 1 if parent_inputs is None else 2),
    )
    if any(stage.kind in ("smooth", "cache") for stage in request.recipe.stages):
        proof = prove(block.arch, block.module, block.forward, plan.skeleton.stream)
        block.arch, block.unproved = proof.arch, dict(proof.dropped)
    if parking:
        parking.away(block.module)
    if plan.basis.is_changed:
        block.map_inputs(plan.basis.leave)
    return block


def _passes(plan: Plan, index: int, inputs: MutableSequence[Tensor], streams: int) -> int:
    """How many passes of each stream have room to wait in a block."""
    arch, linears = plan.skeleton.block_arch(index), plan.skeleton.linear_shapes(index)
    room = plan.request.holds
    if not inputs or not room:
        return 0
    routed = {name for name in linears if arch.is_routed(name)}
    width = plan.skeleton.stream.width
    stops = waits_before(plan, index)
    values = standing(linears, arch.calibration_order, routed, stops, width)
    size = inputs[0].numel() // width * values * plan.request.dtype.itemsize
    return room // max(1, size * streams)


def outside(plan: Plan, *modules: str) -> dict[str, Tensor]:
    """Tensors of modules outside the blocks after all stages; a tied head has no weight unless a
    stage unties it."""
    out: dict[str, Tensor] = {}
    for module in modules:
        tied = module == plan.arch.head and plan.shape.tied
        found = plan.source.tensors(f"{module}.")
        # A bias is the head's own, tied or not (CTRL).
        own = {name: tensor for name, tensor in found.items() if not tied or name != "weight"}
        out |= {f"{module}.{name}": tensor for name, tensor in own.items()}
        if tied and plan.basis.unties(plan.shape):
            out[f"{module}.weight"] = plan.source.tensor(f"{plan.arch.embedding}.weight")
    require_finite_floats(out, "")
    return plan.basis.outside(out, plan.arch)


def has_tail(plan: Plan) -> bool:
    """Whether anything is written behind the blocks: not where norms have no weights and the head is
    the embedding (OLMo 1B)."""
    head = f"{plan.arch.head}.weight"
    names = [name for module in plan.arch.after for name in plan.source.names(f"{module}.")]
    own = [name for name in names if name != head or not plan.shape.tied]
    return bool(own) or plan.basis.unties(plan.shape)


def embed_windows(plan: Plan, windows: Tensor) -> Iterator[Tensor]:
    """Token windows [B, T] → the hidden states [b, T, D] that enter block 0, batch by batch."""
    batch = max(1, plan.request.batch_tokens // windows.shape[1])
    weights = outside(plan, *plan.arch.before)
    for part in torch.split(windows, batch):
        yield plan.skeleton.embed(weights, part)


def sample(plan: Plan, tokens: TokenSet) -> list[Tensor]:
    """The hidden states that enter block 0, of as much text as planning measures on."""
    windows = max(1, SAMPLE_TOKENS // tokens.tokens.shape[1])
    return list(embed_windows(plan, tokens.tokens[:windows]))


def hold(plan: Plan, hidden: Iterable[Tensor]) -> MutableSequence[Tensor]:
    """Hidden states of all batches, where they wait between two blocks."""
    place = plan.request.states_on
    return place_states(hidden, place, _scratch(plan) if place == "disk" else None)


def view_of(plan: Plan, tokens: TokenSet, progress: Progress) -> ModelView:
    """The whole parent, as stages see it that plan ahead."""
    arch, request = plan.arch, plan.request
    weights = outside(plan, *arch.after)
    if f"{arch.head}.weight" not in weights:
        weights |= outside(plan, arch.embedding)
    tail = plan.skeleton.tail(weights)

    return ModelView(
        arch=arch,
        shape=plan.shape,
        sizes=plan.source.shapes,
        hidden=sample(plan, tokens),
        open=lambda index, inputs: open_block(plan, index, inputs),
        log_probs=lambda hidden: log_probs(tail(hidden)),
        progress=progress,
        ranks=request.ranks,
    )


def _scratch(plan: Plan) -> Path:
    """Folder for files without a name, which are gone when the process is."""
    folder = plan.request.work or plan.request.output.absolute().parent
    with report_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
