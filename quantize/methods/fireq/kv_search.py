"""What scaling keys and values costs or gains on an INT4 cache, measured on
the attention output itself.

A key scale A [Hkv, d] stands for the product of the pre-RoPE scale N and the post-RoPE scale S:
keys enter the cache as K·A, queries meet them as Q/A. N is equal within a rotation pair, so it
could be folded before the rotation; S is free.
A value scale λ [Hkv, d] divides v_proj's outputs and multiplies o_proj's columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import KvScheme, fake_quantize
from quantize.kernels.attention.reference import SCORES, attend
from quantize.model.attention import KvNumerics
from quantize.model.rope import pair_norm

SCORES_AT_ONCE = SCORES
"""Scores that attention holds at once."""
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far N evens out pairs, from not at all to wholly. Finer steps would come nearer the best, and
each costs an attention over the sample."""
_SAME = 1e-3
_ALIGNINGS = 3
MOVES = (0.15, 1 / 3)
"""How far a channel's scale may move for a first token's sake: with the one that token loses 0.6 to 0.7
of what it did and others 4 % more, with the other 0.2 to 0.3, and 15 % more (normal keys)."""
BALANCES = (0.75, 1.0, 1.25)
"""Powers of the balance against queries that are tried: rounding errs by the largest key, and the
balance knows the mean one."""
# How far S takes outliers to their target, in powers of two: from half way on, since less would
# leave the scale of a group to the outlier that stands in it.
_STRENGTHS = (0.5, 0.75, 1.0)
# Where S takes them: to the median pair length, or somewhat below.
_TARGETS = (0.7, 1.0)
# Channels that S treats: how many outliers a head has is not known, so the count doubles until they
# and their partners are all of a head of 128. Each costs a trial for every strength and target.
_COUNTS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Sample:
    """Queries, keys and values after RoPE, unscaled and unrounded, and
    what attention makes of them."""

    q: Tensor  # [B, H, T, d]
    k: Tensor  # [B, Hkv, T, d]
    v: Tensor  # [B, Hkv, T, d]
    mask: Tensor | None
    scaling: float
    exact: Tensor  # [B, H, T, d]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Sample:
        """Compute the exact output in float32."""
        q = q.float()
        k = k.float()
        v = v.float()
        return cls(q, k, v, mask, scaling, attend(q, k, v, mask, scaling, fp8_probabilities=False))

    def windows(self) -> Iterator[Sample]:
        """Each window by itself."""
        for b in range(len(self.q)):
            own = slice(b, b + 1)
            mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[own]
            yield Sample(self.q[own], self.k[own], self.v[own], mask, self.scaling, self.exact[own])


def output_error(
    samples: Sequence[Sample],
    key_scale: Tensor,
    value_scale: Tensor,
    gram: Tensor,
    numerics: KvNumerics,
    values: Sequence[Tensor] | None = None,
) -> Tensor:
    """Squared error [Hkv] that the rounded cache causes behind o_proj, summed over
    tokens and a group's query heads.

    key_scale, value_scale: A and λ [Hkv, d]. gram: Wᵀ W [H, d, d] of o_proj's columns for each
    query head; what two heads do to the same output is counted as if it were independent. values:
    `rounded_values` of these samples and λ, where many key scales are tried beside them.
    """
    Hkv = key_scale.shape[0]
    total = torch.zeros(Hkv, dtype=torch.float64)
    values = rounded_values(samples, value_scale, numerics) if values is None else values
    for s, v in zip(samples, values, strict=True):
        R = s.q.shape[1] // Hkv
        q = s.q / key_scale.repeat_interleave(R, dim=0)[:, None]
        q = quantize_activations(q) if numerics.fp8_query else q
        k = fake_quantize(s.k * key_scale[:, None], numerics.scheme)
        delta = attend(q, k, v, s.mask, s.scaling, numerics.fp8_probabilities) - s.exact
        per_head = torch.einsum("bhtd,hde,bhte->h", delta, gram, delta)
        total += per_head.double().cpu().view(Hkv, R).sum(dim=1)
    return total


def rounded_values(samples: Sequence[Sample], scale: Tensor, numerics: KvNumerics) -> list[Tensor]:
    """Values [B, Hkv, T, d] of each sample as the cache gives them back under λ [Hkv, d]."""
    wide = scale[:, None]
    return [fake_quantize(s.v / wide, numerics.scheme) * wide for s in samples]


def output_power(samples: Sequence[Sample], gram: Tensor, n_kv_heads: int) -> Tensor:
    """Squared size [Hkv] of the exact output behind o_proj, counted like `output_error`."""
    per_head = sum(
        torch.einsum("bhtd,hde,bhte->h", s.exact, gram, s.exact).double().cpu() for s in samples
    )
    assert isinstance(per_head, Tensor)
    return per_head.view(n_kv_heads, -1).sum(dim=1)


def channel_maxima(samples: Sequence[Sample], partner: Tensor) -> tuple[Tensor, Tensor]:
    """Largest |k| after RoPE per channel, and largest pair length, both [Hkv, d] (the
    latter is RoPE-invariant)."""
    channel = torch.stack([s.k.abs().amax(dim=(0, 2)) for s in samples]).amax(dim=0)
    pair = torch.stack([pair_norm(s.k, partner).amax(dim=(0, 2)) for s in samples]).amax(dim=0)
    tiny = 1e-6 * pair.amax(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    return channel.clamp_min(tiny), pair.clamp_min(tiny)


def key_balance(samples: Sequence[Sample], partner: Tensor | None = None) -> Tensor:
    """The key scale A [Hkv, d] that errs least if rounding adds the same noise to all channels:
    A² = rms(q) / rms(k) of every channel; partner: of both of a pair together, which rotates.

    Noise in proportion to the scaled key's length, of Σ k²A², meets queries as Σ q²/A²: by Cauchy's
    inequality their product is least there. A channel that queries do not look at may err more.
    """
    Hkv = samples[0].k.shape[1]

    def power(parts: Sequence[Tensor]) -> Tensor:
        total = torch.stack([p.square().mean(dim=(0, 2)) for p in parts]).mean(dim=0)
        return total if partner is None else total + total[:, partner]

    keys = power([s.k for s in samples])
    queries = power([s.q for s in samples]).view(Hkv, -1, keys.shape[1]).mean(dim=1)
    return quarter(queries, keys)


def value_balance(samples: Sequence[Sample], gram: Tensor) -> Tensor:
    """λ [Hkv, d] by which values are divided, of the same kind: λ² = rms(v) / ‖o_proj's column‖."""
    values = torch.stack([s.v.square().mean(dim=(0, 2)) for s in samples]).mean(dim=0)
    seen = gram.diagonal(dim1=1, dim2=2).view(len(values), -1, values.shape[1]).mean(dim=1)
    return quarter(values, seen)


def first_of(states: Sequence[Tensor]) -> Tensor | None:
    """The first token's keys or values [Hkv, d], of states [B, Hkv, T, d]; None where they differ
    between windows, as they do where no BOS begins them."""
    first = torch.cat([s[:, :, 0] for s in states])
    mean = first.mean(dim=0)
    return mean if (first - mean).norm() <= _SAME * first.norm() else None


def aligned(first: Tensor, scale: Tensor, scheme: KvScheme, move: float) -> Tensor:
    """The scale [Hkv, d] moved so that a token whose keys are `first` [Hkv, d] has no rounding error
    in the channels where that takes a relative change of at most `move`.

    Keys of BOS at position 0 are the same in every sequence, and all later tokens look at them. A
    code of 0 stays.
    """
    for _ in range(_ALIGNINGS):  # a channel that moves may have been the group's largest
        scaled = first * scale
        ratio = fake_quantize(scaled, scheme) / torch.where(scaled == 0, 1, scaled)
        scale = scale * torch.where((ratio - 1).abs() <= move, ratio, 1)
    return scale


def quarter(above: Tensor, below: Tensor) -> Tensor:
    """(above / below)^¼ [Hkv, d], its geometric mean over a head 1."""
    above, below = (x + 1e-6 * x.mean(dim=1, keepdim=True) + 1e-30 for x in (above, below))
    log = (above / below).log() / 4
    return (log - log.mean(dim=1, keepdim=True)).exp()


def treated_channels(channel: Tensor, partner: Tensor, count: int) -> Tensor:
    """The `count` largest channels of each head and their partners, as bool [Hkv, d]."""
    chosen = torch.zeros_like(channel, dtype=torch.bool)
    if count:
        chosen.scatter_(1, channel.topk(min(count, channel.shape[1]), dim=1).indices, True)
    return chosen | chosen[:, partner]


@dataclass(frozen=True)
class KeyScales:
    """One candidate: N and S, both [Hkv, d]; exactly one of them differs from 1 in any channel."""

    pre: Tensor
    post: Tensor


def paper_scales(
    channel: Tensor, pair: Tensor, partner: Tensor, alpha: float, beta: float, top_k: int
) -> KeyScales:
    """FireQ's constants: S = β / max|k_c| on the top_k channels and their partners, N = α
    / max pair length elsewhere.

    alpha or beta 0 switches N or S off.
    """
    treated = treated_channels(channel, partner, top_k if beta else 0)
    one = torch.ones_like(channel)
    return KeyScales(
        torch.where(treated, one, alpha / pair if alpha else one),
        torch.where(treated, beta / channel, one) if beta else one,
    )


def pre_candidates(pair: Tensor) -> Iterator[KeyScales]:
    """N = (t / pair)^a around each head's median pair length t."""
    t = pair.median(dim=1, keepdim=True).values
    for exponent in EXPONENTS[1:]:
        yield KeyScales((t / pair) ** exponent, torch.ones_like(pair))


def post_candidates(
    channel: Tensor, pair: Tensor, partner: Tensor, pre: Tensor
) -> Iterator[KeyScales]:
    """S = (ρ·t / channel)^b on the largest channels and their partners,
    `pre` on all other pairs."""
    t = pair.median(dim=1, keepdim=True).values
    one, d = torch.ones_like(channel), channel.shape[1]
    for count in _COUNTS:
        if 2 * count > d:
            break
        treated = treated_channels(channel, partner, count)
        N = torch.where(treated, one, pre)
        for exponent, rho in itertools.product(_STRENGTHS, _TARGETS):
            yield KeyScales(N, torch.where(treated, (rho * t / channel) ** exponent, one))


def aligned_candidates(
    samples: Sequence[Sample], keys: KeyScales, scheme: KvScheme
) -> Iterator[KeyScales]:
    """S moved for the sake of the first token, where N does not treat a pair."""
    first = first_of([s.k for s in samples])
    if first is None:
        return
    for move in MOVES:
        moved = aligned(first, keys.pre * keys.post, scheme, move)
        yield KeyScales(keys.pre, torch.where(keys.pre != 1, keys.post, moved))


def powers_of_two(scale: Tensor) -> Tensor:
    """Nearest powers of two: exact in any float format, so that a pair's two
    factors stay equal when stored."""
    return torch.exp2(scale.log2().round())
