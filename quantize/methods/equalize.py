"""Equalization: channel scales under which error feedback leaves the least error on a grid."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantize.block.smoothing import (
    balance,
    column_absmean,
    per_source_channel,
    sampled_rows,
    source_sizes,
)
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import factoring
from quantize.methods.edges import EdgeStage
from quantize.solvers.equalization import Feedback, equalize, feedback_error
from quantize.solvers.grid import Grid

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments
    from quantize.model.arch import Edge


# How much of what feedback can make up for it is taken to, and what norm of its weights a group's step is taken to
# follow. On linears of a Gemma 3 270M each of the four is the best somewhere, by up to 8 %.
_REACHES = (1.0, 0.5)
_NORMS = (8, 16)


class Equalize(EdgeStage):
    """Minimize per edge what rounding with error feedback costs, over λ; never worse than λ = 1.

    A group's step follows a p-norm of its weights, and a channel's error counts by the part of its input
    that no other channel tells, since error feedback makes up for the rest. Unlike AWQ's search, which tries
    powers of two means by rounding to nearest, every channel has a scale of its own. What minimizes the model of
    the error is then rounded with feedback, and the best taken.
    """

    method: Literal["equalize"] = "equalize"
    damping: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the mean Hessian diagonal that is added to it before it is inverted."""

    token_weights: TokenWeights = "sinks"
    """How much a token counts in the statistics. `attention`: by the attention that it receives in
    its layer, since its error reaches every token that looks at it; `sinks`: so where that is a
    sixteenth of all there is or more, as for BOS, the others the same; `equal`: all the same, as blocks without
    attention probabilities and routed experts have it anyway."""

    rounded: ClassVar[str] = "rounded with error feedback"

    def choose(
        self, block: Block, edge: Edge, moments: Moments, rounding: Grid
    ) -> tuple[Tensor | None, float]:
        """The scale found, where it errs less than none."""
        hessian = moments.hessian
        columns = partial(block.sink_columns, edge)
        start = 1 / source_sizes(block, edge, column_absmean(block, edge))
        feedback = Feedback.of(hessian, columns(start), self.damping)
        if feedback is None:
            return None, 1.0
        sample = sampled_rows(block, edge, hessian)
        weights = [block.linear(name).weight for name in sample]
        sources = partial(per_source_channel, block, edge)
        tried = [torch.ones_like(start), balance(start)]
        tried += [
            balance(
                equalize(
                    weights,
                    feedback.left(reach),
                    rounding.group_size,
                    norm,
                    start,
                    columns,
                    sources,
                )
            )
            for reach in _REACHES
            for norm in _NORMS
        ]
        errors = block.ranks.numbers(
            [
                partial(
                    feedback_error, sample.values(), columns(scale), feedback, hessian, rounding
                )
                for scale in tried
            ]
        )
        lowest = min(range(len(tried)), key=errors.__getitem__)
        return (tried[lowest], errors[lowest] / errors[0]) if lowest else (None, 1.0)

    def trying(self, K: int) -> int:
        """The balanced Hessian and what its factorization takes, or the factor and that under a scale."""
        return 4 * K * K + factoring(K, self.damping)
