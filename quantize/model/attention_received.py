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
) -> Tensor:
    """Attention probabilities summed over queries, mean over heads: [B, S] float32.

    query [B, H, T, d], key [B, Hkv, S, d]; mask [B or 1, H or 1, T, S], bool (True: may be seen) or
    additive, None: causal. softcap, s_aux: as for `attend_plainly`. Every query gives 1 in all,
    less what goes to a sink [H] of `s_aux`. Scores exist for a few queries at a time.
    """
    B, H, T, d = query.shape
    Hkv, S = key.shape[1], key.shape[2]
    out = query.new_zeros(B, S, dtype=torch.float32)
    rows = min(_QUERIES, max(1, _SCORES // (H * S)))
    sinks = None if s_aux is None else s_aux.float()[:, None, None]
    for b in range(B):
        for first in range(0, T, rows):
            last = min(first + rows, T)
            seen = S if mask is not None else S - T + last
            q = query[b, :, first:last].float().reshape(Hkv, -1, d)
            scores = (q @ key[b, :, :seen].float().mT).mul_(scaling).view(H, last - first, seen)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            allowed = None if mask is None else mask[b if len(mask) > 1 else 0, :, first:last]
            if allowed is None:
                place = torch.arange(S - T + first, S - T + last, device=query.device)
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
            out[b, :seen] += scores.div_(total.clamp_min(1e-30)).sum(dim=(0, 1))
    return out.div_(H)
