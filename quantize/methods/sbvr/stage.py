"""SBVR: weights as sums of bit vectors whose coefficients come from a
codebook (arXiv 2509.18172)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantize.block.measure import moments_of
from quantize.block.token_weights import TokenWeights
from quantize.cost.footprint import factoring
from quantize.errors import ModelError
from quantize.formats.bitvec import BitVec, BitVecScheme
from quantize.methods.encode import Encode, factor_hessian, note_errors, take_targets
from quantize.methods.sbvr.fit import Codebook, fit_codebook, require_room, round_codes
from quantize.methods.sbvr.solve import Fitted, loss, solve
from quantize.pictures import Picture, block_map, facts
from quantize.solvers.feedback import Damped
from quantize.threads import at_once, few_threads, side_by_side

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments


# Jobs that are there at once at most: linears of a group, or codebooks that are tried for one.
_AT_ONCE = 4
_OCCUPANCY = (
    "Lines that would be in use if all were used alike (the exponential of the entropy of the "
    "groups' choices), as a share of the codebook. A low share means that most groups look alike."
)
_LINES = "Lines that a group can choose from; small matrices get fewer so that the codebook stays within `overhead`."
_SCALES = "1: every line is free; more: a line is one of a few shapes times one of so many scales."
_SHARE = (
    "Loss in the metric of the inputs over that of the data-free fit of the same matrix. It lies "
    "below 1: what codes, lines and coefficients gain by knowing the inputs."
)


class Sbvr(Encode):
    """Weights as Σ c_k·b_k per group, the coefficients c shared through a codebook
    that is fitted to each matrix.

    The published search over a grid is replaced by Lloyd's algorithm over groups, and block-wise
    feedback by descent over codes, lines and coefficients in the Hessian's metric.
    """

    method: Literal["sbvr"] = "sbvr"
    bits: int = Field(default=4, ge=2, le=8)
    """Bit vectors in a sum: bits of a weight code."""
    group_size: Literal[64, 128, 256] = 128
    """Consecutive inputs of one output row that share a line of coefficients."""
    bias: bool = True
    """Whether a line also has a constant, which costs no bits per weight; without it,
    as published, code 0 is 0."""
    lines: int = Field(default=256, ge=1, le=65536)
    """Most lines in a matrix's codebook; above 256 a group's index takes 16 bits."""
    codebook: Literal["auto", "lines", "shapes"] = "auto"
    """`lines`: every line is free; `shapes`: a line is one of a few shapes times one of a few
    scales; `auto`: what has the smaller error at the same bits per weight."""
    overhead: float | None = Field(default=0.125, gt=0, le=16)
    """Bits per weight that indices and codebook may take; small matrices get fewer lines. null: no
    limit. The default makes 4-bit weights no larger than INT4 with a 16-bit scale for every 128."""
    fit: Literal["data-free", "hessian"] = "hessian"
    """`data-free`: least squared error of the weights; `hessian`: of the outputs."""
    aim: Literal["parent", "layer"] = "parent"
    """`parent`: reproduce the parent's outputs from the quantized model's inputs; `layer`:
    this layer's own outputs."""
    damping: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the mean Hessian diagonal that is added to it; raised tenfold while
    the Hessian stays singular."""
    sweeps: int = Field(default=4, ge=0, le=100)
    """Rounds of descent over coefficients, lines and codes."""
    token_weights: TokenWeights = "sinks"
    """How much a token counts in the statistics. `attention`: by the attention that it receives in
    its layer, since its error reaches every token that looks at it; `sinks`: so where that is a
    sixteenth of all there is or more, as for BOS, the others the same; `equal`: all the same, as blocks without
    attention probabilities and routed experts have it anyway."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the groups that a codebook is trained on."""

    @property
    def needs_inputs(self) -> bool:
        """The data-free fit reads no text."""
        return self.fit == "hessian"

    @property
    def needs_parent(self) -> bool:
        """Aiming at the parent takes its activations along."""
        return self.fit == "hessian" and self.aim == "parent"

    @property
    def native_field(self) -> str | None:
        """No other format has bit vectors."""
        return "method"

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """ModelError for a matrix too small for a codebook within `overhead`."""
        scheme = BitVecScheme(self.bits, self.group_size, self.bias, 1, 1)
        for name in filter(self.selects, linears):
            try:
                require_room(linears[name], scheme, self.lines, self.codebook, self.overhead)
            except ValueError as err:
                raise ModelError(
                    f"{name}: {err}; raise overhead or add the layer to ignore"
                ) from None

    def measure(self, block: Block, name: str) -> Moments | None:
        """Second moments of the inputs, unless the weights alone are fitted."""
        return (
            moments_of(
                block,
                name,
                False,
                with_parent=self.aim == "parent",
                token_weights=self.token_weights,
            )
            if self.needs_inputs
            else None
        )

    def fitting(self, N: int, K: int) -> int:
        """The codebook is trained on a sample; then the factorization, or what
        stands beside the factor."""
        beside = at_once(_AT_ONCE, N * K)
        training = beside * (min(500 * N * K, 150 << 20) + 5 * N * K)
        if not self.needs_inputs:
            return max(training, 24 * N * K)
        solving = beside * 30 * N * K
        return max(training + 4 * K * K, factoring(K, self.damping), 4 * K * K + solving)

    def stored_bits(self, N: int, K: int) -> float:
        """Planes, and at most the overhead that the recipe allows."""
        return self.bits + (0.25 if self.overhead is None else min(self.overhead, 0.25))

    def encode_group(self, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        """Encode linears that share one input."""
        if moments is None:
            for name in names:
                self._data_free(block, name)
            return
        usable = factor_hessian(block, names[0], moments, self.damping)
        if isinstance(usable, str):
            for name in names:
                block.note(name, fallback=f"{usable}: fitted to the weights alone")
                self._data_free(block, name)
            return
        targets = take_targets(block, names, moments, usable)
        sizes = [block.linear(name).weight for name in names]
        beside = at_once(len(names), moments.hessian, *sizes)
        for first in range(0, len(names), beside):
            some = names[first : first + beside]
            with usable.metric(moments.hessian) as metric:
                jobs = [
                    partial(self._solve, block.linear(n).weight, targets.pop(n), metric, usable)
                    for n in some
                ]
                solved = side_by_side(jobs, moments.hessian, *sizes)
            del jobs
            for name, (fitted, ours, theirs) in zip(some, solved, strict=True):
                self._encode(block, name, fitted, moments.hessian)
                block.note(name, damping=usable.damping, dead_inputs=int(usable.dead.sum()))
                block.note(name, loss_share=ours / theirs if theirs else 1.0)

    def _data_free(self, block: Block, name: str) -> None:
        weight = block.linear(name).weight.float()
        self._encode(block, name, self._round(weight, self._codebook(weight)))

    def _solve(
        self, weight: Tensor, target: Tensor, metric: Tensor, usable: Damped
    ) -> tuple[Fitted, float, float]:
        """The fit to a target [N, K], its loss in the metric [K, K], and that of the weight's own fit."""
        weight = weight.float()
        data_free = self._codebook(weight)
        start = self._codebook(target, metric.diagonal(), data_free[0])
        with few_threads(target, metric):
            fitted = solve(target, usable, metric, start, self.group_size, self.sweeps)
        ours = loss(target, fitted, metric)
        plain = self._round(weight, data_free)
        theirs = loss(target, plain, metric)
        # Never seen, but the descent is no proof.
        return (plain, theirs, theirs) if theirs < ours else (fitted, ours, theirs)

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """Show how well codebooks are used, which kind of codebook each matrix took
        and what the Hessian buys."""
        lines, effective = facts(layers, "cache_lines"), facts(layers, "cache_effective")
        occupancy = {
            n: e / m if (m := lines.get(n)) and e is not None else None
            for n, e in effective.items()
        }
        share = facts(layers, "loss_share")
        drawn = (
            block_map(
                occupancy, title="Codebook occupancy", caption=_OCCUPANCY, unit="of the lines"
            ),
            block_map(lines, title="Lines in the codebook", caption=_LINES, unit="lines", log=True),
            block_map(
                facts(layers, "cache_scales"),
                title="Scales of a codebook",
                caption=_SCALES,
                unit="scales",
            ),
            block_map(
                share,
                title="Output error against the data-free fit",
                caption=_SHARE,
                unit="ratio",
                log=True,
            ),
        )
        return tuple(picture for picture in drawn if picture is not None)

    def _codebook(
        self, weight: Tensor, importance: Tensor | None = None, start: Codebook | None = None
    ) -> tuple[Codebook, Tensor]:
        return fit_codebook(
            weight,
            self.bits,
            self.group_size,
            bias=self.bias,
            lines=self.lines,
            kind=self.codebook,
            importance=importance,
            max_overhead=self.overhead,
            seed=self.seed,
            start=start,
        )

    def _round(self, weight: Tensor, start: tuple[Codebook, Tensor]) -> Fitted:
        codebook, index = start
        return Fitted(
            codebook,
            index,
            round_codes(weight, codebook, index, self.group_size).float(),
            self.group_size,
        )

    def _encode(
        self, block: Block, name: str, fitted: Fitted, hessian: Tensor | None = None
    ) -> None:
        weight, codebook = block.linear(name).weight.float(), fitted.codebook
        codes = fitted.codes.to(torch.uint8)
        packed = BitVec(
            codes, fitted.index, codebook.lines.half(), codebook.scales, self.bits, self.group_size
        )
        block.encode(name, packed, False)
        lines, used, effective = _occupancy(packed)
        block.note(
            name,
            cache_lines=lines,
            cache_used=used,
            cache_effective=effective,
            cache_scales=len(codebook.scales),
        )
        note_errors(block, name, weight, packed.unpack(), hessian)


def _occupancy(packed: BitVec) -> tuple[int, int, float]:
    """Lines of the codebook, those that some group uses, and how many used alike would
    choose as freely (e^entropy)."""
    lines = len(packed.lines) * len(packed.scales)
    counts = torch.bincount(packed.index.flatten(), minlength=lines).double()
    share = counts[counts > 0] / counts.sum()
    return lines, len(share), math.exp(-float((share * share.log()).sum()))
