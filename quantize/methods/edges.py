"""What stages share that choose a scale for every edge of a block: norm and linears, or linear and linear."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from quantize.block.measure import moments_of
from quantize.block.moments import Moments, too_few
from quantize.block.smoothing import SAMPLED_ROWS
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import BlockSizes
from quantize.formats.grouping import fitting_group
from quantize.methods.adaptation import Group
from quantize.methods.base import Kind, Stage
from quantize.pictures import Picture, block_map, facts
from quantize.solvers.grid import Grid
from quantize.threads import few_threads

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.block.block import Block
    from quantize.model.arch import Edge


class EdgeStage(Stage):
    """Choose λ per edge by the moments of its sinks' input, in the order of the forward pass."""

    kind: ClassVar[Kind] = "smooth"
    rounded: ClassVar[str]
    """How the search rounds, in words."""
    bits: int = Field(default=4, ge=2, le=8)
    """Bits of the rounding that the search tries; set it to those of the encode stage."""
    group_size: Group = 128
    """Group of that rounding, -1: the whole row; where it does not divide the inputs, the one that
    encode stages take then."""
    tokens: int | None = Field(default=16384, ge=1024)
    """Calibration tokens that the search looks at, the first ones; null: all. Which scale errs
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

    @abstractmethod
    def choose(
        self, block: Block, edge: Edge, moments: Moments, rounding: Grid
    ) -> tuple[Tensor | None, float]:
        """λ per source channel, None for an edge that is better left alone, and the error with it
        relative to that without."""

    def trying(self, K: int) -> int:
        """Bytes that a choice takes for every K inputs, beside moments and a sample of rows."""
        return 0

    def room(self, sizes: BlockSizes) -> int:
        """The moments of an edge's inputs, a sample of rows in all the forms that a
        trial has, then new weights."""
        taken = [sizes.folding()]
        weighing = sizes.weighing() if self.token_weights != "equal" else 0
        for group in sizes.groups:
            K = sizes.linears[group[0]][1]
            trial = sizes.moment_bytes(group[0], False) + 48 * SAMPLED_ROWS * K * len(group)
            measuring = sizes.measuring(group[0], False, False) + weighing
            taken += [measuring, trial + self.trying(K)]
        return max(taken)

    def apply(self, block: Block) -> None:
        """Choose for every edge and fold what was chosen."""
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
            with few_threads(moments.hessian, *(block.linear(name).weight for name in edge.sinks)):
                scale, ratio = self.choose(block, edge, moments, rounding)
            block.note(edge.name, search_ratio=ratio)
            if scale is not None:
                block.fold(edge, scale)

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """Show what the search gained at each edge."""
        gained = block_map(
            facts(layers, "search_ratio"),
            title="Gain of the scale search",
            caption=f"Output error of an edge's linears, {self.rounded}, with the scales found over that with none: "
            "less is better, 1 means that no scale helped and the edge was left alone. Measured "
            "on the calibration text while searching, before the encode stages.",
            unit="error after / before",
        )
        return () if gained is None else (gained,)
