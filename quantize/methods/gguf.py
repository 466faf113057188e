"""Weights fitted to llama.cpp's own blocks of 32, by error feedback and descent on their grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from quantize.block.measure import moments_of
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import factoring
from quantize.errors import ModelError
from quantize.formats.gguf.blocks import BLOCK, KINDS
from quantize.methods.encode import (
    Encode,
    encode_nearest,
    factor_hessian,
    fall_back,
    note_errors,
    take_targets,
)
from quantize.solvers.block_grid import block_grid
from quantize.solvers.feedback import Damped, descend, error_feedback

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments


class Blocks(Encode):
    """Blocks of 32 inputs with a float16 scale, as llama.cpp multiplies them (`format: gguf`)."""

    method: Literal["gguf"] = "gguf"
    type: Literal["q4_0", "q4_1", "q8_0"] = "q4_0"
    """`q4_0`: codes −8 … 7 times a scale, 4.5 bits; `q4_1`: codes 0 … 15 times a scale, plus a
    minimum, 5 bits; `q8_0`: codes −128 … 127 times a scale, 8.5 bits."""
    rounding: Literal["nearest", "descent"] = "descent"
    """`nearest`: scales with the least squared error of each block, without calibration text;
    `descent`: error feedback, then coordinate descent, in the Hessian's metric."""
    aim: Literal["parent", "layer"] = "parent"
    """`parent`: reproduce the parent's outputs from the quantized model's inputs; `layer`: this
    layer's own outputs."""
    damping: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the mean Hessian diagonal that is added to it; raised tenfold while the Hessian
    stays singular."""
    sweeps: int = Field(default=4, ge=0, le=100)
    """Rounds of coordinate descent over scales, minima and codes."""
    token_weights: TokenWeights = "sinks"
    """How much a token counts in the statistics. `attention`: by the attention that it receives in
    its layer, since its error reaches every token that looks at it; `sinks`: so where that is a
    sixteenth of all there is or more, as for BOS, the others the same; `equal`: all the same, as blocks without
    attention probabilities and routed experts have it anyway."""

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return KINDS[self.type].bits

    @property
    def blocks_field(self) -> str | None:
        """No other format has these blocks."""
        return "method"

    @property
    def needs_inputs(self) -> bool:
        """Rounding to nearest is data-free."""
        return self.rounding == "descent"

    @property
    def needs_parent(self) -> bool:
        """Aiming at the parent takes its activations along."""
        return self.rounding == "descent" and self.aim == "parent"

    def stored_bits(self, N: int, K: int) -> float:
        """Codes, scales and minima."""
        return KINDS[self.type].bits_per_weight

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """ModelError for inputs that blocks do not divide."""
        for name, (_, K) in linears.items():
            if self.selects(name) and K % BLOCK:
                raise ModelError(
                    f"{name}: {K} inputs are no multiple of the block {BLOCK}; add it to ignore"
                )

    def measure(self, block: Block, name: str) -> Moments | None:
        """Second moments of the inputs, unless the weights alone are rounded."""
        if not self.needs_inputs:
            return None
        return moments_of(
            block,
            name,
            False,
            with_parent=self.aim == "parent",
            token_weights=self.token_weights,
        )

    def fitting(self, N: int, K: int) -> int:
        """The factorization, or what stands beside the factor."""
        return (
            max(factoring(K, self.damping), 4 * K * K + 36 * N * K)
            if self.needs_inputs
            else 30 * N * K
        )

    def encode_group(self, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        """Encode linears that share one input; falls back to rounding (noted by layer) where the
        Hessian is unusable."""
        grid = block_grid(self.type)
        if moments is None:
            for name in names:
                weight = block.linear(name).weight.float()
                note_errors(block, name, weight, encode_nearest(block, name, grid, True, False))
            return
        usable = factor_hessian(block, names[0], moments, self.damping)
        if isinstance(usable, str):
            for name in names:
                fall_back(block, name, grid, False, usable)
            return
        targets = take_targets(block, names, moments, usable)
        for name in names:
            self._descend(block, name, targets.pop(name), moments, usable)

    def _descend(
        self, block: Block, name: str, target: Tensor, moments: Moments, usable: Damped
    ) -> None:
        weight, grid = block.linear(name).weight.float(), block_grid(self.type)
        scale, factor = grid.fit_scale(target, moments.hessian.diagonal())
        rounded, lost = error_feedback(target, usable, grid, scale, factor)
        with usable.metric(moments.hessian) as metric:
            rounded = descend(target, rounded, metric, grid, self.sweeps, lost)
        block.encode(name, grid.held(rounded.codes, rounded.scale), False)
        block.note(name, damping=usable.damping, dead_inputs=int(usable.dead.sum()))
        note_errors(block, name, weight, rounded.value(grid), moments.hessian)
