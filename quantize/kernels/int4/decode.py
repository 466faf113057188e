"""Weights of packed integers (`quantize/formats/packed_int.py`) in plain torch, as fast as it allows."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from quantize.formats.fp8 import product_weight, row_factor
from quantize.formats.packed_int import unpack_codes


def decode(
    packed: Tensor,
    scale: Tensor,
    bits: int,
    columns: int,
    fp8_activations: bool,
    dtype: torch.dtype,
    factor: Tensor | None = None,
) -> Tensor:
    """Weight [R, columns] of packed codes int32 [R, W] and scales bfloat16 [R, G]: q · scale, or, where
    activations are E4M3, what the kernel multiplies (`product_weight`).

    factor: 8f of every row, float32 [R], of which these are not all groups; default: theirs.
    """
    half = 1 << (bits - 1)
    codes = _unsigned_codes(packed, bits, columns).view(*scale.shape, -1)
    if fp8_activations:
        # A group's products are few: looked up, as the kernel does it, they
        # are found faster than computed.
        values = torch.arange(-half, half, device=packed.device)
        # [R, G, 2^bits]
        row = row_factor(scale) if factor is None else factor[:, None] / 8
        products = product_weight(values, scale[:, :, None], row[:, :, None])
        starts = torch.arange(
            0, products.numel(), 2 * half, dtype=torch.int32, device=packed.device
        )
        places = codes.to(torch.int32).add_(starts.view(*scale.shape, 1))
        weight = products.flatten().index_select(0, places.flatten())
    else:
        weight = codes.float().sub_(half).mul_(scale.float()[:, :, None])
    return weight.view(-1, columns).to(dtype)


def _unsigned_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes + 2^(bits-1) [N, columns], 8-bit integers; faster than `unpack_codes`
    where no code crosses a byte."""
    if 8 % bits or sys.byteorder != "little":
        return unpack_codes(packed, bits, columns) + (1 << (bits - 1))
    octets, mask = packed.contiguous().view(torch.uint8), (1 << bits) - 1
    codes = torch.stack([octets >> shift & mask for shift in range(0, 8, bits)], dim=-1)
    return codes.flatten(1)[:, :columns].contiguous()
