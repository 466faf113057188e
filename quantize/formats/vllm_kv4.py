"""vLLM's own INT4 KV cache (`--kv-cache-dtype int4_per_token_head`), in plain torch.

Facts from vLLM 0.32, v1/attention/ops/int4_per_token_head.py: keys, values and queries [..., d] are
multiplied by fixed random signs and an unnormalized Hadamard matrix of size b, the largest power of
two that divides d (block by block where d is none), and kept in the model's dtype. Keys and values
then get one scale a token and head, s = max((max − min) / 15, 1e-6), a zero point
z = clamp(round(−min / s), 0, 15), and codes clamp(round(x / s + z), 0, 15), halves away from zero.
s is stored as float32 whose last four mantissa bits are z. Scores are divided by b; outputs are
rotated back.

The range is that of the values alone: where it does not hold 0, the clamped zero point cuts it off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 0x9E3779B9
_LEAST = 1e-6


@dataclass(frozen=True)
class VllmInt4:
    """How attention rounds on vLLM's INT4 cache: keys and values; queries and probabilities stay."""

    def label(self, head_dim: int) -> str:
        """For people."""
        return "vLLM's int4_per_token_head"

    def bits_per_value(self, head_dim: int) -> float:
        """Stored bits per key or value channel, its share of the scale counted."""
        return 4 + 32 / head_dim


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """x [..., d] by signs and the unnormalized Hadamard matrix, float32; inverse: back, times b."""
    d = x.shape[-1]
    b = d & -d
    signs = _signs(b).to(x.device)
    out = x.float().reshape(*x.shape[:-1], d // b, b)
    out = out if inverse else out * signs
    half = 1
    while half < b:
        pairs = out.reshape(*x.shape[:-1], -1, 2, half)
        a, c = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack((a + c, a - c), dim=-2).reshape(*x.shape[:-1], d // b, b)
        half *= 2
    out = out * signs if inverse else out
    return out.reshape(x.shape)


def round_rotated(x: Tensor) -> Tensor:
    """What rotated keys or values x [..., d] are once they come back from the cache, float32."""
    x = x.float()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(_LEAST)
    zero = _round(-low / scale).clamp_(0, 15)
    codes = _round(x / scale + zero).clamp_(0, 15)
    stored = (scale.view(torch.int32) & -16).view(torch.float32)
    return (codes - zero) * stored


def _round(x: Tensor) -> Tensor:
    """Halves away from zero, as a cast to whole numbers of x ± 0.5 has it."""
    return torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x))


@functools.cache
def _signs(b: int) -> Tensor:
    draw = torch.Generator().manual_seed(_SEED)
    return 2 * torch.bernoulli(torch.full((b,), 0.5), generator=draw) - 1
