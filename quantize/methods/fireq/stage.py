"""FireQ's INT4 weights for FP8 activations (arXiv 2505.20839), rounded on the grid
that the tensor core sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from quantize.block.measure import moments_of
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import factoring
from quantize.formats.fp8 import E4M3_MAX, e4m3
from quantize.methods.encode import (
    IntEncode,
    encode_nearest,
    factor_hessian,
    fall_back,
    note_errors,
    take_targets,
)
from quantize.pictures import Picture, block_map, facts
from quantize.solvers.feedback import Damped, descend, error_feedback
from quantize.solvers.grid import Grid, group_absmax

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments

_E4M3_MIN = 2.0**-9  # the smallest subnormal: what a group scale must not fall below
# 2¹⁴ lifts even a group whose largest weight is 10⁻⁶ above underflow.
_MAX_LOG2 = 14
_SEEN = (
    "Relative output error over relative weight error. Below 1 the rounding error lies in "
    "directions that the inputs rarely take, which is what error feedback and descent are for. "
    "Measured on the calibration text."
)
_DAMPING = "Added to the Hessian's diagonal; above the recipe's value where the Hessian stayed singular with less."
_DEAD = "Input channels that were zero on all calibration tokens; their weights are rounded without any evidence."
_SCALE = "The paper's power of two by which a tensor's group scales are multiplied so that E4M3 does not lose them."


class Fireq(IntEncode):
    """INT4 weights whose group scales, code book and inputs are those of the INT4×FP8 kernel.

    With `activations: none` the same solver works on the plain integer grid.
    """

    method: Literal["fireq"] = "fireq"
    activations: Literal["none", "fp8"] = "fp8"
    """`fp8`: dynamic per-token E4M3 activations (W4A8-FP8); `none`: 16-bit activations (W4A16)."""
    rounding: Literal["nearest", "descent"] = "descent"
    """`nearest`: the paper's; `descent`: error feedback, then coordinate
    descent, in the Hessian's metric."""
    scales: Literal["row", "tensor", "bf16"] = "row"
    """Group scales of an FP8 layer: E4M3 under a per-row factor, E4M3 under a per-tensor power of
    two (the paper's σ_FP8 with its search for t), or bfloat16 (σ_BF16). With 16-bit activations
    scales are always bfloat16."""
    aim: Literal["parent", "layer"] = "parent"
    """`parent`: reproduce the parent's outputs from the quantized model's inputs; `layer`:
    this layer's own outputs."""
    damping: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the mean Hessian diagonal that is added to it; raised tenfold
    while the Hessian stays singular.
    Far more than GPTQ's customary 0.01: a solver that descends further, and corrects for drift, fits the
    calibration text too closely without it."""
    signed_scales: bool = True
    """Whether descent may choose negative group scales, which give the code −2^(bits−1) to the side of a
    group that needs it; false: for engines that take none."""
    sweeps: int = Field(default=4, ge=0, le=100)
    """Rounds of coordinate descent over scales and codes."""
    token_weights: TokenWeights = "sinks"
    """How much a token counts in the statistics. `attention`: by the attention that it receives in
    its layer, since its error reaches every token that looks at it; `sinks`: so where that is a
    sixteenth of all there is or more, as for BOS, the others the same; `equal`: all the same, as blocks without
    attention probabilities and routed experts have it anyway."""

    @model_validator(mode="after")
    def _descent_has_row_scales(self) -> Self:
        if self.rounding == "descent" and self.scales != "row":
            raise ValueError(
                f"scales: {self.scales} is the paper's and goes with rounding: nearest; use "
                "scales: row"
            )
        return self

    @property
    def needs_inputs(self) -> bool:
        """Rounding to nearest is data-free."""
        return self.rounding == "descent"

    @property
    def needs_parent(self) -> bool:
        """Aiming at the parent takes its activations along."""
        return self.rounding == "descent" and self.aim == "parent"

    def measure(self, block: Block, name: str) -> Moments | None:
        """Second moments of the inputs, unless the weights alone are rounded."""
        return (
            moments_of(
                block,
                name,
                self.fp8,
                with_parent=self.aim == "parent",
                token_weights=self.token_weights,
            )
            if self.needs_inputs
            else None
        )

    def fitting(self, N: int, K: int) -> int:
        """The factorization, or what stands beside the factor."""
        return (
            max(factoring(K, self.damping), 4 * K * K + 40 * N * K)
            if self.needs_inputs
            else 24 * N * K
        )

    def encode_group(self, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        """Encode linears that share one input."""
        if moments is None:
            for name in names:
                self._nearest(block, name)
            return
        usable = factor_hessian(block, names[0], moments, self.damping)
        if isinstance(usable, str):
            for name in names:
                fall_back(block, name, self._grid(block, name), self.fp8, usable)
            return
        targets = take_targets(block, names, moments, usable)
        for name in names:
            self._descend(block, name, targets.pop(name), moments, usable)

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """Show what the descent buys and where it met trouble; for the paper's rounding,
        the scales against underflow.

        Damping that was never raised and inputs that are all alive make no picture.
        """
        weight, damping = facts(layers, "weight_error"), facts(layers, "damping")
        seen = {
            n: e / w if (w := weight.get(n)) and e is not None else None
            for n, e in _errors(layers).items()
        }
        raised = any(d is not None and d > self.damping for d in damping.values())
        dead = facts(layers, "dead_inputs")
        dead = dead if any(dead.values()) else {}
        drawn = (
            block_map(
                seen,
                title="Share of the weight error that inputs see",
                caption=_SEEN,
                unit="ratio",
                log=True,
            ),
            block_map(
                damping if raised else {},
                title="Damping",
                caption=_DAMPING,
                unit="of the mean",
                log=True,
            ),
            block_map(dead, title="Dead inputs", caption=_DEAD, unit="channels"),
            block_map(
                facts(layers, "tensor_scale"),
                title="Scale t against underflow",
                caption=_SCALE,
                log=True,
            ),
        )
        return tuple(picture for picture in drawn if picture is not None)

    def _grid(self, block: Block, name: str) -> Grid:
        return self.grid(block, name, product=self.fp8, signed=self.signed_scales)

    def _nearest(self, block: Block, name: str) -> None:
        weight = block.linear(name).weight.float()
        if not self.fp8 or self.scales != "tensor":
            # The paper rounds to q·s and leaves the kernel's second rounding, to E4M3(q·s), out.
            grid = self.grid(block, name, fp8_scales=self.fp8 and self.scales == "row")
            quantized = encode_nearest(block, name, grid, False, self.fp8)
        else:
            grid = Grid(self.bits, self.group_size)
            factor = tensor_scale(weight, self.group_size)
            absmax = group_absmax(weight, self.group_size)
            scale = e4m3(absmax * factor / grid.qmax).clamp_min(_E4M3_MIN) / factor
            codes, quantized = grid.round(weight, scale, torch.ones_like(scale[:, :1]))
            block.encode(name, grid.pack(codes, scale), self.fp8)
            block.note(name, tensor_scale=factor)
        note_errors(block, name, weight, quantized)

    def _descend(
        self, block: Block, name: str, target: Tensor, moments: Moments, usable: Damped
    ) -> None:
        weight = block.linear(name).weight.float()
        hessian, grid = moments.hessian, self._grid(block, name)
        scale, factor = grid.fit_scale(target, hessian.diagonal())
        rounded, lost = error_feedback(target, usable, grid, scale, factor)
        with usable.metric(moments.hessian) as metric:
            rounded = descend(target, rounded, metric, grid, self.sweeps, lost)
        block.encode(name, grid.pack(rounded.codes, rounded.scale), self.fp8)
        block.note(name, damping=usable.damping, dead_inputs=int(usable.dead.sum()))
        note_errors(block, name, weight, rounded.value(grid), hessian)


def _errors(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float | int | None]:
    # Only layers that this method encoded: every one of them has its damping on record.
    return facts(
        {name: found for name, found in layers.items() if "damping" in found}, "output_error"
    )


def tensor_scale(weight: Tensor, group_size: int) -> float:
    """The paper's per-tensor scale t against underflow of E4M3 group scales.

    Searches t = 2^i, i = 0 … 14, while no group's max|w|·t exceeds 448; the cost is how far
    max|w|·t falls below 7·2⁻⁹, summed over groups; ties go to the smallest t. weight: [N, K].
    """
    absmax = group_absmax(weight, group_size)
    best, best_cost = 1.0, math.inf
    for i in range(_MAX_LOG2 + 1):
        t = 2.0**i
        if float(absmax.max()) * t > E4M3_MAX:
            break
        cost = float((7 * _E4M3_MIN - absmax * t).clamp_min(0).sum())
        if cost < best_cost:
            best, best_cost = t, cost
    return best
