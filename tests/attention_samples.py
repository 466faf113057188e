"""Keys, values and queries for attention kernels, and what the kernels should make of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantize.formats.kv4 import KvScheme

SYMMETRIC, ASYMMETRIC = KvScheme(), KvScheme(symmetric=False)
SMALL, UNEVEN = KvScheme(scale_dtype="e4m3"), KvScheme(32, False, "e4m3")


def states(
    B: int, H: int, T: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Keys, values [B, H, T, d] with channels and tokens that stand out, and the scale S [H, d]."""
    generator = torch.Generator().manual_seed(seed * 1000 + T * d + B + H)
    key, value = torch.randn(2, B, H, T, d, generator=generator).unbind()
    key[..., 3] *= 20
    value[:, :, ::7] *= 9
    scale = (0.7 * torch.randn(H, d, generator=generator)).exp()
    return [key.to(dtype), value.to(dtype), scale]


def queries(B: int, H: int, T: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As a projection leaves them: heads of a token lie side by side."""
    generator = torch.Generator().manual_seed(B + H + T + d)
    return torch.randn(B, T, H, d, generator=generator).to(dtype).transpose(1, 2)


def held(records: Tensor, capacity: int, row: int, device: str) -> Tensor:
    """Records at the start of memory for `capacity` tokens of `row` bytes, the rest of it NaN scales."""
    B, H, L, R = records.shape
    memory = torch.full((B, H, capacity, row), 255, dtype=torch.uint8, device=device)[..., :R]
    memory[:, :, :L] = records.to(device)
    return memory


def seen_by(
    T: int, L: int, causal: bool = True, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    place, token = torch.arange(L - T, L)[:, None], torch.arange(L)
    seen = (token <= place if causal else token >= 0) & (token > place - (window or L + 1))
    return seen[None, None] if mask is None else seen & mask


def expected(
    query: Tensor, k: Tensor, v: Tensor, S: Tensor, scaling: float, seen: Tensor
) -> Tensor:
    """Attention in float64 to keys and values as they were rounded; queries and probabilities through float8_e4m3fn."""
    R = query.shape[1] // S.shape[0]
    q = query.float() / S.repeat_interleave(R, 0)[:, None]
    scale = q.abs().amax(-1, keepdim=True) / 448
    q = (q / scale).to(torch.float8_e4m3fn).double() * scale.double()
    k, v = (x.double().repeat_interleave(R, 1) for x in (k, v))
    scores = (q @ k.mT * scaling * math.log2(math.e)).masked_fill(~seen, -math.inf)
    top = scores.amax(-1, keepdim=True).ceil()
    weights = torch.where(seen, (scores - top).exp2(), 0.0)
    rounded = (weights * 448).float().to(torch.float8_e4m3fn).double() / 448
    return (rounded @ v / weights.sum(-1, keepdim=True)).nan_to_num(0.0)


def padding(B: int, L: int) -> Tensor:
    """Bool [B, 1, 1, L]: rows start with more and more tokens that are none."""
    return (torch.arange(L) >= torch.arange(B)[:, None] * 37)[:, None, None]
