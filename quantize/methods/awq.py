"""AWQ: scale salient input channels up before rounding (Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from quantize.block.smoothing import balance, column_absmean, search, source_sizes
from quantize.methods.edges import EdgeStage
from quantize.solvers.grid import Grid

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments
    from quantize.model.arch import Edge


class Awq(EdgeStage):
    """Search λ = x̄^a / w̄^b per edge by the output error of the rounded
    sinks; never worse than λ = 1.

    x̄ and w̄ are the mean magnitudes of the sinks' inputs and weight columns.
    """

    method: Literal["awq"] = "awq"
    grid: int = Field(default=20, ge=2, le=100)
    """Exponents a tried, evenly spaced in [0, 1)."""
    weight_exponents: tuple[float, ...] = (0.0, 1.0)
    """Exponents b tried, as factors of (1 − a): 0 is the paper's activation-only search."""

    rounded: ClassVar[str] = "rounded to nearest"

    def choose(
        self, block: Block, edge: Edge, moments: Moments, rounding: Grid
    ) -> tuple[Tensor | None, float]:
        """The best of all exponents."""
        return search(
            block, edge, self._candidates(block, edge, moments.absmean), moments.hessian, rounding
        )

    def _candidates(self, block: Block, edge: Edge, absmean: Tensor) -> Iterator[Tensor]:
        x = source_sizes(block, edge, absmean)
        w = source_sizes(block, edge, column_absmean(block, edge))
        for step in range(self.grid):
            a = step / self.grid
            for b in self.weight_exponents:
                yield balance(x**a / w ** (b * (1 - a)))
