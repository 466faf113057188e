"""Stages of other papers, for rows to compare with: QQQ's smoothing, and block floating point.

They are no part of `pq`: a recipe cannot name them, and what block floating point makes is written
in 16 bits, with the numbers that the packed form would hold.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.moments import Moments
from quantize.formats.fp8 import quantize_activations
from quantize.methods.base import Kind, Stage
from quantize.methods.encode import note_errors
from quantize.methods.fireq.stage import Fireq
from quantize.model.arch import Edge
from quantize.solvers.feedback import Damped, damp, descend, error_feedback, feedback_order
from quantize.solvers.grid import Grid, better_scale, group_absmax

_SEEN = 16384
"""Calibration tokens whose largest inputs count, as many as `awq` looks at."""
_TRIED = 256
"""Of these, spread over them, those on which thresholds are compared."""


def round_int8(x: Tensor) -> Tensor:
    """x [..., K] in INT8 with a scale for each token, −127 … 127."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(2.0**-126)
    return (x / scale).round_() * scale


class OutlierSmoothing(Stage):
    """QQQ's adaptive smoothing (arXiv 2406.09904): channels of a linear's input that exceed a
    threshold t are divided by λ = max|x| / t, all others stay as they are.

    t is the one with the least squared error of the linears' outputs, inputs and weights rounded, of
    values from the largest input down to a 128th of it, each the same part of the one before. The
    authors' code spaces them evenly, and takes the error behind attention for q, k, v and behind the
    activation for gate and up; here it is that of the linears themselves.
    """

    kind: ClassVar[Kind] = "smooth"
    method: Literal["outlier-smoothing"] = "outlier-smoothing"
    inputs: Literal["int8", "fp8"] = "int8"
    """How inputs are rounded in the trials."""
    group_size: int = 128
    """Of the weights' INT4 rounding there."""
    thresholds: int = Field(default=48, ge=2)
    """Values of t that are tried."""

    def apply(self, block: Block) -> None:
        """Smooth every edge, in the order of the forward pass."""
        for edge in block.edges:
            largest, sample = self._inputs(block, edge)
            scale, ratio = self._search(block, edge, largest, sample)
            treated = int((scale > 1).sum())
            block.note(edge.name, search_ratio=ratio, smoothed_channels=treated)
            if treated:
                block.fold(edge, scale)

    def _inputs(self, block: Block, edge: Edge) -> tuple[Tensor, Tensor]:
        """Largest inputs [K] over the tokens seen, and a sample [M, K] of them."""
        tokens, batches = 0, []
        for batch in block.inputs:
            if tokens >= _SEEN:
                break
            batches.append(batch)
            tokens += batch.shape[0] * batch.shape[1]
        seen = torch.cat([x for (x,) in inputs_of(block, [edge.sinks[0]], stream=batches)])
        return seen.abs().amax(dim=0), seen[:: max(1, len(seen) // _TRIED)]

    def _search(self, block: Block, edge: Edge, largest: Tensor, x: Tensor) -> tuple[Tensor, float]:
        """λ of the source's channels, and its error relative to none."""
        names = block.rounded_sinks(edge)
        weight = torch.cat([block.linear(name).weight.float() for name in names])
        wanted = x @ weight.T
        if edge.kv_group:  # a channel of v is read by every query head of its group
            shape = block.shape
            largest = largest.view(shape.n_kv_heads, -1, shape.head_dim).amax(dim=1).flatten()
        best, least, first = torch.ones_like(largest), math.inf, math.inf
        top = float(largest.max())
        for step in range(self.thresholds):
            scale = smoothing_scale(largest, top * 128 ** (-step / self.thresholds))
            error = self._error(x, weight, wanted, block.sink_columns(edge, scale))
            first = error if step == 0 else first
            if error < least:
                best, least = scale, error
        return best, least / first if first else 1.0

    def _error(self, x: Tensor, weight: Tensor, wanted: Tensor, columns: Tensor) -> float:
        grid = Grid(4, self.group_size)
        scaled = weight * columns
        rounded = grid.round(scaled, *grid.absmax_scale(scaled))[1]
        inputs = round_int8 if self.inputs == "int8" else quantize_activations
        return float((inputs(x / columns) @ rounded.T - wanted).square().sum())


def smoothing_scale(largest: Tensor, threshold: float) -> Tensor:
    """λ = max(1, largest / threshold), per channel."""
    return (largest / threshold).clamp_min(1)


class BlockGrid(Grid):
    """Mantissas under a shared exponent: integers times a power of two for each block."""

    def _representable(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        power = torch.exp2(torch.log2(scale).round().clamp(-126, 127))
        return power, torch.ones_like(power[:, :1])

    def _best_scale(self, w: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
        """The power of two with the least error: the one that reaches the largest weight, or one of
        the two below it, which clip."""
        grouped, share = (t.view(len(t), -1, self.group_size) for t in (w, weight))
        reaches = torch.exp2(torch.log2(absmax).ceil())
        best, least = reaches, torch.full_like(absmax, torch.inf)
        for below in (0, 1, 2):
            scale = reaches * 2.0**-below
            best, least = better_scale(self._error(grouped, share, scale), scale, least, best)
        return best

    def scale_moves(self, scale: Tensor, factor: Tensor, sweep: int) -> tuple[Tensor, Tensor]:
        """The exponents beside it."""
        return scale / 2, scale * 2


def shared_exponent(w: Tensor, block: int) -> Tensor:
    """Scales of the OCP rule for 4-bit elements with two bits below the leading one: every block of
    w [N, K] by its largest weight's exponent − 2 → [N, K / block]."""
    return torch.exp2(group_absmax(w, block).clamp_min(2.0**-120).log2().floor() - 2)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_mx(w: Tensor, block: int, element: Literal["int4", "e2m1"]) -> Tensor:
    """w [N, K] to the nearest in MXINT4 (−7 … 7, as microxcaling has it) or MXFP4."""
    scale = shared_exponent(w, block).repeat_interleave(block, dim=1)
    if element == "int4":
        return (w / scale).round_().clamp_(-7, 7) * scale
    levels = torch.tensor(_E2M1, device=w.device)
    size = (w / scale).abs().clamp_max(6)
    nearest = torch.bucketize(size, (levels[1:] + levels[:-1]) / 2)
    return levels[nearest] * w.sign() * scale


class BlockFloat(Fireq):
    """Weights in block floating point, by `fireq`'s solver, and outlier channels kept apart.

    The outliers are the `outliers` of 64 input channels of a linear whose rounding costs most; they
    have `outlier_bits`, with one shared exponent each where these are 8, and leave their blocks.
    """

    method: Literal["block-float"] = "block-float"  # type: ignore[assignment]
    activations: Literal["none", "fp8"] = "none"
    element: Literal["integer", "mxint4", "mxfp4"] = "integer"
    """`integer`: −8 … 7, by the solver; the others: to the nearest, without calibration text."""
    outliers: int = Field(default=0, ge=0, le=32)
    outlier_bits: Literal[8, 16] = 8

    @property
    def needs_inputs(self) -> bool:
        """Not for the nearest."""
        return self.element == "integer"

    def stored_bits(self, N: int, K: int) -> float:
        """Mantissas, an exponent of 8 bits for each block, outliers with their positions."""
        kept = self.kept(K)
        apart = kept * (self.outlier_bits - self.bits) / K
        tables = kept * (math.ceil(math.log2(K)) + (8 if self.outlier_bits == 8 else 0)) / (N * K)
        return self.bits + 8 / self.group_size + apart + tables

    def kept(self, K: int) -> int:
        """Outlier channels of a linear with K inputs."""
        return K * self.outliers // 64

    def _nearest(self, block: Block, name: str) -> None:
        weight = block.linear(name).weight.float()
        element: Literal["int4", "e2m1"] = "int4" if self.element == "mxint4" else "e2m1"
        self._simulate(block, name, round_mx(weight, self.group_size, element), None)

    def _descend(
        self, block: Block, name: str, target: Tensor, moments: Moments, usable: Damped
    ) -> None:
        grid = BlockGrid(self.bits, self.group_size)
        hessian, outlier = moments.hessian, self._outliers(target, moments.hessian)
        value = torch.where(outlier, self._apart(target), 0)
        # An outlier's error is a sixteenth of another's at most: the others are fitted as if there
        # were none, with inputs that are always zero where it stands.
        rest = hessian.masked_fill(outlier | outlier[:, None], 0)
        others = target.masked_fill(outlier, 0)
        damped = damp(rest, usable.damping, feedback_order(rest, "activation"))
        assert damped is not None
        scale, factor = grid.fit_scale(others, rest.diagonal())
        rounded, lost = error_feedback(others, damped, grid, scale, factor)
        with damped.metric(rest) as metric:
            rounded = descend(others, rounded, metric, grid, self.sweeps, lost)
        value = torch.where(outlier, value, rounded.value(grid))
        self._simulate(block, name, value, hessian)

    def _outliers(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """bool [K]: the channels without which the outputs' error falls most, if rounding errors are
        as large as steps and independent of each other.

        A channel takes its own error along, and where it has the largest weight of its block in a
        row, what is above the step that the next largest asks for, for the whole block.
        """
        N, K = weight.shape
        seen = hessian.diagonal().view(-1, self.group_size)
        blocks = weight.view(N, -1, self.group_size)
        two = blocks.abs().topk(2, dim=2)
        steps = torch.exp2(two.values.clamp_min(2.0**-60).log2().floor()).square()
        widened = (steps[..., :1] - steps[..., 1:]) * seen.sum(dim=1)[:, None]
        saved = (steps[..., :1] * seen).scatter_add_(2, two.indices[..., :1], widened)
        best = saved.sum(dim=0).flatten().topk(self.kept(K)).indices
        return torch.zeros(K, dtype=torch.bool).index_fill_(0, best, True)

    def _apart(self, weight: Tensor) -> Tensor:
        """Every column of a weight [N, K] in 16 bits, or in 8 under an exponent of its own."""
        if self.outlier_bits == 16:
            return weight.bfloat16().float()
        step = torch.exp2((weight.abs().amax(dim=0).clamp_min(2.0**-100) / 127).log2().ceil())
        return (weight / step).round() * step

    def _simulate(self, block: Block, name: str, value: Tensor, hessian: Tensor | None) -> None:
        """Let the linear hold these numbers, which bfloat16 holds exactly."""
        linear = block.linear(name)
        note_errors(block, name, linear.weight.float(), value, hessian)
        linear.weight.data = value.to(linear.weight.dtype)
        block.forget_moments(name)
