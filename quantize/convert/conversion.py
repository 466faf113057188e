"""State of one conversion: loads a block, sends it through the stages, and keeps what is known about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableSequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.statistics import Collected, profile
from quantize.block.teacher import teacher_of
from quantize.block.view import ModelView
from quantize.block.walk import Pass, Route, Send, Streams, walk
from quantize.calibration.tokens import TokenSet
from quantize.convert.allocation import SAMPLE_TOKENS, Allocation, Space
from quantize.convert.request import Progress, Request, Summary
from quantize.cost.peak import Cost, give_back, peak_of
from quantize.files.checkpoint import Checkpoint, require_finite_floats
from quantize.files.disk import reported
from quantize.files.memo import Memo
from quantize.files.offload import Parking, kept
from quantize.formats.compressed_tensors import lost, quantization_config
from quantize.formats.native import native_config
from quantize.formats.scheme import AnyScheme, Packed
from quantize.methods.basis import Basis
from quantize.methods.fireq.attention import FireqAttention
from quantize.model.arch import ROUTERS, Architecture, ExpertSizes, Shape
from quantize.model.linear import PackedLinear
from quantize.model.moe import MoeFfn, Policy, TopK
from quantize.model.rope import rotary_dim
from quantize.model.skeleton import Skeleton
from quantize.solvers.grid import Grid

log = logging.getLogger(__name__)

QUANTIZED, REFERENCE = "quantized", "reference"
"""The streams of a conversion: through the blocks as they are encoded and, where a stage needs it, the parent's."""

HEAD_GROUP = 128
"""Group of an encoded lm_head."""
_HEAD_WEIGHTS = 1 << 24  # of lm_head encoded at once

RESTRUCTURED = ("policy", "mean_experts", "ffn_error", "pruned_error", "untrained_error", "random_error")
"""Facts of a restructured FFN that a summary shows."""


class Conversion:
    """State of one run: what was encoded so far and what is known about it."""

    def __init__(
        self, request: Request, source: Checkpoint, arch: Architecture, shape: Shape, skeleton: Skeleton
    ) -> None:
        self.request, self.source, self.arch, self.shape, self.skeleton = request, source, arch, shape, skeleton
        self.basis = Basis(request.recipe.stages)
        self.schemes: dict[str, AnyScheme] = {}
        self.rotated_inputs: list[str] = []
        self.report: dict[str, dict[str, Any]] = {}
        self.statistics = Collected()
        self.rotary_dim = rotary_dim(source.config, shape.head_dim)
        self.allocation: Allocation | None = None
        self.stored_bits, self.weights = 0.0, 0
        self.source_bytes = self.untied_head_bytes = 0
        self.routing: dict[str, Policy] = {}
        self.costs: dict[str, Cost] = {}
        self.memo = Memo(request.work, request.ranks)

    @property
    def needs_plan(self) -> bool:
        """Whether any stage must be `planned` before the first block."""
        return any(stage.needs_plan for stage in self.request.recipe.stages)

    def within(self, space: Space, tokens: TokenSet, progress: Progress) -> Conversion:
        """A conversion whose recipe keeps within the bits per weight of `space`; measures what rounding costs."""
        windows = tokens.tokens[: max(1, SAMPLE_TOKENS // tokens.tokens.shape[1])]
        errors = space.measure(self.open, self.shape.n_blocks, self._hidden(windows), progress, self.request.ranks)
        chosen = space.choose(errors)
        log.info("%.3f bits per weight for a target of %g: %s", chosen.bits_per_weight, chosen.target, chosen.bits)
        request = replace(self.request, recipe=chosen.recipe)
        run = Conversion(request, self.source, self.arch, self.shape, self.skeleton)
        run.allocation = chosen
        return run

    def planned(self, tokens: TokenSet, progress: Progress) -> Conversion:
        """A conversion whose stages have settled what hangs on the whole model."""
        stages, found = [], {}
        with torch.no_grad():
            for stage in self.request.recipe.stages:
                if stage.needs_plan:
                    stage, found[stage.method] = stage.planned(self._view(tokens, progress))
                stages.append(stage)
        request = replace(self.request, recipe=self.request.recipe.model_copy(update={"stages": tuple(stages)}))
        run = Conversion(request, self.source, self.arch, self.shape, self.skeleton)
        run.report |= found
        return run

    def _view(self, tokens: TokenSet, progress: Progress) -> ModelView:
        weights = self._outside(self.arch.final_norm, self.arch.head)
        head = weights.pop(f"{self.arch.head}.weight", None)
        if head is None:
            head = self._outside(self.arch.embedding)[f"{self.arch.embedding}.weight"]
        norm = self.skeleton.final_norm({n.removeprefix(f"{self.arch.final_norm}."): w for n, w in weights.items()})
        placed = head.to(self.request.device, self.request.dtype)
        return ModelView(
            arch=self.arch,
            shape=self.shape,
            sizes=self.source.shapes,
            hidden=self._hidden(tokens.tokens[: max(1, SAMPLE_TOKENS // tokens.tokens.shape[1])]),
            open=self.open,
            log_probs=lambda hidden: F.linear(norm(hidden), placed).float().log_softmax(dim=-1),
            progress=progress,
            ranks=self.request.ranks,
        )

    def _hidden(self, windows: Tensor) -> list[Tensor]:
        """Token windows [B, T] → the hidden states that enter block 0, batch by batch."""
        return list(self._embedded(windows))

    def _embedded(self, windows: Tensor) -> Iterator[Tensor]:
        batch = max(1, self.request.batch_tokens // windows.shape[1])
        weight = self._outside(self.arch.embedding)[f"{self.arch.embedding}.weight"]
        for part in torch.split(windows, batch):
            yield self.skeleton.embed(weight, part)

    def embed(self, tokens: TokenSet | None) -> Streams[str] | None:
        """Hidden states that enter block 0; None where no stage needs them."""
        if tokens is None or not any(s.needs_inputs for s in self.request.recipe.stages):
            return None
        streams = {QUANTIZED: self.keep(self._embedded(tokens.tokens))}
        if any(s.needs_reference for s in self.request.recipe.stages):
            streams[REFERENCE] = self.keep(streams[QUANTIZED])
        return Streams(streams, self.request.ranks)

    def keep(self, hidden: Iterable[Tensor]) -> MutableSequence[Tensor]:
        """Hidden states of all batches, where they wait between two blocks."""
        place = self.request.states_on
        return kept(hidden, place, self.scratch if place == "disk" else None)

    @property
    def scratch(self) -> Path:
        """Folder for files without a name, which are gone when the process is."""
        folder = self.request.work or self.request.output.absolute().parent
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tensors_outside(self, *modules: str) -> dict[str, Tensor]:
        """Tensors of modules outside the blocks as the output holds them; the final norm and the head go together."""
        out = self._outside(*modules)
        head, bits = f"{self.arch.head}.weight", self.request.recipe.head_bits
        untied = {head: out[head]} if self.shape.tied and head in out else {}
        self.source_bytes += _bytes(out) - _bytes(untied)
        packed = self._head(out.pop(head), bits) if head in out and bits is not None else {}
        if untied:
            self.untied_head_bytes = _bytes(packed or untied)
            log.info("%s no longer shares the embedding: %d bytes more", self.arch.head, self.untied_head_bytes)
        return out | packed

    def _outside(self, *modules: str) -> dict[str, Tensor]:
        """Tensors of modules outside the blocks after all stages; a tied head has none unless a stage unties it."""
        out: dict[str, Tensor] = {}
        for module in modules:
            if module != self.arch.head or not self.shape.tied:
                out |= {f"{module}.{n}": t for n, t in self.source.tensors(f"{module}.").items()}
            elif self.basis.unties(self.shape):
                out[f"{module}.weight"] = self.source.tensor(f"{self.arch.embedding}.weight")
        require_finite_floats(out, "")
        return self.basis.outside(out, self.arch)

    def _head(self, weight: Tensor, bits: int) -> dict[str, Tensor]:
        """Encode lm_head [V, D]; returns its packed tensors."""
        grid = Grid(bits, HEAD_GROUP, signed=True)
        codes, scales, error, size = [], [], 0.0, 0.0
        for rows in torch.split(weight, max(1, _HEAD_WEIGHTS // weight.shape[1])):
            part = rows.to(self.request.device).float()
            scale, factor = grid.fit_scale(part)
            code, value = grid.round(part, scale, factor)
            codes.append(code)
            scales.append(scale)
            error, size = error + float((value - part).square().sum()), size + float(part.square().sum())
        packed = grid.pack(torch.cat(codes), torch.cat(scales))
        name = self.arch.head
        self._count(name, packed, fp8_activations=False)
        self.report[name] = {"weight_error": error / size if size else 0.0}
        return {f"{name}.{suffix}": tensor.cpu() for suffix, tensor in packed.tensors().items()}

    def open(
        self,
        index: int,
        inputs: MutableSequence[Tensor],
        reference_inputs: MutableSequence[Tensor] | None = None,
    ) -> Block:
        """Load one block; inputs: the hidden states [B, T, D] that reach it, reference_inputs: the parent's.

        They come in the basis of the output and are replaced by the same in the parent's, which the weights are in.
        """
        prefix = f"{self.arch.blocks}.{index}."
        parking = Parking(self.request.device, self.scratch) if self.request.split else None
        weights: dict[str, Tensor] = {}
        storage: dict[str, torch.dtype] = {}
        for name in self.source.names(prefix):  # one by one: all in both dtypes would take half as much again
            tensor = self.source.tensor(name)
            require_finite_floats({name: tensor}, "")
            storage[name.removeprefix(prefix)] = tensor.dtype
            self.source_bytes += _bytes({name: tensor})
            tensor = tensor.to(self.request.device, self.request.dtype)
            weights[name.removeprefix(prefix)] = parking.put(tensor) if parking else tensor
        module = self.skeleton.layer(index, weights, placed=True)
        block = Block(
            index=index,
            arch=self.skeleton.block_arch(index),
            shape=self.shape,
            module=module,
            storage=storage,
            forward=Pass(self.skeleton, index, parking),
            inputs=inputs,
            reference_inputs=reference_inputs,
            device=self.request.device,
            rotary_dim=self.rotary_dim,
            keeps_post_scales=self.request.recipe.format == "pq",
            parking=parking,
            memo=self.memo,
            ranks=self.request.ranks,
        )
        if parking:
            parking.away(module)
        if self.basis.changed:
            block.map_inputs(self.basis.leave)
        return block

    def block(self, index: int, streams: Streams[str] | None) -> dict[str, Tensor]:
        """Load, transform and free one block; advances the streams. Returns the tensors of its shard."""
        prefix = f"{self.arch.blocks}.{index}."
        batches = streams.batches if streams else {QUANTIZED: []}
        shard: dict[str, Tensor] = {}

        def open_it(index: int) -> Block:
            return self.open(index, batches[QUANTIZED], batches.get(REFERENCE))

        def visit(block: Block) -> Mapping[str, Route[str]] | None:
            self._apply_stages(block)
            more = index + 1 < self.shape.n_blocks
            return {name: (name, send) for name, send in _onward(block).items() if name in batches} if more else None

        def leave(block: Block) -> None:
            self._record(block, prefix)
            stored = _stored(block)
            if self.request.recipe.format != "pq":
                stored.pop(f"{self.arch.attention}.kv.scale", None)
            shard.update({prefix + name: tensor for name, tensor in stored.items()})

        walk(streams, [index], open_it, visit, leave)
        return shard

    def _apply_stages(self, block: Block) -> None:
        stages = self.request.recipe.stages
        for stage in stages:
            if stage.kind == "restructure":  # which leaves other linears than it found
                stage.apply(block)
                give_back()
        before = after = profile(block)
        smoothed = False
        for stage in (stage for stage in stages if stage.kind != "restructure"):
            if smoothed and stage.kind in ("cache", "encode"):
                after, smoothed = profile(block), False
            stage.apply(block)
            give_back()
            smoothed |= stage.kind == "smooth"
        self.statistics.add(block, before, after)

    def _record(self, block: Block, prefix: str) -> None:
        for name, packed in block.packed.items():
            linear = block.module.get_submodule(name)
            assert isinstance(linear, PackedLinear)
            self._count(prefix + name, packed, linear.fp8_activations)
        self.rotated_inputs += [prefix + name for name in block.arch.roles if block.rotates_inputs(name)]
        self.costs |= {prefix + name: cost for name, cost in block.costs.items()}
        for name, module in block.module.named_modules():
            if isinstance(module, MoeFfn):
                self.routing[prefix + name] = module.policy
        for name, facts in block.report.items():
            self.report[prefix + name] = facts
            log.info("%s%s %s", prefix, name, facts)

    def _count(self, name: str, packed: Packed, fp8_activations: bool) -> None:
        self.schemes[name] = packed.scheme(fp8_activations)
        weights = math.prod(packed.shape)
        self.stored_bits += packed.bits_per_weight * weights
        self.weights += weights

    def config(self) -> dict[str, Any]:
        """config.json of the output."""
        config = self.basis.config(self.source.config, self.shape)
        linears = self.skeleton.linears()
        for stage in self.request.recipe.stages:
            config, linears = stage.config(config), stage.linears(linears)
        found = self._quantization_config(config, linears)
        return config if found is None else config | {"quantization_config": found}

    def _quantization_config(self, config: dict[str, Any], linears: Collection[str]) -> dict[str, Any] | None:
        """How the output is packed, attends and routes; None where any loader gets that right without being told."""
        routers = [f"{ffn}.{router}" for ffn in self.routing for router in ROUTERS]
        alone = [name for name in (self.arch.head, *linears, *routers) if name not in self.schemes]
        if self.request.recipe.format != "pq":
            return quantization_config(self.schemes, alone) if self.schemes else None
        routing = {}
        if self.routing:
            sizes = ExpertSizes.of(config)
            usual = TopK(sizes.top_k, sizes.renormalize)
            routing = {name: policy for name, policy in self.routing.items() if policy != usual}
        if not (self.schemes or self.attention or self.rotated_inputs or routing):
            return None
        return native_config(self.schemes, alone, self.attention, self.rotated_inputs, routing)

    @property
    def attention(self) -> dict[str, Any] | None:
        """How attention works on its cache; None where it is left alone."""
        return next((s.as_json() for s in self.request.recipe.stages if isinstance(s, FireqAttention)), None)

    def lost(self) -> list[str]:
        """What the recipe asks for and its format cannot hold."""
        if self.request.recipe.format == "pq":
            return []
        experts = [n for n in self.skeleton.linears() if self.arch.experts and f".{self.arch.experts.routed}." in n]
        return lost(self.attention is not None, {self.schemes.get(name) for name in experts})

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits of a quantized weight, scales counted."""
        return self.stored_bits / self.weights if self.weights else 16.0

    def results(self, streams: Streams[str] | None) -> dict[str, Any]:
        """What goes into the provenance after the last block."""
        dropped = streams.dropped if streams else 0
        return {
            "bits_per_weight": self.bits_per_weight,
            "dropped_sequences": dropped,
            "attention": self.attention,
            "allocation": self.allocation.as_json() if self.allocation else None,
            "layers": self.report,
        }

    def summary(self, seconds: float, seconds_per_block: float, output_bytes: int) -> Summary:
        """Totals of the run."""
        errors = [f["output_error"] for f in self.report.values() if "output_error" in f]
        return Summary(
            output=str(self.request.output),
            recipe=self.request.recipe.name,
            blocks=self.shape.n_blocks,
            quantized_linears=len(self.schemes),
            bits_per_weight=self.bits_per_weight,
            source_bytes=self.source_bytes,
            output_bytes=output_bytes,
            seconds=round(seconds, 2),
            seconds_per_block=round(seconds_per_block, 3),
            peak_bytes=peak_of(self.request.device),
            promoted=list(self.allocation.promoted) if self.allocation else [],
            fallbacks=[n for n, f in self.report.items() if f.get("fallback")],
            lost=self.lost(),
            untied_head_bytes=self.untied_head_bytes,
            restructured=[
                {"name": name, **{key: self.report[name].get(key) for key in RESTRUCTURED}, **asdict(cost)}
                for name, cost in self.costs.items()
            ],
            activated_reduction=self.report.get("ladimo", {}).get("activated_reduction"),
            mean_output_error=sum(errors) / len(errors) if errors else None,
        )


def _onward(block: Block) -> dict[str, Send]:
    """What each stream goes on through: the block as it is now, or the parent's layer."""
    return {QUANTIZED: partial(block.forward, block.module), REFERENCE: partial(block.forward, teacher_of(block))}


def _stored(block: Block) -> dict[str, Tensor]:
    """Tensors of a block as the checkpoint holds them: packed linears, the rest in the source's dtypes."""
    out: dict[str, Tensor] = {}
    for name, module in block.module.named_modules():
        if isinstance(module, PackedLinear):
            out |= {f"{name}.{suffix}": tensor for suffix, tensor in module.packed.tensors().items()}
            if module.bias is not None:
                out[f"{name}.bias"] = module.bias.to(block.storage[f"{name}.bias"])
        elif not isinstance(module, nn.ModuleList):
            own = module._parameters | module._buffers
            named = {f"{name}.{key}": tensor for key, tensor in own.items() if tensor is not None}
            # What a stage added (post-RoPE scales) keeps its own dtype.
            out |= {key: tensor.to(block.storage.get(key, tensor.dtype)) for key, tensor in named.items()}
    return out


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
