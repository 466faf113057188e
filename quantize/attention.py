"""Attention over an INT4 KV cache with FP8 queries and probabilities, as a serving kernel computes it, in plain torch.

FireQ (arXiv 2505.20839): keys and values are rounded to INT4 per token and head as they enter the cache, queries and
probabilities to E4M3, products accumulate in float32. Keys are stored as K·S and queries multiplied as Q/S, with the
post-RoPE scale S of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantize.formats.fp8 import E4M3_MAX, e4m3, quantize_activations
from quantize.formats.kv4 import KvScheme, fake_quantize

ATTENTION = "pq"
"""Name of the attention implementation: SDPA, except in modules that carry a `KvAttention` named `kv`."""

_SCORES = 1 << 24  # float32 scores held at once


@dataclass(frozen=True)
class KvNumerics:
    """How attention rounds: INT4 cache, queries and probabilities."""

    scheme: KvScheme = field(default_factory=KvScheme)
    fp8_query: bool = True
    fp8_probabilities: bool = True

    def as_json(self) -> dict[str, Any]:
        """The `attention` part of a native checkpoint's quantization_config."""
        return {
            "kv_cache": self.scheme.as_json(),
            "query": "fp8" if self.fp8_query else None,
            "probabilities": "fp8" if self.fp8_probabilities else None,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> KvNumerics:
        """Undo `as_json`; ValueError or KeyError for what pq does not write."""
        if not {facts["query"], facts["probabilities"]} <= {None, "fp8"}:
            raise ValueError(f"query {facts['query']!r} and probabilities {facts['probabilities']!r}: fp8 or null")
        scheme = KvScheme.from_json(facts["kv_cache"])
        return cls(scheme, facts["query"] == "fp8", facts["probabilities"] == "fp8")


class KvAttention(nn.Module):
    """What an attention module needs to work on an INT4 KV cache; attached to it as its submodule `kv`."""

    scale: Tensor
    """[Hkv, d] float32: S. Stored keys are K·S, queries Q/S; ones where no channel is treated."""

    def __init__(self, numerics: KvNumerics, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.numerics = numerics
        numerics.scheme.group(head_dim)  # refuses what the cache cannot hold
        self.register_buffer("scale", torch.ones(n_kv_heads, head_dim, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KvAttention:
        moved = fn(self.scale)
        # A cast of the model must not round S: keys that were stored with it would no longer fit the queries.
        self.scale = moved if moved.dtype == torch.float32 else self.scale.to(moved.device)
        return self

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """query [B, H, T, d], key and value [B, Hkv, S, d], mask bool or additive → [B, H, T, d] in query's dtype.

        A key with the attribute `pq_stored` comes out of the INT4 cache: it and its value are rounded already.
        """
        S = self.scale.float()
        q = self.rounded_query(query, S)
        if getattr(key, "pq_stored", False):
            k, v = key.float(), value.float()
        else:
            k, v = fake_quantize(key.float() * S[:, None], self.scheme), fake_quantize(value.float(), self.scheme)
        return attend(q, k, v, mask, scaling, self.numerics.fp8_probabilities).to(query.dtype)

    @property
    def scheme(self) -> KvScheme:
        """Layout of the cache."""
        return self.numerics.scheme

    def rounded_query(self, query: Tensor, S: Tensor) -> Tensor:
        """Q/S, rounded to E4M3 per token and head; [B, H, T, d] float32. S: [Hkv, d]."""
        per_head = S.repeat_interleave(query.shape[1] // S.shape[0], dim=0)
        q = query.float() / per_head[:, None]
        return quantize_activations(q) if self.numerics.fp8_query else q


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, fp8_probabilities: bool) -> Tensor:
    """Softmax attention in float32 with E4M3 probabilities: exp(s − max) is rounded ×448, its sum is not.

    q [B, H, T, d], k and v [B, Hkv, S, d]; mask [B or 1, H or 1, T, S], bool (True: may be seen) or additive; without
    one attention is causal. Returns [B, H, T, d]. Scores exist for a few queries at a time.
    """
    B, H, T, d = q.shape
    Hkv, L = k.shape[1], k.shape[2]
    if mask is None and T > 1:
        mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)[None, None]
    out = torch.empty_like(q)
    rows = max(1, _SCORES // (H * L))
    for b in range(B):
        kb, vb = k[b, :, None], v[b, :, None]  # [Hkv, 1, L, d]: shared by the query heads of a group
        for first in range(0, T, rows):
            part = slice(first, min(first + rows, T))
            qb = q[b, :, part].view(Hkv, H // Hkv, -1, d)
            scores = (qb @ kb.transpose(-1, -2)).mul_(scaling).view(H, -1, L)
            if mask is not None:
                allowed = mask[b if mask.shape[0] > 1 else 0, :, part]
                scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
            top = scores.amax(dim=-1, keepdim=True)
            # A row that may see nothing (padding) gives zeros.
            weights = scores.sub_(torch.where(top.isinf(), 0, top)).exp_()
            total = weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            if fp8_probabilities:
                weights = e4m3(weights.mul_(E4M3_MAX)).div_(E4M3_MAX)
            mixed = weights.view(Hkv, H // Hkv, -1, L) @ vb
            out[b, :, part] = mixed.view(H, -1, d) / total
    return out


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: SDPA, or `module.kv` where there is one."""
    kv = getattr(module, "kv", None)
    if kv is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out
    mixed = kv(query, key, value, attention_mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
