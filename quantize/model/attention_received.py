"""How much attention each token receives from the others of its window."""

from __future__ import annotations

import torch
from torch import Tensor

_SCORES = 1 << 24
"""float32 scores held at once: 64 MB."""
_QUERIES = 128
"""Queries at once, at most: under a causal mask the first of them see few keys, and only those are
computed."""


def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    every: int = 1,
) -> Tensor:
    """Attention probabilities summed over queries, mean over heads: [B, S] float32.

    query [B, H, T, d], key [B, Hkv, S, d]; mask [B or 1, H or 1, T, S], bool (True: may be seen) or
    additive, None: causal. softcap, s_aux: as for `attend_plainly`. Every query gives 1 in all,
    less what goes to a sink [H] of `s_aux`. Scores exist for a few queries at a time.
    every: one query of so many is looked at, the last of them, and counts for all of them.
    """
    B, H, T, d = query.shape
    Hkv, S = key.shape[1], key.shape[2]
    out = query.new_zeros(B, S, dtype=torch.float32)
    rows = min(_QUERIES, max(1, _SCORES // (H * S)))
    start = (T - 1) % every
    query, mask = query[:, :, start::every], None if mask is None else mask[:, :, start::every]
    looked = query.shape[2]
    counts = query.new_full((looked, 1), every, dtype=torch.float32)
    counts[0] = start + 1  # those that are left
    sinks = None if s_aux is None else s_aux.float()[:, None, None]
    for b in range(B):
        for first in range(0, looked, rows):
            last = min(first + rows, looked)
            seen = S if mask is not None else S - (looked - last) * every
            q = query[b, :, first:last].float().reshape(Hkv, -1, d)
            scores = (q @ key[b, :, :seen].float().mT).mul_(scaling).view(H, last - first, seen)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            allowed = None if mask is None else mask[b if len(mask) > 1 else 0, :, first:last]
            if allowed is None:
                place = S - T + start + every * torch.arange(first, last, device=query.device)
                allowed = (torch.arange(seen, device=query.device) <= place[:, None])[None]
            if allowed.dtype == torch.bool:
                scores.masked_fill_(~allowed, -torch.inf)
            else:
                scores += allowed
            top = scores.amax(dim=-1, keepdim=True)
            if sinks is not None:
                top = torch.maximum(top, sinks)
            top = torch.where(top.isinf(), 0, top)  # a row that may see nothing gives nothing
            scores.sub_(top).exp_()
            total = scores.sum(dim=-1, keepdim=True)
            if sinks is not None:
                total = total + (sinks - top).exp()
            shares = counts[first:last] / total.clamp_min(1e-30)
            out[b, :seen] += scores.mul_(shares).sum(dim=(0, 1))
    return out.div_(H)
