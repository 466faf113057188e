"""Trains a codebook of SBVR lines on sampled groups, by Lloyd's algorithm on their histograms.

Groups go to the line with the least error, lines become the least-squares solution for the codes
of their groups (Lloyd, IEEE Trans. Inf. Theory 28, 1982, with a constrained code book). Sums of
bit vectors have many local optima, so lines start as the best of many random fits to single
groups, and training shakes them ever less (stochastic relaxation: Zeger, Vaisey, Gersho, IEEE
Trans. Signal Process. 40, 1992).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from quantize.formats.bitvec import coefficients, levels
from quantize.methods.sbvr.assign import DIRECT, NORMAL_REACH, Axis, Codebook, group_rms

# Random fits tried for a line, since sums of bit vectors have many local optima; the better quarter
# stays every few rounds, so that few of them are fitted to the end.
_STARTS = 64
_START_CELLS = 1 << 22  # starts × points: bounds the work space
# Before a quarter is chosen. Four rank the starts hardly better (the error of linears of two models falls by .02 %)
# and take an eighth longer in all.
_START_ROUNDS = 2
# Below so many lines, starts see so many groups beside their own.
_FEW_LINES = 16
_OTHERS = 1024
# Rms of the levels of a random line, in rms of its group: somewhat wide, since weights beyond all
# levels err most.
_START_SIZE = 1.3
_LEAST_VARIANCE = 1e-4  # lets the levels of a constant group part
_REVIVE_ROUNDS = 12  # of a line that nobody uses: it starts at one group and must settle by itself
_SHAKEN = 0.7  # part of the rounds in which lines are shaken; in the rest they settle
# Of the mean diagonal: decides what the data leave open and hardly moves the rest.
_RIDGE = 1e-6
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Sample:
    """Groups to train on, in units of the weight's rms."""

    x: Tensor  # float32 [M, g], in units
    share: Tensor  # float32 [M, g]

    def part(self, where: slice) -> Sample:
        """The groups at some places."""
        return Sample(self.x[where], self.share[where])

    def normalise(self) -> tuple[Sample, Tensor]:
        """The groups at an rms of 1, their errors still counting as before; and their rms [M]."""
        rms = group_rms(self.x, self.share)
        size = torch.where(rms > 0, rms, 1)[:, None]
        return Sample(self.x / size, self.share * size.square()), size[:, 0]


@dataclass(frozen=True)
class Trainer:
    """Trains codebooks of one kind of line."""

    bits: int
    bias: bool
    generator: torch.Generator

    def fork(self) -> Trainer:
        """One that draws apart from this."""
        seed = int(torch.randint(1 << 62, (), generator=self.generator))
        return replace(self, generator=torch.Generator().manual_seed(seed))

    def start(self, sample: Sample, S: int, Z: int) -> Codebook:
        """Best random fits to S groups drawn by their energy, and scales over the groups' rms."""
        normalised, rms = sample.normalise()
        energy = (sample.x.square() * sample.share).sum(dim=1)
        odds = energy.cpu().double().clamp_min(1e-30)
        drawn = torch.multinomial(odds, S, generator=self.generator).to(rms.device)
        best = self._best_starts(normalised, drawn)
        if Z == 1:
            return Codebook(
                _representable(best * rms[drawn, None]), torch.ones_like(rms[:1]), self.bits
            )
        return Codebook(_representable(best), _spread(rms, sample.share.sum(dim=1), Z), self.bits)

    def _best_starts(self, normalised: Sample, drawn: Tensor) -> Tensor:
        """The best of many random fits to each drawn group [S] → lines [S, C]."""
        S = len(drawn)
        axis = Axis.over(NORMAL_REACH, self.bits, drawn.device)
        histograms = axis.histogram(normalised.x[drawn], normalised.share[drawn])
        histograms /= histograms.sum(dim=1, keepdim=True)
        if S < _FEW_LINES:  # the fewer lines there are, the less is a line one group's alone
            some = normalised.part(slice(_OTHERS))
            others = axis.histogram(some.x, some.share).sum(dim=0)
            histograms = histograms * (1 - 1 / S) + others / others.sum() / S
        tries = max(4, min(_STARTS, _START_CELLS // histograms.numel()))
        lines = self._random(tries, histograms, axis)
        while tries > 1:
            own = histograms.repeat_interleave(tries, 0)
            lines = _polish(lines, own, axis, self.bits, _START_ROUNDS)
            errors = (own * axis.nearest(levels(lines, self.bits))[1]).sum(dim=1).view(S, tries)
            tries = max(1, tries // 4)
            best = errors.topk(tries, dim=1, largest=False).indices
            lines = (
                lines.view(S, -1, lines.shape[1])
                .take_along_dim(best[:, :, None], dim=1)
                .flatten(0, 1)
            )
        return _polish(lines, histograms, axis, self.bits, _START_ROUNDS)

    def _random(self, tries: int, histograms: Tensor, axis: Axis) -> Tensor:
        """Random lines for histograms [S, B] of mass 1 → [S·tries, C]: levels of their
        rms, or mean and deviation."""
        S = len(histograms)
        c = torch.randn(S * tries, self.bits, generator=self.generator).to(axis.points.device)
        if self.bias:
            c = torch.cat([c, -c.sum(dim=1, keepdim=True) / 2], dim=1)
        power = levels(c, self.bits).square().mean(dim=1, keepdim=True)
        mean = (
            histograms @ axis.points if self.bias else histograms.new_zeros(S)
        ).repeat_interleave(tries)
        square = (histograms @ axis.points.square()).repeat_interleave(tries)
        size = (square - mean.square()).clamp_min(_LEAST_VARIANCE).sqrt()
        c *= _START_SIZE * size[:, None] / power.sqrt()
        if self.bias:
            c[:, -1] += mean
        return c

    def train(self, codebook: Codebook, sample: Sample, rounds: int, shake: float) -> Codebook:
        """Lloyd's algorithm on histograms; `shake`: first relative change
        of coefficients after a round.

        Where lines are too many to compare them all, only shapes are trained, on
        groups brought to an rms of 1.
        """
        if len(codebook.scales) > 1 and codebook.size > DIRECT:
            shapes = Codebook(codebook.lines, torch.ones_like(codebook.scales[:1]), self.bits)
            trained = self.train(shapes, sample.normalise()[0], rounds, shake)
            return Codebook(trained.lines, codebook.scales, self.bits)
        axis = Axis.over(float(sample.x.abs().max()), self.bits, sample.x.device)
        histograms = axis.histogram(sample.x, sample.share)
        for r in range(rounds):
            codebook = self._round(codebook, histograms, axis)
            size = shake * (1 - r / (rounds * _SHAKEN))
            if size > 0:
                noise = torch.randn(codebook.lines.shape, generator=self.generator).to(
                    codebook.lines.device
                )
                codebook = Codebook(
                    _representable(codebook.lines * (1 + size * noise)), codebook.scales, self.bits
                )
        return codebook

    def _round(self, codebook: Codebook, histograms: Tensor, axis: Axis) -> Codebook:
        codes, tables = axis.nearest(codebook.levels)
        least = (histograms @ tables.T).min(dim=1)
        mass = torch.zeros_like(tables).index_add_(0, least.indices, histograms)
        new = refit(codebook, *_totals(mass, codes, axis, self.bits))
        used = (
            torch.bincount(least.indices, minlength=codebook.size)
            .view(len(codebook.lines), -1)
            .sum(dim=1)
        )
        idle = (used == 0).nonzero()[: len(histograms), 0]
        if not len(idle):
            return new
        worst = least.values.topk(len(idle)).indices
        line = least.indices[worst]
        start = coefficients(codebook.lines, codebook.scales)[line]
        revived = _polish(start, histograms[worst], axis, self.bits, _REVIVE_ROUNDS)
        lines = new.lines.clone()
        lines[idle] = _representable(revived / codebook.scales[line % len(codebook.scales), None])
        return Codebook(lines, new.scales, self.bits)


def _spread(rms: Tensor, share: Tensor, Z: int) -> Tensor:
    """Z scales over the rms [M] of groups, closer where groups of much weight are."""
    rising, order = rms.sort()
    mass = (rising * share[order]).cumsum(0)
    at = torch.linspace(0, 1, Z, device=rms.device) * mass[-1]
    return rising[torch.searchsorted(mass, at).clamp_(max=len(rms) - 1)]


def _polish(lines: Tensor, histograms: Tensor, axis: Axis, bits: int, rounds: int) -> Tensor:
    """Fit every line [L, C] to its own histogram [L, B]."""
    for _ in range(rounds):
        codes = axis.nearest(levels(lines, bits))[0]
        lines = _solve(
            *_equations(*_totals(histograms, codes, axis, bits), lines.shape[1]), lines
        ).float()
    return lines


def _totals(mass: Tensor, codes: Tensor, axis: Axis, bits: int) -> tuple[Tensor, Tensor]:
    """Weight and weighted sum of what has each code, float64 [L, 2^bits], of
    histograms and codes [L, B]."""
    empty = torch.zeros(len(mass), 1 << bits, device=mass.device)
    weight = empty.scatter_add(1, codes, mass)
    weighted = empty.scatter_add(1, codes, mass * axis.points)
    return weight.double(), weighted.double()


def _equations(counts: Tensor, sums: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Normal equations of lines of C coefficients, [L, C, C] and [L, C], of totals [L, 2^bits]."""
    masks, pairs = _terms(counts.shape[1], C, counts.device)
    return (counts @ pairs).view(-1, C, C), sums @ masks


@lru_cache(maxsize=16)
def _terms(codes: int, C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of C coefficients each of so many codes adds up [codes, C], and which pairs of them
    [codes, C²], float64."""
    every = torch.arange(codes, device=device)
    terms = every[:, None] >> torch.arange(C, device=device) & 1
    if codes < 1 << C:
        terms[:, -1] = 1
    masks = terms.double()
    return masks, (masks[:, :, None] * masks[:, None, :]).flatten(1)


def _solve(gram: Tensor, moment: Tensor, old: Tensor) -> Tensor:
    """Least squares [L, C]; coefficients that the data leave open stay near the old ones."""
    ridge = (_RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1)).clamp_min(1e-30)[:, None]
    solved: Tensor = torch.linalg.solve(
        gram + torch.diag_embed(ridge.expand_as(moment)), moment + ridge * old
    )
    return solved


def refit(codebook: Codebook, counts: Tensor, sums: Tensor) -> Codebook:
    """Least squares for the shapes with scales fixed, then for the scales.

    counts and sums: of all that is coded by a line, how much has each code and its
    weighted sum, float64 [S·Z, 2^bits].
    """
    S, C = codebook.lines.shape
    Z = len(codebook.scales)
    gram, moment = (t.view(S, Z, *t.shape[1:]) for t in _equations(counts, sums, C))
    scales = codebook.scales.double()
    solved = _solve(
        torch.einsum("szij,z->sij", gram, scales**2),
        torch.einsum("szi,z->si", moment, scales),
        codebook.lines,
    )
    lines = _representable(solved)
    if Z == 1:
        return Codebook(lines, codebook.scales, codebook.bits)
    wide = lines.double()
    power = torch.einsum("si,szij,sj->z", wide, gram, wide)
    product = torch.einsum("si,szi->z", wide, moment)
    scales = torch.where((power > 0) & (product > 0), product / power, scales)
    return Codebook(lines, scales.float(), codebook.bits)


def _representable(lines: Tensor) -> Tensor:
    return lines.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().float()
