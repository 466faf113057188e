"""AWQ: scale salient input channels up before rounding (Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from quantize.block.measure import moments_of
from quantize.block.moments import too_few
from quantize.block.smoothing import (
    SAMPLED_ROWS,
    balance,
    column_absmean,
    per_source_channel,
    search,
)
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import BlockSizes
from quantize.formats.grouping import fitting_group
from quantize.methods.adaptation import Group
from quantize.methods.base import Kind, Stage
from quantize.pictures import Picture, block_map, facts
from quantize.solvers.grid import Grid

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.model.arch import Edge


class Awq(Stage):
    """Search λ = x̄^a / w̄^b per edge by the output error of the rounded
    sinks; never worse than λ = 1.

    x̄ and w̄ are the mean magnitudes of the sinks' inputs and weight columns.
    """

    kind: ClassVar[Kind] = "smooth"
    method: Literal["awq"] = "awq"
    bits: int = Field(default=4, ge=2, le=8)
    """Bits of the rounding that the search tries; set it to those of the encode stage."""
    group_size: Group = 128
    """Group of that rounding, -1: the whole row; where it does not divide the inputs, the one that
    encode stages take then."""
    grid: int = Field(default=20, ge=2, le=100)
    """Exponents a tried, evenly spaced in [0, 1)."""
    weight_exponents: tuple[float, ...] = (0.0, 1.0)
    """Exponents b tried, as factors of (1 − a): 0 is the paper's activation-only search."""
    tokens: int | None = Field(default=16384, ge=1024)
    """Calibration tokens that the search looks at, the first ones; null: all. Which exponent errs
    least shows on few. Routed experts, each of which sees a part, look at all."""
    token_weights: TokenWeights = "equal"
    """How much a token counts in the statistics. `attention`: by the attention that it receives in
    its layer, since its error reaches every token that looks at it; `sinks`: so where that is a
    sixteenth of all there is or more, as for BOS, the others the same; `equal`: all the same, as blocks without
    attention probabilities and routed experts have it anyway."""

    @property
    def tokens_read(self) -> int | None:
        """As `tokens`."""
        return self.tokens

    def room(self, sizes: BlockSizes) -> int:
        """The moments of an edge's inputs, a sample of rows in all the forms that a
        trial has, then new weights."""
        taken = [sizes.folding()]
        for group in sizes.groups:
            K = sizes.linears[group[0]][1]
            trial = sizes.moment_bytes(group[0], False) + 48 * SAMPLED_ROWS * K * len(group)
            taken += [sizes.measuring(group[0], False, False), trial]
        return max(taken)

    def apply(self, block: Block) -> None:
        """Search and fold every edge, in the order of the forward pass."""
        for edge in block.edges:
            norm = edge.source if edge.source_kind == "norm" else None
            sink = edge.sinks[0]
            moments = moments_of(
                block,
                sink,
                False,
                source=norm,
                tokens=self.tokens,
                token_weights=self.token_weights,
            )
            if too_little := too_few(block.arch, edge.sinks[0], moments):
                block.note(edge.name, search_ratio=1.0, left_alone=too_little)
                continue
            K = len(moments.hessian)
            rounding = Grid(self.bits, fitting_group(self.group_size, [K]) or K)
            candidates = self._candidates(block, edge, moments.absmean)
            scale, ratio = search(block, edge, candidates, moments.hessian, rounding)
            block.note(edge.name, search_ratio=ratio)
            if scale is not None:
                block.fold(edge, scale)

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """Show what the search gained at each edge."""
        gained = block_map(
            facts(layers, "search_ratio"),
            title="Gain of the scale search",
            caption="Output error of an edge's linears, rounded to nearest, with the scales found over that with none: "
            "less is better, 1 means that no scale helped and the edge was left alone. Measured "
            "on the calibration text while searching, before the encode stages.",
            unit="error after / before",
        )
        return () if gained is None else (gained,)

    def _candidates(self, block: Block, edge: Edge, absmean: Tensor) -> Iterator[Tensor]:
        columns = column_absmean(block, edge)
        x = per_source_channel(block, edge, absmean).clamp_min(1e-4 * float(absmean.mean()) + 1e-30)
        w = per_source_channel(block, edge, columns).clamp_min(1e-4 * float(columns.mean()) + 1e-30)
        for step in range(self.grid):
            a = step / self.grid
            for b in self.weight_exponents:
                yield balance(x**a / w ** (b * (1 - a)))
