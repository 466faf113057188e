"""A linear layer whose weight stays packed integers: decoded, a block of rows at a time, whenever it is called."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.fp8 import product_weight, quantize_activations, row_factor
from quantize.formats.packed_int import IntScheme, unpack_codes
from quantize.native_linear import NativeLinear


class IntLinear(NativeLinear[IntScheme]):
    """y = x̂ Ŵᵀ + b as `PackedLinear` computes it with the serving kernel's numerics, in x's dtype."""

    weight_packed: Tensor
    weight_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if self.scheme.fp8_activations:
            x = quantize_activations(x).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        pieces = self.pieces(x.device)
        if len(pieces) == 1:
            return F.linear(x, self.rows(0, self.out_features, x.dtype), bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for part in pieces:
            weight = self.rows(part.start, part.stop, x.dtype)
            out[..., part] = F.linear(x, weight, None if bias is None else bias[part])
        return out

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Decoded weight [last − first, K] of these output rows."""
        packed, scale = self.weight_packed[first:last], self.weight_scale[first:last]
        bits, half = self.scheme.bits, 1 << (self.scheme.bits - 1)
        codes = _unsigned_codes(packed, bits, self.in_features).view(*scale.shape, self.scheme.group_size)
        if self.scheme.fp8_activations:
            # A group's products are few: looked up, as the kernel does it, they are found faster than computed.
            values = torch.arange(-half, half, device=packed.device)
            products = product_weight(values, scale[:, :, None], row_factor(scale)[:, :, None])  # [N, G, 2^bits]
            starts = torch.arange(0, products.numel(), 2 * half, dtype=torch.int32, device=packed.device)
            places = codes.to(torch.int32).add_(starts.view(*scale.shape, 1))
            weight = products.flatten().index_select(0, places.flatten())
        else:
            weight = codes.float().sub_(half).mul_(scale.float()[:, :, None])
        return weight.view(-1, self.in_features).to(dtype)


def _unsigned_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes + 2^(bits-1) [N, columns], 8-bit integers; faster than `unpack_codes` where no code crosses a byte."""
    if 8 % bits or sys.byteorder != "little":
        return unpack_codes(packed, bits, columns) + (1 << (bits - 1))
    octets, mask = packed.contiguous().view(torch.uint8), (1 << bits) - 1
    codes = torch.stack([octets >> shift & mask for shift in range(0, 8, bits)], dim=-1)
    return codes.flatten(1)[:, :columns].contiguous()
