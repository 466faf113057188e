"""Plain-torch twins of the attention kernels: what they are tested against, and what runs
where there is no kernel."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from quantize.formats.fp8 import E4M3_MAX, e4m3, quantize_activations
from quantize.formats.kv4 import KvCodes, KvScheme, dequantize, quantize
from quantize.threads import side_by_side

SCORES = 1 << 24
"""float32 scores held at once: 64 MB."""
_QUERIES = 128
"""Queries computed at once: under a causal mask, few see few keys, and only those are computed."""

View = tuple[bool, int | None, Tensor | None, Tensor | None]
"""What queries see: causal, window, mask and lengths of
`quantize.kernels.attention.api.attend_records`."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    fp8_probabilities: bool,
    *,
    whole_top: bool = False,
) -> Tensor:
    """Softmax attention in float32 with E4M3 probabilities: exp(s − max) is
    rounded ×448, its sum is not.

    q [B, H, T, d], k and v [B, Hkv, S, d]; mask [B or 1, H or 1, T, S], bool (True: may be
    seen) or additive; without one attention is causal. Returns [B, H, T, d]. Scores exist
    for a few queries at a time.

    `whole_top` takes probabilities as the kernels do, against the maximum rounded up to a whole
    power of two: the same softmax, but an E4M3 rounding that no order of tiles changes (subnormals,
    below 2⁻¹⁵ of the largest, aside).
    """
    B, H, T, d = q.shape
    Hkv, L = k.shape[1], k.shape[2]
    if mask is None and T > 1:
        mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)[None, None]
    out = torch.empty_like(q)
    rows = min(_QUERIES, max(1, SCORES // (H * L)))

    def compute(b: int, first: int) -> None:
        part = slice(first, min(first + rows, T))
        allowed = None if mask is None else mask[b if mask.shape[0] > 1 else 0, :, part]
        keys = slice(0, L) if allowed is None else _seen(allowed)
        # [Hkv, 1, L, d]: shared by the query heads of a group
        kb, vb = k[b, :, None, keys], v[b, :, None, keys]
        qb = q[b, :, part].view(Hkv, H // Hkv, -1, d)
        scores = (qb @ kb.transpose(-1, -2)).mul_(scaling).view(H, qb.shape[2], -1)
        if allowed is not None:
            allowed = allowed[..., keys]
            scores = (
                scores.masked_fill(~allowed, -torch.inf)
                if allowed.dtype == torch.bool
                else scores + allowed
            )
        weights = _weights(scores, whole_top)
        total = weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if fp8_probabilities:
            weights = e4m3(weights.mul_(E4M3_MAX)).div_(E4M3_MAX)
        mixed = weights.view(Hkv, H // Hkv, qb.shape[2], -1) @ vb
        out[b, :, part] = mixed.view(H, -1, d) / total

    # No two of them write to the same place.
    jobs = [partial(compute, b, first) for b in range(B) for first in range(0, T, rows)]
    side_by_side(jobs, q[:0], H * rows * L)
    return out


def _seen(allowed: Tensor) -> slice:
    """From the first to the last key that any of these queries may see; all of them where that
    would take a GPU's time to find out, or is a matter of degree."""
    L = allowed.shape[-1]
    if allowed.is_cuda or allowed.dtype != torch.bool:
        return slice(0, L)
    found = allowed.reshape(-1, L).any(dim=0).nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, L)


def _weights(scores: Tensor, whole_top: bool) -> Tensor:
    # exp(s − max), in place; a row that may see nothing (padding) gives zeros.
    if whole_top:
        scores = scores.mul_(math.log2(math.e))
        top = scores.amax(dim=-1, keepdim=True).ceil()
        return scores.sub_(torch.where(top.isinf(), 0, top)).exp2_()
    top = scores.amax(dim=-1, keepdim=True)
    return scores.sub_(torch.where(top.isinf(), 0, top)).exp_()


def over_scale(query: Tensor, S: Tensor) -> Tensor:
    """Q/S: query [B, H, T, d] over S [Hkv, d] of the key head that it reads; float32."""
    return query.float() / S.repeat_interleave(query.shape[1] // S.shape[0], dim=0)[:, None]


def visible(T: int, L: int, view: View, device: torch.device) -> Tensor:
    """Which of L tokens T queries see: bool [B or 1, 1, T, L]."""
    causal, window, mask, lengths = view
    length = torch.full((1,), L, device=device) if lengths is None else lengths.clamp_max(L)
    place = (length[:, None] - T + torch.arange(T, device=device))[:, None, :, None]
    token = torch.arange(L, device=device)
    seen = (token < length[:, None, None, None]).expand(-1, 1, T, L)
    if causal:
        seen = seen & (token <= place)
    if window is not None:
        seen = seen & (token > place - window)
    return seen if mask is None else seen & mask


def store_reference(
    key: Tensor, value: Tensor, S: Tensor, scheme: KvScheme
) -> tuple[Tensor, Tensor]:
    """Records [B, Hkv, T, R] of K·S and of V [B, Hkv, T, d]."""
    return quantize(key.float() * S[:, None], scheme).records(), quantize(value, scheme).records()


def read_reference(records: Tensor, scheme: KvScheme, head_dim: int) -> Tensor:
    """Float32 [..., d] that records [..., R] hold."""
    return dequantize(KvCodes.from_records(records, scheme, head_dim), scheme)


def attend_reference(
    query: Tensor, k: Tensor, v: Tensor, S: Tensor, scaling: float, seen: Tensor
) -> Tensor:
    """Attention of the kernels to float32 k and v, as they were rounded →
    [B, H, T, d] in query's dtype."""
    q = quantize_activations(over_scale(query, S))
    return attend(q, k, v, seen, scaling, True, whole_top=True).to(query.dtype)


def attend_records_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    S: Tensor,
    scaling: float,
    scheme: KvScheme,
    view: View,
) -> Tensor:
    """Attention to records keys and values [B, Hkv, L, R] → [B, H, T, d] in query's dtype."""
    k, v = (read_reference(records, scheme, query.shape[3]) for records in (keys, values))
    return _attend_view(query, k, v, S, scaling, view)


def attend_codes_reference(
    query: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    unit: Tensor,
    S: Tensor,
    scaling: float,
    view: View,
) -> Tensor:
    """Attention to codes [B, Hkv, L, d] with key_scale [B, Hkv, G, L] and the values'
    unit [B, Hkv] → [B, H, T, d]."""
    channels = keys.shape[3] // key_scale.shape[2]
    k = keys.float() * key_scale.mT.repeat_interleave(channels, dim=3)
    v = values.float() * unit[..., None, None]
    return _attend_view(query, k, v, S, scaling, view)


def _attend_view(
    query: Tensor, k: Tensor, v: Tensor, S: Tensor, scaling: float, view: View
) -> Tensor:
    T = query.shape[2]
    L = k.shape[2]
    device = query.device
    # What lies beyond a sequence holds anything, and 0 · NaN would show.
    held = visible(1, L, (False, None, None, view[3]), device).mT
    k, v = k.masked_fill(~held, 0), v.masked_fill(~held, 0)
    return attend_reference(query, k, v, S, scaling, visible(T, L, view, device))
