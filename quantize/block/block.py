"""One decoder block during conversion: its weights, its calibration inputs,
and how they may be changed.

What is measured on a block stands in `capture` and `measure`, what it learns from in
`teacher`, trials in `standin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.block.folding import fold_edge
from quantize.block.histogram import code_histogram
from quantize.block.moments import Moments
from quantize.block.passes import HeldPasses
from quantize.cost.peak import Cost
from quantize.errors import ModelError
from quantize.files.memo import Memo
from quantize.files.offload import Parking
from quantize.formats.scheme import Packed
from quantize.model.arch import Architecture, Edge, Rows, Shape
from quantize.model.fold import head_columns, scale_outputs
from quantize.model.hadamard import (
    apply_hadamard,
    keep_rotation,
    let_rotate_inputs,
    rotates_inputs,
    widen,
)
from quantize.model.linear import PackedLinear
from quantize.model.moe import MoeFfn
from quantize.model.stream import Stream
from quantize.parallel.ranks import ALONE, Ranks
from quantize.threads import spare_threads

Forward = Callable[[nn.Module, Tensor], Tensor]
"""Runs one decoder layer on hidden states [B, T, D] with the masks and rotary
tables of that batch shape."""


@dataclass
class Block:
    """A decoder layer whose linears are being transformed in place.

    `inputs` holds the hidden states [B, T, D] that reach this block through the
    already quantized blocks, `parent_inputs` those of the parent model (None when
    no stage of the recipe needs them).
    """

    index: int
    arch: Architecture
    shape: Shape
    module: nn.Module
    storage: dict[str, torch.dtype]
    """Dtype of every tensor of the block in the source checkpoint."""
    forward: Forward
    inputs: MutableSequence[Tensor]
    parent_inputs: MutableSequence[Tensor] | None
    device: torch.device
    stream: Stream | None = None
    """What goes from block to block; None: hidden states [B, T, D] alone."""
    keeps_post_scales: bool = False
    """Whether the checkpoint's format can hold post-RoPE scales."""
    packed: dict[str, Packed] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    """Weights in units of their group's scale, by encoded linear (`code_histogram`)."""
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    frozen: nn.Module | None = None
    """The layer that encode stages aim at, see `teacher.freeze_layer`."""
    parent: nn.Module | None = None
    """The layer before a stage restructured it: the parent's stream goes on through it."""
    parent_arch: Architecture | None = None
    """The parent's row: of a dense block, where experts took the place of its FFN."""
    parking: Parking | None = None
    """Puts the block's matrices away while a linear is being fitted;
    None: all stay on the device."""
    memo: Memo = field(default_factory=lambda: Memo(None))
    ranks: Ranks = ALONE
    """The processes that convert the block together."""
    unproved: dict[str, str] = field(default_factory=dict)
    """What was taken to move without changing the block's function, and does not → why."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """What single parts took, for those who wait; no part of the reproducible output."""
    waiting: dict[str, Moments] = field(default_factory=dict)
    """Moments of routed experts that were measured along with another's, until
    they are used (`moments_of`)."""
    waiting_fp8: bool = False
    """Whether these are of inputs rounded to E4M3."""
    tell: Callable[[str], None] = lambda name: None
    """Called with the name of each linear that was encoded: for those who watch."""
    holds: int = 0
    """Passes of each stream that may stand still on the way through the block (`HeldPasses`)."""
    token_weights: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)
    """Attention that the tokens [B·T] of a batch receive, by what it was asked for and the batch
    (`weights_of`)."""
    _passes: dict[str, HeldPasses] = field(default_factory=dict)

    def linear(self, name: str) -> nn.Linear:
        """The not yet encoded linear `name` (relative to the block)."""
        module = self.module.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"block {self.index}: {name} was encoded twice; give every layer to one encode "
                "stage"
            )
        if self.parking:
            self.parking.back(module)
        return module

    def full_name(self, name: str) -> str:
        """Name of a module of this block within the model."""
        return f"{self.arch.blocks}.{self.index}.{name}"

    def states_of(self, stream: Tensor) -> Tensor:
        """The hidden states alone [B, T, ·] of what enters or leaves the block."""
        return stream if self.stream is None else self.stream.states_of(stream)

    def note(self, name: str, **facts: Any) -> None:
        """Record facts about a linear for the provenance and the report."""
        self.report.setdefault(name, {}).update(facts)

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
        self.storage = {
            name: dtype for name, dtype in self.storage.items() if not name.startswith(f"{place}.")
        }
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
        self.tell(name)

    @property
    def parent_stream(self) -> MutableSequence[Tensor]:
        """The parent's hidden states where they are carried along, else the block's own."""
        return self.inputs if self.parent_inputs is None else self.parent_inputs

    @property
    def passes(self) -> HeldPasses:
        """The passes of `inputs` through the layer."""
        return self._held("own", self.module)

    @property
    def parent_passes(self) -> HeldPasses:
        """The passes of the parent's hidden states through what encode stages aim at."""
        return self._held("parent's", self.frozen or self.module)

    def _held(self, whose: str, layer: nn.Module) -> HeldPasses:
        held = self._passes.get(whose)
        if held is None or held.layer is not layer:
            recorded = self.arch.residual.values()
            # A copy that encoding leaves alone; matrices that are put away meanwhile would be missed.
            aside = layer is self.frozen and self.device.type == "cpu" and self.parking is None
            held = self._passes[whose] = HeldPasses(
                self.forward, layer, recorded, self.holds, spare_threads() if aside else 0
            )
        return held

    def look_ahead(self, name: str, stream: Iterable[Tensor]) -> None:
        """Let the parent's passes of these batches, which stand before the linear `name`, go on to the next
        one that is measured against the parent, or to the end, while linears are fitted."""
        order = [
            group for group in self.arch.calibration_order if self.arch.expert_of(group[0]) is None
        ]
        place = next((i for i, group in enumerate(order) if name in group), len(order))
        behind = order[place + 1][0] if place + 1 < len(order) else None
        goes_on = self.parent is None and self.index + 1 < self.shape.n_blocks
        if behind is not None or goes_on:
            self.parent_passes.go_ahead(stream, behind)

    @property
    def versions(self) -> Iterator[tuple[nn.Module, Architecture]]:
        """The layer with its row, and the parent's where one is kept: what a
        change of basis must reach."""
        yield self.module, self.arch
        if self.parent is not None and self.parent_arch is not None:
            yield self.parent, self.parent_arch

    def rounded_sinks(self, edge: Edge) -> list[str]:
        """Sinks of an edge that encode stages may round: all but routers."""
        return [sink for sink in edge.sinks if sink in self.arch.roles]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Edges over which a diagonal may still move: none leads into inputs
        that are rotated on the way."""
        return tuple(
            edge
            for edge in self.arch.edges
            if not any(self.rotates_inputs(sink) for sink in edge.sinks)
        )

    @property
    def rotary_dim(self) -> int:
        """Leading channels of a head that RoPE rotates."""
        assert self.arch.heads is not None
        return self.arch.heads.rotary_dim

    def find_edge(self, name: str) -> Edge | None:
        """The edge of that name, where a diagonal may still move over it."""
        return next((edge for edge in self.edges if edge.name == name), None)

    def rotates_inputs(self, name: str) -> bool:
        """Whether the linear rotates its inputs at run time."""
        return rotates_inputs(self.module.get_submodule(name))

    def rotate_inputs(self, name: str) -> None:
        """Let a not yet encoded linear rotate its inputs at run time, by the
        Hadamard matrix of their number K.

        Its columns are rotated to match. ModelError where there is no such matrix.
        """
        linear = self.linear(name)
        try:
            let_rotate_inputs(linear)
        except ValueError as err:
            raise ModelError(f"{self.full_name(name)}: {err}") from None
        linear.weight.data = apply_hadamard(widen(linear.weight)).to(linear.weight.dtype)
        self.forget_moments(name)

    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the hidden states that enter the block, batch by batch, the parent's too."""
        for stream in (self.inputs, self.parent_inputs or []):
            for batch, hidden in enumerate(stream):
                stream[batch] = change(hidden)
        self.forget_moments()

    def attend_with(self, kv: nn.Module) -> None:
        """Let the block attend through `kv` (a KvAttention) from now on; the checkpoint
        stores it with the block."""
        self.forget_moments()
        self.module.get_submodule(self.arch.attention).kv = kv.to(self.device)

    def scale_rows(self, rows: Rows, scale: Tensor) -> None:
        """Multiply outputs of a not yet encoded linear by scale [N]: weight rows and bias."""
        linear = self.linear(rows.linear)
        self.forget_moments(rows.linear)
        scale_outputs(linear, scale.to(linear.weight.device), rows.first, rows.end)

    def forget_moments(self, *names: str) -> None:
        """Drop waiting moments, and held passes, that a change of these modules may reach: all
        without a name.

        What changes within an expert reaches that expert alone.
        """
        for held in self._passes.values():
            if held.layer is self.module or not names:
                held.changed(names)
        changed = {self.arch.expert_of(name) for name in names} or {None}
        self.waiting = {
            n: m for n, m in self.waiting.items() if not {None, self.arch.expert_of(n)} & changed
        }

    def fold(self, edge: Edge, scale: Tensor) -> None:
        """Move λ over `edge` (`fold_edge`). scale: λ [channels of the source], float32."""
        stored = self.storage[f"{edge.source}.weight"]
        if self.parking:
            self.parking.back(self.module)
        fold_edge(
            self.module, edge, scale.to(self.device, torch.float32), stored, self.sink_columns
        )
        self.forget_moments(edge.source, *edge.sinks)

    def sink_columns(self, edge: Edge, scale: Tensor) -> Tensor:
        """λ per source channel → λ per sink input column (repeats kv
        heads over their query group)."""
        if not edge.kv_group:
            return scale
        assert self.arch.heads is not None
        return head_columns(scale, self.arch.heads)
