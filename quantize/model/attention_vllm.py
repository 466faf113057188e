"""Attention as vLLM computes it on its own INT4 cache, emulated in plain torch."""

from __future__ import annotations

from torch import Tensor, nn

from quantize.formats.vllm_kv4 import VllmInt4, rotate, round_rotated
from quantize.kernels.attention.reference import attend


class VllmKvAttention(nn.Module):
    """Attached to an attention module as its submodule `kv`, in the place of a `KvAttention`."""

    def __init__(self, numerics: VllmInt4) -> None:
        super().__init__()
        self.numerics = numerics

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """query [B, H, T, d], key and value [B, Hkv, S, d], mask bool or additive → [B, H, T, d] in
        query's dtype."""
        d = query.shape[-1]
        size = d & -d
        q, k, v = (rotate(x).to(x.dtype).float() for x in (query, key, value))
        mixed = attend(q, round_rotated(k), round_rotated(v), mask, scaling / size, False)
        return (rotate(mixed.to(query.dtype), inverse=True) / size).to(query.dtype)
