"""Proof, on a block's own weights, that what may move leaves the block's function as it is.

Each candidate (`derive`) is tried once with random diagonals on random hidden states: the block's
output must stay the same. Diagonals are powers of two, which floating point multiplies and divides by
without rounding, so that a weight that is taken back is bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantize.model.arch import Architecture, Edge, Heads, RopeLayout, Rows
from quantize.model.fold import head_columns, scale_edge, scale_outputs
from quantize.model.rope import partners
from quantize.model.stream import Stream

Forward = Callable[[nn.Module, Tensor], Tensor]

TOLERANCE = 1e-5
"""Largest change of a block's output, relative to its largest change of the stream."""
_TOKENS = 12
# Hidden states as a norm leaves them, and far larger ones, which reach what is clamped.
_SIZES = (1.0, 30.0)
_POWERS = (-6, 7)
"""Diagonals are 2^n, n from −6 up to 6: what is clamped is reached."""


@dataclass(frozen=True)
class Proof:
    """What was proved of a block."""

    arch: Architecture
    """The architecture without what was not."""
    dropped: Mapping[str, str]
    """What cannot move (name of an edge, or `rotary pairs`) → why."""


def prove(
    arch: Architecture, module: nn.Module, forward: Forward, stream: Stream, seed: int = 0
) -> Proof:
    """Try all candidates of a block whose weights are in memory, and take them back.

    forward: runs the block on what goes through the model, as `stream` says: hidden states [1, T, D]
    in most. Powers of two leave rounding as it is, so that the proof holds in 16 bits, too.
    """
    generator = torch.Generator().manual_seed(seed)
    trial = _Trial(arch, module, forward, stream, generator)
    dropped: dict[str, str] = {}
    kept = []
    # All at once first: mostly they hold, and a block is run once.
    if trial.holds([trial.over(edge) for edge in arch.edges]):
        kept = list(arch.edges)
    else:
        for edge in arch.edges:
            if trial.holds([trial.over(edge)]):
                kept.append(edge)
            else:
                dropped[edge.name] = _reason(edge)
    rope, heads = arch.rope, arch.heads
    if heads is not None:
        layout = _layout(trial, arch, heads)
        rope = layout or rope
        if layout is None:
            heads = replace(heads, scores=False)
            dropped["rotary pairs"] = (
                "scaling a pair of channels of keys against queries changes what the block computes"
            )
    return Proof(replace(arch, edges=tuple(kept), rope=rope, heads=heads), dropped)


def _reason(edge: Edge) -> str:
    sinks = ", ".join(edge.sinks[:3]) + (" …" if len(edge.sinks) > 3 else "")
    return f"moving a diagonal from {edge.source} to {sinks} changes what the block computes"


def _layout(trial: _Trial, arch: Architecture, heads: Heads) -> RopeLayout | None:
    """How channels rotate, by which pairs may be scaled; None where none may."""
    if heads.query is None or heads.key is None:
        return None
    layouts: tuple[RopeLayout, ...] = ("half-split", "interleaved")
    return next((layout for layout in layouts if trial.holds([trial.pairs(layout, heads)])), None)


Change = tuple[Callable[[], None], Callable[[], None]]
"""What is tried, and what takes it back."""


class _Trial:
    """Runs a block before and after changes."""

    def __init__(
        self,
        arch: Architecture,
        module: nn.Module,
        forward: Forward,
        stream: Stream,
        generator: torch.Generator,
    ) -> None:
        self._arch, self._module, self._forward = arch, module, forward
        self._generator, self._stream = generator, stream
        first = next(module.parameters())
        device, dtype = first.device, first.dtype
        self._inputs = [
            stream.scaled(stream.draw(1, _TOKENS, generator, dtype), size).to(device)
            for size in _SIZES
        ]
        self._wanted = list(self._outputs())

    def _outputs(self) -> Iterator[Tensor]:
        for given in self._inputs:
            with torch.no_grad():
                yield self._forward(self._module, given).float()

    def holds(self, changes: Sequence[Change]) -> bool:
        """Whether the block computes the same with all of these changes; they are taken back."""
        for apply, _ in changes:
            apply()
        try:
            outputs = list(self._outputs())
        finally:
            for _, undo in reversed(changes):
                undo()
        return all(
            _same(now, before, self._stream.states_of(before - given))
            for now, before, given in zip(outputs, self._wanted, self._inputs, strict=True)
        )

    def _powers(self, *size: int) -> Tensor:
        draw = torch.randint(*_POWERS, size, generator=self._generator)
        return torch.exp2(draw.float())

    def over(self, edge: Edge) -> Change:
        """Move random powers of two over an edge."""
        source = self._module.get_submodule(edge.source).get_parameter("weight")
        first, end = edge.rows or (0, len(source))
        scale = self._powers(end - first).to(source.device)
        touched = [
            p
            for name in (edge.source, *edge.sinks)
            for p in self._module.get_submodule(name)._parameters.values()
            if p is not None
        ]
        columns = scale
        if edge.kv_group:
            assert self._arch.heads is not None
            columns = head_columns(scale, self._arch.heads)
        return self._change(
            touched, lambda: scale_edge(self._module, edge, scale, columns, edge.offset)
        )

    def pairs(self, layout: RopeLayout, heads: Heads) -> Change:
        """Scale pairs of keys, and queries against them."""
        partner = partners(layout, heads.head_dim, heads.rotary_dim)
        free = self._powers(heads.head_dim)
        scale = free[torch.minimum(partner, torch.arange(heads.head_dim))]
        assert heads.query is not None
        assert heads.key is not None
        rows = [heads.query, heads.key]
        counts, norms = (heads.n_heads, heads.n_kv_heads), self._arch.qk_norm
        if norms is not None:
            rows, counts = [Rows(name, 0, heads.head_dim) for name in norms], (1, 1)
        modules = [self._module.get_submodule(one.linear) for one in rows]
        touched = [p for m in modules for p in m._parameters.values() if p is not None]
        offset = 0.0 if norms is None else self._arch.qk_offset

        def apply() -> None:
            for module, one, count, factor in zip(
                modules, rows, counts, (1 / scale, scale), strict=True
            ):
                scaled = factor.repeat(count).to(touched[0].device)
                scale_outputs(module, scaled, one.first, one.end, offset)

        return self._change(touched, apply)

    @staticmethod
    def _change(touched: Sequence[nn.Parameter], apply: Callable[[], None]) -> Change:
        kept: list[Tensor] = []

        def begin() -> None:
            kept[:] = [parameter.data for parameter in touched]
            try:
                apply()
            except RuntimeError:  # sizes that do not fit: no such move
                for parameter, data in zip(touched, kept, strict=True):
                    parameter.data = data
                for parameter in touched:
                    parameter.data = torch.full_like(parameter.data, float("nan"))

        def undo() -> None:
            for parameter, data in zip(touched, kept, strict=True):
                parameter.data = data

        return begin, undo


def _same(now: Tensor, before: Tensor, change: Tensor) -> bool:
    # What the block adds is compared, not the stream, beside which it may be small.
    return bool((now - before).abs().max() <= TOLERANCE * change.abs().max())
