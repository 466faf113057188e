"""GPTQ: error feedback through the inverse Hessian (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from quantize.block.measure import moments_of
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import factoring
from quantize.methods.encode import IntEncode, factor_hessian, fall_back, note_errors
from quantize.solvers.feedback import error_feedback, undamped

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments


class Gptq(IntEncode):
    """Quantize column by column and spread each column's error over the columns still to come."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(default=0.01, gt=0, le=1)
    """Fraction of the mean Hessian diagonal that is added to it; raised tenfold while
    the Hessian stays singular."""
    order: Literal["natural", "activation"] = "activation"
    """`activation`: columns with the largest inputs first; groups and their
    scales stay in natural order."""
    clip: Literal["absmax", "mse"] = "mse"
    """`absmax`: the group's largest weight fits; `mse`: clip where that lowers
    the group's squared error."""
    token_weights: TokenWeights = "sinks"
    """How much a token counts in the statistics. `attention`: by the attention that it receives in
    its layer, since its error reaches every token that looks at it; `sinks`: so where that is a
    sixteenth of all there is or more, as for BOS, the others the same; `equal`: all the same, as blocks without
    attention probabilities and routed experts have it anyway."""

    def measure(self, block: Block, name: str) -> Moments:
        """Second moments of the inputs."""
        return moments_of(block, name, self.fp8, token_weights=self.token_weights)

    def fitting(self, N: int, K: int) -> int:
        """The factorization, or what stands beside the factor."""
        return max(factoring(K, self.damping), 4 * K * K + 25 * N * K)

    def encode_group(self, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        """Encode linears that share one Hessian; falls back to rounding (noted by
        layer) where it is unusable."""
        assert moments is not None
        usable = factor_hessian(block, names[0], moments, self.damping, self.order)
        for name in names:
            grid = self.grid(block, name)
            if isinstance(usable, str):
                fall_back(block, name, grid, self.fp8, usable)
                continue
            weight = block.linear(name).weight.float()
            scale, factor = (
                grid.fit_scale(weight) if self.clip == "mse" else grid.absmax_scale(weight)
            )
            rounded, lost = error_feedback(weight, usable, grid, scale, factor)
            value = rounded.value(grid)
            block.encode(name, grid.pack(rounded.codes, rounded.scale), self.fp8)
            block.note(name, damping=usable.damping, dead_inputs=int(usable.dead.sum()))
            lost = undamped(lost, value - weight, usable)
            note_errors(block, name, weight, value, moments.hessian, float(lost.sum()))
