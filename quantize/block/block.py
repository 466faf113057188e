"""One decoder block during conversion: its weights, its calibration inputs, and the statistics stages ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.block.moments import Moments, Sums, routed_sums, sums_of
from quantize.block.smoothing import fold_edge
from quantize.block.statistics import code_histogram
from quantize.cost.peak import Cost
from quantize.errors import ModelError
from quantize.files.memo import Memo
from quantize.files.offload import Parking, shared_copy
from quantize.formats.scheme import Packed
from quantize.model.arch import Architecture, Edge, Shape
from quantize.model.hadamard import apply_hadamard, keep_rotation, let_rotate_inputs, rotates_inputs, widened
from quantize.model.linear import PackedLinear
from quantize.model.moe import MoeFfn
from quantize.parallel.ranks import ALONE, Ranks

Forward = Callable[[nn.Module, Tensor], Tensor]
"""Runs one decoder layer on hidden states [B, T, D] with the masks and rotary tables of that batch shape."""


class _AttentionInputs(nn.Module):
    """Stands in for a block's `kv`: keeps what reaches attention, after RoPE."""

    seen: tuple[Tensor, Tensor, Tensor, Tensor | None, float]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        self.seen = (query, key, value, mask, scaling)
        raise _Stop


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the wanted input was seen."""


@dataclass
class Block:
    """A decoder layer whose linears are being transformed in place.

    `inputs` holds the hidden states [B, T, D] that reach this block through the already quantized blocks,
    `reference_inputs` those of the parent model (None when no stage of the recipe needs them).
    """

    index: int
    arch: Architecture
    shape: Shape
    module: nn.Module
    storage: dict[str, torch.dtype]
    """Dtype of every tensor of the block in the source checkpoint."""
    forward: Forward
    inputs: MutableSequence[Tensor]
    reference_inputs: MutableSequence[Tensor] | None
    device: torch.device
    rotary_dim: int
    """Leading channels of a head that RoPE rotates."""
    keeps_post_scales: bool = False
    """Whether the checkpoint's format can hold post-RoPE scales."""
    packed: dict[str, Packed] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    """Weights in units of their group's scale, by encoded linear (`code_histogram`)."""
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: nn.Module | None = None
    """The layer that encode stages aim at, see `freeze_reference`."""
    parent: nn.Module | None = None
    """The layer before a stage restructured it: the parent's stream goes on through it."""
    parent_arch: Architecture | None = None
    """The parent's row: of a dense block, where experts took the place of its FFN."""
    parking: Parking | None = None
    """Puts the block's matrices away while a linear is being fitted; None: all stay on the device."""
    memo: Memo = field(default_factory=lambda: Memo(None))
    ranks: Ranks = ALONE
    """The processes that convert the block together."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """What single parts took, for those who wait; no part of the reproducible output."""
    _kept: dict[str, Moments] = field(default_factory=dict)
    """Moments of routed experts that were measured along with another's, until they are used."""
    _kept_fp8: bool = False

    def linear(self, name: str) -> nn.Linear:
        """The not yet encoded linear `name` (relative to the block)."""
        module = self.module.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ModelError(f"block {self.index}: {name} was encoded twice; give every layer to one encode stage")
        if self.parking:
            self.parking.back(module)
        return module

    def full_name(self, name: str) -> str:
        """Name of a module of this block within the model."""
        return f"{self.arch.blocks}.{self.index}.{name}"

    def note(self, name: str, **facts: Any) -> None:
        """Record facts about a linear for the provenance and the report."""
        self.report.setdefault(name, {}).update(facts)

    def freeze_reference(self) -> None:
        """Keep a copy of the layer as it is now (smoothed, not quantized): the function encode stages aim at."""
        if self.reference is None and self.reference_inputs is not None:
            self.reference = shared_copy(self.module)
            attention = self.reference.get_submodule(self.arch.attention)
            if hasattr(attention, "kv"):
                del attention.kv  # the parent's cache is not rounded

    def keep_parent(self) -> None:
        """Keep a copy of the layer as it came from the source, before it is restructured."""
        if self.parent is None and self.reference_inputs is not None:
            self.parent, self.parent_arch = shared_copy(self.module), self.arch

    def parent_outputs(self, batch: int) -> Tensor:
        """The parent layer's outputs [B·T, D] for its own hidden states, in float32 (after `keep_parent`)."""
        assert self.parent is not None
        assert self.reference_inputs is not None
        return self.forward(self.parent, self.reference_inputs[batch].to(self.device)).flatten(0, -2).float()

    def add_bias(self, name: str) -> None:
        """Give a linear a bias of zeros where it has none."""
        linear = self.linear(name)
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]), requires_grad=False)
            self.storage[f"{name}.bias"] = self.storage[f"{name}.weight"]

    def replace_ffn(self, ffn: MoeFfn, arch: Architecture) -> None:
        """Put experts in the place of the dense FFN; arch: the block's row from now on."""
        assert arch.experts is not None
        place = arch.experts.ffn
        stored = self.storage[f"{self.arch.of_role('down')}.weight"]
        self.storage = {name: dtype for name, dtype in self.storage.items() if not name.startswith(f"{place}.")}
        self.storage |= {f"{place}.{name}": stored for name in ffn.state_dict()}
        self.module.set_submodule(place, ffn)
        self.arch = arch
        self.forget_moments()

    def encode(self, name: str, packed: Packed, fp8_activations: bool) -> None:
        """Replace a linear by its packed form; later statistics see the quantized layer."""
        old = self.linear(name)
        parent, _, attribute = name.rpartition(".")
        new = PackedLinear(packed, old.bias, fp8_activations, old.weight.dtype, "kernel")
        setattr(self.module.get_submodule(parent), attribute, new.to(self.device))
        keep_rotation(old, new)
        self.forget_moments(name)
        self.packed[name] = packed
        self.histograms[name] = code_histogram(old.weight, packed)

    @property
    def versions(self) -> Iterator[tuple[nn.Module, Architecture]]:
        """The layer with its row, and the parent's where one is kept: what a change of basis must reach."""
        yield self.module, self.arch
        if self.parent is not None and self.parent_arch is not None:
            yield self.parent, self.parent_arch

    def rounded_sinks(self, edge: Edge) -> list[str]:
        """Sinks of an edge that encode stages may round: all but routers."""
        return [sink for sink in edge.sinks if sink in self.arch.roles]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Edges over which a diagonal may still move: none leads into inputs that are rotated on the way."""
        return tuple(edge for edge in self.arch.edges if not any(self.rotates_inputs(sink) for sink in edge.sinks))

    def rotates_inputs(self, name: str) -> bool:
        """Whether the linear rotates its inputs at run time."""
        return rotates_inputs(self.module.get_submodule(name))

    def rotate_inputs(self, name: str) -> None:
        """Let a not yet encoded linear rotate its inputs at run time, by the Hadamard matrix of their number K.

        Its columns are rotated to match. ModelError where there is no such matrix.
        """
        linear = self.linear(name)
        try:
            let_rotate_inputs(linear)
        except ValueError as err:
            raise ModelError(f"{self.full_name(name)}: {err}") from None
        linear.weight.data = apply_hadamard(widened(linear.weight)).to(linear.weight.dtype)
        self.forget_moments(name)

    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the hidden states that enter the block, batch by batch, the parent's too."""
        for stream in (self.inputs, self.reference_inputs or []):
            for batch, hidden in enumerate(stream):
                stream[batch] = change(hidden)
        self.forget_moments()

    def attend_with(self, kv: nn.Module) -> None:
        """Let the block attend through `kv` (a KvAttention) from now on; the checkpoint stores it with the block."""
        self.forget_moments()
        self.module.get_submodule(self.arch.attention).kv = kv.to(self.device)

    def attention_inputs(self, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, float]]:
        """Yield (queries, keys, values, mask, scaling) as they reach attention, batch by batch until `tokens` are seen.

        Queries [B, H, T, d], keys and values [B, Hkv, T, d], after RoPE.
        """
        recorder = _AttentionInputs()
        attention = self.module.get_submodule(self.arch.attention)
        attention.kv = recorder
        try:
            for batch in self.inputs:
                hidden = batch[: max(1, tokens // batch.shape[1])]
                with suppress(_Stop):
                    self.forward(self.module, hidden.to(self.device))
                yield recorder.seen
                tokens -= hidden.shape[0] * hidden.shape[1]
                if tokens <= 0:
                    break
        finally:
            del attention.kv

    def scale_rows(self, name: str, scale: Tensor) -> None:
        """Multiply the outputs of a not yet encoded linear by scale [N]: weight rows and bias."""
        linear = self.linear(name)
        self.forget_moments(name)
        scale = scale.to(linear.weight.device, linear.weight.dtype)
        linear.weight.data = linear.weight * scale[:, None]
        if linear.bias is not None:
            linear.bias.data = linear.bias * scale

    def inputs_of(
        self, names: Sequence[str], module: nn.Module | None = None, stream: Iterable[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the inputs [B·T, K] of the named submodules, batch by batch, in float32.

        Names in the order in which the block runs them; a pass stops as soon as the last one's input is known.
        """
        module = module or self.module
        seen: dict[str, Tensor] = {}

        def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[name] = args[0]
                if name == names[-1]:
                    raise _Stop

            return record

        handles = [module.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names]
        try:
            for hidden in self.inputs if stream is None else stream:
                with suppress(_Stop):
                    self.forward(module, hidden.to(self.device))
                yield tuple(seen[name].flatten(0, -2).float() for name in names)
        finally:
            for handle in handles:
                handle.remove()

    def moments(self, name: str, fp8_activations: bool, with_reference: bool = False) -> Moments:
        """Second moments of the inputs of `name`; FP8-rounded where the layer will round its activations.

        with_reference: also the moments against the parent (`freeze_reference` must have been called), but for the
        FFN of a block with experts: the parent's tokens may go to others, or through a dense FFN.
        A routed expert that no token visits has moments of zero; ModelError for any other linear without tokens.
        """
        found = self._moments(name, fp8_activations, with_reference)
        if self.parking:
            self.parking.away(self.module, self.reference, self.parent)
        return found

    def _moments(self, name: str, fp8_activations: bool, with_reference: bool) -> Moments:
        if self.arch.is_routed(name):
            if name not in self._kept or self._kept_fp8 != fp8_activations:
                sums = routed_sums(self, name, fp8_activations)
                self._kept = {n: self._mean(n, total) for n, total in sums.items()}
                self._kept_fp8 = fp8_activations
            return self._kept.pop(name)
        with_reference = with_reference and self.arch.expert_of(name) is None
        return self._mean(name, sums_of(self, name, fp8_activations, with_reference))

    def _mean(self, name: str, sums: Sums) -> Moments:
        if sums.dropped:
            self.note(name, dropped_tokens=sums.dropped + self.report.get(name, {}).get("dropped_tokens", 0))
        if not sums.totals or (not sums.tokens and not self.arch.is_routed(name)):
            raise ModelError(f"{self.full_name(name)}: no finite calibration inputs; try --dtype float32")
        return sums.mean()

    def forget_moments(self, *names: str) -> None:
        """Drop kept moments that a change of these modules may reach: all without a name.

        What changes within an expert reaches that expert alone.
        """
        changed = {self.arch.expert_of(name) for name in names} or {None}
        self._kept = {n: m for n, m in self._kept.items() if not {None, self.arch.expert_of(n)} & changed}

    def fold(self, edge: Edge, scale: Tensor) -> None:
        """Move λ over `edge` (`fold_edge`). scale: λ [channels of the source], float32."""
        stored = self.storage[f"{edge.source}.weight"]
        if self.parking:
            self.parking.back(self.module)
        fold_edge(self.module, edge, scale.to(self.device, torch.float32), stored, self.sink_columns)
        self.forget_moments(edge.source, *edge.sinks)

    def sink_columns(self, edge: Edge, scale: Tensor) -> Tensor:
        """λ per source channel → λ per sink input column (repeats kv heads over their query group)."""
        if not edge.kv_group:
            return scale
        heads = scale.view(self.shape.n_kv_heads, self.shape.head_dim)
        return heads.repeat_interleave(self.shape.n_heads // self.shape.n_kv_heads, dim=0).flatten()
