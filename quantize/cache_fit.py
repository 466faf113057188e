"""Fits a cache of SBVR lines to a weight without data: trained on a sample of groups, then refitted on every weight."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from quantize.cache_assign import DIRECT, Cache, Groups, Matcher, assign, nearest_codes, round_codes
from quantize.cache_train import Sample, Trainer, refit
from quantize.formats.bitvec import BitVec, BitVecScheme, groups_per_row, index_dtype

__all__ = ["Cache", "Codebook", "assign", "fit", "fit_cache", "round_codes"]

Codebook = Literal["auto", "lines", "shapes"]

_SAMPLE = 16384  # groups to train on
_LARGEST = 8  # one in so many of them is taken for its size: a few outliers can hold most of the energy
_TRIAL_ROUNDS = 8
_ROUNDS, _SHAKE = 30, 0.02
_PIECE = 2048
_MOST_SHAPES, _MOST_FREE = 256, DIRECT


def fit(
    w: Tensor,
    bits: int,
    group_size: int,
    *,
    bias: bool,
    lines: int = 256,
    codebook: Codebook = "auto",
    importance: Tensor | None = None,
    max_overhead: float | None = None,
    seed: int = 0,
) -> BitVec:
    """Quantize w [N, K] to the nearest codes of a fitted cache; arguments and errors as in `fit_cache`."""
    cache, index = fit_cache(
        w,
        bits,
        group_size,
        bias=bias,
        lines=lines,
        codebook=codebook,
        importance=importance,
        max_overhead=max_overhead,
        seed=seed,
    )
    codes = round_codes(w, cache, index, group_size)
    return BitVec(codes, index, cache.lines.half(), cache.scales, bits, group_size)


def fit_cache(
    w: Tensor,
    bits: int,
    group_size: int,
    *,
    bias: bool,
    lines: int,
    codebook: Codebook = "auto",
    importance: Tensor | None = None,
    max_overhead: float | None = None,
    seed: int = 0,
) -> tuple[Cache, Tensor]:
    """Fit a cache to w [N, K] (any float dtype), least Σ importance_k·(w_k − ŵ_k)².

    lines: most lines the index may tell apart; up to 256 take an index of 8 bits, more one of 16.
    codebook: `lines` (free lines, at most 1024), `shapes` (shapes × scales) or `auto`, whichever errs less on groups
    it was not trained on. importance: [K] ≥ 0 or None.
    max_overhead: bits per weight that index and cache may take together; lines are given up until they fit.
    Returns the cache and the line of every group, int32 [N, G]. ValueError for what the layout cannot hold, an overhead
    below that of a single line, or weights that are not finite.
    """
    groups = Groups.of(w, group_size, importance)
    sizes = _sizes(w.shape, BitVecScheme(bits, group_size, bias, 1, 1), lines, codebook, max_overhead)
    generator = torch.Generator().manual_seed(seed)
    sample = _take_sample(groups, generator)
    cache = _best_of(sizes, sample, len(sample.x) == groups.count, Trainer(bits, bias, generator))
    cache = _refit_everywhere(groups, cache).times(groups.unit)
    return cache, assign(w, cache, group_size, importance)


def _sizes(
    shape: torch.Size, scheme: BitVecScheme, lines: int, codebook: str, max_overhead: float | None
) -> list[tuple[int, int]]:
    """Shapes S and scales Z of the caches worth a trial, those that fit."""
    if not 1 <= lines <= 1 << 16:
        raise ValueError(f"{lines} lines, expected 1 … {1 << 16}")
    if codebook not in ("auto", "lines", "shapes"):
        raise ValueError(f"codebook {codebook}: choose auto, lines or shapes")
    doublings = int(math.log2(lines))
    scales = sorted({1 << doublings * part // 8 for part in (2, 3, 4)} - {1}) if codebook != "lines" else []
    if codebook != "shapes" or not scales:
        scales = [1, *scales]
    sizes = [(_most_shapes(shape, scheme, lines, Z, max_overhead), Z) for Z in scales]
    fitting = [(S, Z) for S, Z in sizes if S]
    if not fitting:
        raise ValueError(f"max_overhead {max_overhead} bits per weight: not even one line fits a weight {tuple(shape)}")
    return fitting


def _most_shapes(shape: torch.Size, scheme: BitVecScheme, lines: int, Z: int, max_overhead: float | None) -> int:
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


def _take_sample(groups: Groups, generator: torch.Generator) -> Sample:
    """Groups to train on, in random order: those of most energy, and others drawn at random that count for the rest."""
    device, M = groups.w.device, groups.count
    if M <= _SAMPLE:
        return Sample(*groups.pick(torch.randperm(M, generator=generator).to(device)))
    energy = torch.empty(M, device=device)
    for where, x, share in groups.pieces(1):
        energy[where] = (x.square() * share).sum(dim=1)
    chosen = torch.zeros(M, dtype=torch.bool, device=device)
    chosen[energy.topk(_SAMPLE // _LARGEST).indices] = True
    rest = (~chosen).nonzero()[:, 0]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: _SAMPLE - _SAMPLE // _LARGEST].to(device)]
    counts = torch.cat([torch.ones(_SAMPLE // _LARGEST), torch.full((len(drawn),), len(rest) / len(drawn))]).to(device)
    order = torch.randperm(_SAMPLE, generator=generator).to(device)
    x, share = groups.pick(torch.cat([chosen.nonzero()[:, 0], drawn])[order])
    return Sample(x, share * counts[order, None])


def _best_of(sizes: list[tuple[int, int]], sample: Sample, whole: bool, trainer: Trainer) -> Cache:
    """Train the size that errs least after a short trial, on groups held out where the sample is not the whole."""
    half = len(sample.x) // 2
    seen, unseen = (sample, sample) if whole else (sample.part(slice(half)), sample.part(slice(half, None)))
    caches = [trainer.start(sample, S, Z) for S, Z in sizes]
    if len(caches) > 1:
        caches = [trainer.train(cache, seen, _TRIAL_ROUNDS, 0.0) for cache in caches]
        caches.sort(key=lambda cache: _error(cache, unseen))
    return trainer.train(caches[0], sample, _ROUNDS, _SHAKE)


def _error(cache: Cache, sample: Sample) -> float:
    matcher = Matcher.of(cache, float(sample.x.abs().max()))
    error = 0.0
    for first in range(0, len(sample.x), _PIECE):
        part = sample.part(slice(first, first + _PIECE))
        error += float(matcher.best(part.x, part.share)[1].sum())
    return error


def _refit_everywhere(groups: Groups, cache: Cache) -> Cache:
    """One round of Lloyd's algorithm over all weights themselves."""
    matcher = Matcher.of(cache, groups.reach)
    counts = torch.zeros(cache.size << cache.bits, dtype=torch.float64, device=groups.w.device)
    sums = torch.zeros_like(counts)
    for _, x, share in groups.pieces(matcher.tables.shape[1]):
        line = matcher.best(x, share)[0]
        at = ((line << cache.bits)[:, None] + nearest_codes(x, matcher.levels[line])).flatten()
        mass = share.double()
        counts.index_add_(0, at, mass.flatten())
        sums.index_add_(0, at, (mass * x).flatten())
    return refit(cache, counts.view(cache.size, -1), sums.view(cache.size, -1))
