"""Converts what a plan says: one block after the other goes through the stages, then what stands
outside them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableSequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.statistics import profile
from quantize.block.teacher import teacher_of
from quantize.block.walk import Route, Send, Streams, walk
from quantize.calibration.tokens import TokenSet
from quantize.conversion.head import encode_head
from quantize.conversion.inside import Inside, Watched
from quantize.conversion.plan import Plan
from quantize.conversion.source import embed_windows, hold, open_block, outside
from quantize.conversion.state import State
from quantize.cost.peak import give_back
from quantize.errors import ModelError
from quantize.formats.gguf.blocks import nearest_q8
from quantize.formats.scheme import Packed
from quantize.methods.encode import relative_error
from quantize.model.linear import PackedLinear
from quantize.model.moe import MoeFfn

log = logging.getLogger(__name__)

QUANTIZED, REFERENCE = "quantized", "reference"
"""The streams of a conversion: through the blocks as they are encoded and, where a stage needs it,
the parent's."""


class Conversion:
    """One run of a plan. What it has done so far stands in `state` alone."""

    def __init__(self, plan: Plan, state: State | None = None) -> None:
        self.plan = plan
        self.state = State(report=dict(plan.decisions.findings)) if state is None else state
        self.inside: Inside = lambda what, share: None
        """Told what is done inside of a block."""

    def embed(self, tokens: TokenSet | None) -> Streams[str] | None:
        """Hidden states that enter block 0; None where no stage needs them."""
        stages = self.plan.recipe.stages
        if tokens is None or not any(stage.needs_inputs for stage in stages):
            return None
        streams = {QUANTIZED: hold(self.plan, embed_windows(self.plan, tokens.tokens))}
        if any(stage.needs_parent for stage in stages):
            streams[REFERENCE] = hold(self.plan, streams[QUANTIZED])
        return Streams(streams, self.plan.request.ranks)

    def open(
        self,
        index: int,
        inputs: MutableSequence[Tensor],
        parent_inputs: MutableSequence[Tensor] | None = None,
    ) -> Block:
        """Load one block (see `open_block`)."""
        return open_block(self.plan, index, inputs, parent_inputs)

    def profile(self, block: Block) -> dict[str, dict[str, Any]]:
        """Outliers of a block as it is now."""
        return profile(block)

    def block(self, index: int, streams: Streams[str] | None) -> dict[str, Tensor]:
        """Load, transform and free one block; advances the streams. Returns the tensors of its
        shard."""
        plan = self.plan
        prefix = f"{plan.arch.blocks}.{index}."
        batches = streams.batches if streams else {QUANTIZED: []}
        shard: dict[str, Tensor] = {}

        def open_it(index: int) -> Block:
            return self.open(index, batches[QUANTIZED], batches.get(REFERENCE))

        def visit(block: Block) -> Mapping[str, Route[str]] | None:
            for name, dtype in block.storage.items():
                self.state.source_bytes += (
                    math.prod(plan.source.shapes[prefix + name]) * dtype.itemsize
                )
            self._apply_stages(block)
            return _onward(block, batches) if index + 1 < plan.shape.n_blocks else None

        def leave(block: Block) -> None:
            held = {name: self._held(prefix + name, w) for name, w in block.packed.items()}
            self._record(block, prefix, held)
            packed = {prefix + name: weight for name, (weight, _) in held.items()}
            plain = {prefix + name: tensor for name, tensor in _plain(block).items()}
            shard.update(plan.format.tensors(packed, plain))

        walk(streams, [index], open_it, visit, leave)
        return shard

    def tensors_outside(self, *modules: str) -> dict[str, Tensor]:
        """Tensors of modules outside the blocks as the output holds them; the final norm and the
        head go together."""
        plan, state = self.plan, self.state
        plain = outside(plan, *modules)
        head = f"{plan.arch.head}.weight"
        bits = plan.recipe.head_bits
        untied = {head: plain[head]} if plan.shape.tied and head in plain else {}
        state.source_bytes += _bytes(plain) - _bytes(untied)
        packed: dict[str, Packed] = {}
        if head in plain and bits is not None:
            packed[plan.arch.head] = self._head(plain.pop(head), bits)
        embedding = f"{plan.arch.embedding}.weight"
        if embedding in plain and plan.recipe.embedding_bits is not None:
            packed[plan.arch.embedding] = self._embedding(plain.pop(embedding))
        stored = {name: tensor.cpu() for name, tensor in plan.format.tensors(packed, plain).items()}
        if untied:
            of_head = {n: t for n, t in stored.items() if n.startswith(f"{plan.arch.head}.")}
            state.untied_head_bytes = _bytes(of_head)
            log.info(
                "%s no longer shares the embedding: %d bytes more",
                plan.arch.head,
                state.untied_head_bytes,
            )
        return stored

    def _head(self, weight: Tensor, bits: int) -> Packed:
        """Encode lm_head [V, D]."""
        name = self.plan.arch.head
        integers, facts = encode_head(weight, bits, self.plan.request.device)
        packed, more = self._held(name, integers)
        facts |= more
        self._count(name, packed, fp8_activations=False)
        self.state.report[name] = facts
        return packed

    def _embedding(self, weight: Tensor) -> Packed:
        """Put the embedding [V, D] into blocks. It is no linear, and counts as none."""
        packed = nearest_q8(weight)
        error = relative_error(weight.float(), packed.unpack())
        self.state.report[self.plan.arch.embedding] = {"weight_error": error}
        return packed

    def _apply_stages(self, block: Block) -> None:
        stages = self.plan.recipe.stages
        watched = Watched(self.plan.recipe, block, self.inside)
        for stage in stages:
            if stage.kind == "restructure":  # which leaves other linears than it found
                watched.stage(stage.method)
                stage.apply(block)
                give_back()
                self.plan.request.require_room()
        before = after = self.profile(block)
        smoothed = False
        for stage in (stage for stage in stages if stage.kind != "restructure"):
            if smoothed and stage.kind in ("cache", "encode"):
                after = self.profile(block)
                smoothed = False
            watched.stage(stage.method)
            stage.apply(block)
            give_back()
            self.plan.request.require_room()
            smoothed |= stage.kind == "smooth"
        self.state.statistics.add(block, before, after)

    def _held(self, name: str, weight: Packed) -> tuple[Packed, dict[str, Any]]:
        """A packed linear as the format holds it, and facts about that."""
        try:
            return self.plan.format.packed(weight)
        except ValueError as err:
            raise ModelError(f"{name}: format: {self.plan.format.name}: {err}") from None

    def _record(
        self, block: Block, prefix: str, held: Mapping[str, tuple[Packed, dict[str, Any]]]
    ) -> None:
        state = self.state
        for name, (packed, _) in held.items():
            linear = block.module.get_submodule(name)
            assert isinstance(linear, PackedLinear)
            self._count(prefix + name, packed, linear.fp8_activations)
        rotating = [name for name in block.arch.roles if block.rotates_inputs(name)]
        state.rotated_inputs += [prefix + name for name in rotating]
        state.costs |= {prefix + name: cost for name, cost in block.costs.items()}
        for name, module in block.module.named_modules():
            if isinstance(module, MoeFfn):
                state.routing[prefix + name] = module.policy
        if block.unproved:
            state.report[prefix.removesuffix(".")] = {"unmoved": block.unproved}
        for name in dict.fromkeys((*block.report, *held)):
            facts = block.report.get(name, {}) | (held[name][1] if name in held else {})
            if not facts:
                continue
            state.report[prefix + name] = facts
            log.info("%s%s %s", prefix, name, facts)

    def _count(self, name: str, packed: Packed, fp8_activations: bool) -> None:
        self.state.schemes[name] = packed.scheme(fp8_activations)
        weights = math.prod(packed.shape)
        self.state.stored_bits += packed.bits_per_weight * weights
        self.state.weights += weights


def _onward(block: Block, streams: Mapping[str, object]) -> dict[str, Route[str]]:
    """How the streams go on: through the block as it is now, and through the parent's layer."""
    teacher, parents = teacher_of(block), block.parent_passes
    through: dict[str, Send] = {
        QUANTIZED: block.passes.finish,
        REFERENCE: partial(block.forward, teacher),
    }
    if teacher is parents.layer:
        parents.go_ahead(block.parent_stream, None)
        through[REFERENCE] = parents.finish
    return {name: (name, through[name]) for name in streams}


def _plain(block: Block) -> dict[str, Tensor]:
    """Tensors of a block beside its packed weights, in the source's dtypes."""
    out: dict[str, Tensor] = {}
    for name, module in block.module.named_modules():
        if isinstance(module, PackedLinear):
            if module.bias is not None:
                out[f"{name}.bias"] = module.bias.to(block.storage[f"{name}.bias"])
        elif not isinstance(module, nn.ModuleList):
            own = module._parameters | module._buffers
            named = {
                f"{name}.{key}": tensor
                for key, tensor in own.items()
                # What models compute by themselves (Falcon-H1's mup_vector) is in no checkpoint.
                if tensor is not None and key not in module._non_persistent_buffers_set
            }
            # What a stage added (post-RoPE scales) keeps its own dtype.
            for key, tensor in named.items():
                out[key] = tensor.to(block.storage.get(key, tensor.dtype))
    return out


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
