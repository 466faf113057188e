"""Fits a codebook of SBVR lines to a weight without data.

It is trained on a sample of groups, then refitted on every weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from quantize.formats.bitvec import MAX_LINES, BitVec, BitVecScheme, groups_per_row, index_dtype
from quantize.methods.sbvr.assign import DIRECT, Codebook, Groups, Matcher, assign, round_codes
from quantize.methods.sbvr.train import Sample, Trainer, refit
from quantize.threads import few_threads, side_by_side

__all__ = [
    "Codebook",
    "CodebookKind",
    "assign",
    "fit",
    "fit_codebook",
    "require_room",
    "round_codes",
]

CodebookKind = Literal["auto", "lines", "shapes"]

# Groups to train on, and to choose by. Training takes time in proportion; a codebook of 256 lines
# then has 64 groups a line to learn from.
_SAMPLE = 16384
_HELD_OUT = 4096
# Groups of the sample that are taken for their size: a few can hold most of the energy.
_LARGEST = 2048
# Groups and rounds that numbers of scales are compared by; only the best one is trained further.
_TRIAL = 4096
_TRIAL_ROUNDS = 8
# Of Lloyd's algorithm: time against error. The shaking takes most of them to die out.
_ROUNDS = 30
# First relative change of coefficients after a round, and the same in steps between levels: the
# finer these are, the less. More takes lines out of worse optima, and rounds to settle again.
_SHAKE = 0.02
_SHAKE_IN_STEPS = 0.32
_PIECE = 2048  # groups compared at once: bounds the work space
# More would cost time and gain next to nothing.
_MOST_SHAPES = 256
_MOST_FREE = DIRECT


def fit(
    w: Tensor,
    bits: int,
    group_size: int,
    *,
    bias: bool,
    lines: int = 256,
    kind: CodebookKind = "auto",
    importance: Tensor | None = None,
    max_overhead: float | None = None,
    seed: int = 0,
) -> BitVec:
    """Quantize w [N, K] to the nearest codes of a fitted codebook; arguments and
    errors as in `fit_codebook`."""
    codebook, index = fit_codebook(
        w,
        bits,
        group_size,
        bias=bias,
        lines=lines,
        kind=kind,
        importance=importance,
        max_overhead=max_overhead,
        seed=seed,
    )
    codes = round_codes(w, codebook, index, group_size)
    return BitVec(codes, index, codebook.lines.half(), codebook.scales, bits, group_size)


def fit_codebook(
    w: Tensor,
    bits: int,
    group_size: int,
    *,
    bias: bool,
    lines: int,
    kind: CodebookKind = "auto",
    importance: Tensor | None = None,
    max_overhead: float | None = None,
    seed: int = 0,
    start: Codebook | None = None,
) -> tuple[Codebook, Tensor]:
    """Fit a codebook to w [N, K] (any float dtype), least Σ importance_k·(w_k − ŵ_k)².

    lines: most lines the index may tell apart; up to 256 take an index of 8 bits, more one of 16.
    kind: `lines` (free lines, at most 1024), `shapes` (shapes × scales) or `auto`,
    whichever errs less on groups
    it was not trained on. importance: [K] ≥ 0 or None.
    max_overhead: bits per weight that index and codebook may take together; lines
    are given up until they fit.
    start: a codebook of a like weight to train on from, whose kind and
    size stay: several times faster.
    Returns the codebook and the line of every group, int32 [N, G].
    ValueError for what the layout cannot hold, an overhead below that of a single line, or
    weights that are not finite.
    """
    groups = Groups.of(w, group_size, importance)
    sizes = _sizes(w.shape, BitVecScheme(bits, group_size, bias, 1, 1), lines, kind, max_overhead)
    generator = torch.Generator().manual_seed(seed)
    seen, held_out = _take_samples(groups, generator)
    trainer = Trainer(bits, bias, generator)
    if start is None:
        codebook = _best_of(sizes, seen, held_out, trainer)
    else:
        with few_threads(seen.x):
            codebook = trainer.train(start.times(1 / groups.unit), seen, _ROUNDS, 0.0)
    # A line of float16 cannot hold an exact 0 under every code, a scale can.
    codebook = _refit_everywhere(groups, codebook).times(groups.unit if groups.reach else 0.0)
    return codebook, assign(w, codebook, group_size, importance)


def require_room(
    shape: tuple[int, int],
    scheme: BitVecScheme,
    lines: int,
    kind: CodebookKind,
    max_overhead: float | None,
) -> None:
    """ValueError where `fit_codebook` would refuse a weight of this shape [N, K]; scheme:
    its bits, group and bias."""
    _sizes(torch.Size(shape), scheme, lines, kind, max_overhead)


def _sizes(
    shape: torch.Size, scheme: BitVecScheme, lines: int, kind: str, max_overhead: float | None
) -> list[tuple[int, int]]:
    """Shapes S and scales Z of the codebooks worth a trial, those that fit."""
    if not 1 <= lines <= MAX_LINES:
        raise ValueError(f"{lines} lines, expected 1 … {MAX_LINES}")
    if kind not in ("auto", "lines", "shapes"):
        raise ValueError(f"codebook {kind}: choose auto, lines or shapes")
    doublings = int(math.log2(lines))
    scales = (
        sorted({1 << doublings * part // 8 for part in (2, 3, 4)} - {1}) if kind != "lines" else []
    )
    if kind != "shapes" or not scales:
        scales = [1, *scales]
    sizes = [(_most_shapes(shape, scheme, lines, Z, max_overhead), Z) for Z in scales]
    fitting = [(S, Z) for S, Z in sizes if S]
    if not fitting:
        raise ValueError(
            f"max_overhead {max_overhead} bits per weight: not even one line fits a weight "
            f"{tuple(shape)}"
        )
    return fitting


def _most_shapes(
    shape: torch.Size, scheme: BitVecScheme, lines: int, Z: int, max_overhead: float | None
) -> int:
    N, K = shape
    groups = N * groups_per_row(K, scheme.group_size)
    for most in (lines, min(lines, 256)):  # the narrower index may leave room for more lines
        S = min(most // Z, groups, _MOST_FREE if Z == 1 else _MOST_SHAPES)
        if max_overhead is not None:
            fixed = groups * 8 * index_dtype(most).itemsize + 32 * Z
            S = min(S, math.floor((max_overhead * N * K - fixed) / (16 * scheme.coefficients)))
        if S > 0 and index_dtype(S * Z) == index_dtype(most):
            return S
    return 0


def _take_samples(groups: Groups, generator: torch.Generator) -> tuple[Sample, Sample]:
    """Groups to train on and groups to choose by, in random order; both are
    the whole where that is small.

    Else both hold the groups of most energy, and others drawn at random
    that count for all the rest.
    """
    device, M = groups.w.device, groups.count
    if M <= _SAMPLE + _HELD_OUT:
        whole = Sample(*groups.pick(torch.randperm(M, generator=generator).to(device)))
        return whole, whole
    energy = torch.empty(M, device=device)
    for where, x, share in groups.pieces(1):
        energy[where] = (x.square() * share).sum(dim=1)
    large = energy.topk(_LARGEST).indices
    energy[large] = -1
    rest = (energy >= 0).nonzero()[:, 0]
    drawn = rest[torch.randperm(len(rest), generator=generator).to(device)]
    trained, held_out = drawn[: _SAMPLE - _LARGEST], drawn[_SAMPLE - _LARGEST :][:_HELD_OUT]
    seen = _stratify(groups, large, trained, len(rest), generator)
    return seen, _stratify(groups, large, held_out, len(rest), generator)


def _stratify(
    groups: Groups, all_of: Tensor, some: Tensor, of: int, generator: torch.Generator
) -> Sample:
    """All of one set of groups, and some `of` another that count for the whole of it."""
    order = torch.randperm(len(all_of) + len(some), generator=generator).to(some.device)
    counts = torch.cat([torch.ones_like(all_of), torch.full_like(some, of) / len(some)])
    x, share = groups.pick(torch.cat([all_of, some])[order])
    return Sample(x, share * counts[order, None])


def _best_of(
    sizes: list[tuple[int, int]], seen: Sample, held_out: Sample, trainer: Trainer
) -> Codebook:
    """Train free lines and the most promising shapes × scales; return what errs
    less on the groups held out."""
    # With generators of their own, they draw the same whoever comes first.
    trainers = [trainer.fork() for _ in sizes]
    starts = side_by_side(
        [partial(one.start, seen, S, Z) for one, (S, Z) in zip(trainers, sizes, strict=True)],
        seen.x,
    )
    shapes = [codebook for codebook in starts if len(codebook.scales) > 1]
    if len(shapes) > 1:
        trial = seen.part(slice(_TRIAL))
        shapes = side_by_side(
            [partial(trainer.train, codebook, trial, _TRIAL_ROUNDS, 0.0) for codebook in shapes],
            trial.x,
        )
        shapes = [min(shapes, key=lambda codebook: _error(codebook, held_out))]
    finalists = [codebook for codebook in starts if len(codebook.scales) == 1] + shapes
    shake = min(_SHAKE, _SHAKE_IN_STEPS / (1 << trainer.bits))
    trained = side_by_side(
        [
            partial(one.train, codebook, seen, _ROUNDS, shake)
            for one, codebook in zip(trainers, finalists, strict=False)
        ],
        seen.x,
    )
    return (
        trained[0]
        if len(trained) == 1
        else min(trained, key=lambda codebook: _error(codebook, held_out))
    )


def _error(codebook: Codebook, sample: Sample) -> float:
    matcher = Matcher.of(codebook, float(sample.x.abs().max()))
    error = 0.0
    for first in range(0, len(sample.x), _PIECE):
        part = sample.part(slice(first, first + _PIECE))
        error += float(matcher.best(part.x, part.share)[1].sum())
    return error


def _refit_everywhere(groups: Groups, codebook: Codebook) -> Codebook:
    """One round of Lloyd's algorithm over all weights themselves."""
    matcher = Matcher.of(codebook, groups.reach)
    counts = torch.zeros(
        codebook.size << codebook.bits, dtype=torch.float64, device=groups.w.device
    )
    sums = torch.zeros_like(counts)
    for _, x, share in groups.pieces(matcher.tables.shape[1]):
        line = matcher.best(x, share)[0]
        at = ((line << codebook.bits)[:, None] + matcher.book.nearest(x, line)).flatten()
        mass = share.double()
        counts.index_add_(0, at, mass.flatten())
        sums.index_add_(0, at, (mass * x).flatten())
    return refit(codebook, counts.view(codebook.size, -1), sums.view(codebook.size, -1))
