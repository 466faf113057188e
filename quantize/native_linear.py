"""A packed linear layer that stays packed: its weight is decoded, a block of rows at a time, whenever it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats.fp8 import product_weight, quantize_activations, row_factor
from quantize.formats.packed_int import IntScheme, unpack_codes, words_per_row
from quantize.formats.scheme import AnyScheme

_ROOM = {"cpu": 1 << 20}  # weights decoded at once: what fits a cache
_ROOM_ELSEWHERE = 1 << 24  # an accelerator wants few, large operations


class NativeLinear(nn.Module):
    """y = x̂ Ŵᵀ + b as `PackedLinear` computes it with the serving kernel's numerics, in x's dtype.

    Tensors are those of the checkpoint, in their own dtypes whatever the model is cast to: weight_packed int32
    [N, ceil(K·bits/32)], weight_scale bfloat16 [N, K / group_size], weight_shape int64 [2], bias [N] or None.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: IntScheme) -> None:
        """Make an empty layer on the default device; ValueError when the inputs do not divide into groups."""
        super().__init__()
        if in_features % scheme.group_size:
            raise ValueError(f"{in_features} inputs are no multiple of the group {scheme.group_size}")
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        words, groups = words_per_row(in_features, scheme.bits), in_features // scheme.group_size
        self.weight_packed = _constant(torch.empty(out_features, words, dtype=torch.int32))
        self.weight_scale = _constant(torch.empty(out_features, groups, dtype=torch.bfloat16))
        self.weight_shape = _constant(torch.empty(2, dtype=torch.int64))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if self.scheme.fp8_activations:
            x = quantize_activations(x).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = max(1, _ROOM.get(x.device.type, _ROOM_ELSEWHERE) // self.in_features)
        if rows >= self.out_features:
            return F.linear(x, self.rows(0, self.out_features, x.dtype), bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for first in range(0, self.out_features, rows):
            part = slice(first, first + rows)
            weight = self.rows(first, first + rows, x.dtype)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeLinear:
        # A cast of the model must not round the scales: integers are moved and never cast.
        def move(tensor: Tensor) -> Tensor:
            if tensor is self.weight_scale:
                return fn(tensor.detach().view(torch.int16)).view(torch.bfloat16)
            return fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Sizes and scheme, for printing the model."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.scheme}"


def native_linear(in_features: int, out_features: int, bias: bool, scheme: AnyScheme) -> NativeLinear:
    """An empty layer for weights of this scheme; ValueError for sizes that it cannot hold."""
    assert isinstance(scheme, IntScheme)
    return NativeLinear(in_features, out_features, bias, scheme)


def _constant(tensor: Tensor) -> nn.Parameter:
    # Parameters rather than buffers: loaders place and offload them like any weight.
    return nn.Parameter(tensor, requires_grad=False)


def _unsigned_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes + 2^(bits-1) [N, columns], 8-bit integers; faster than `unpack_codes` where no code crosses a byte."""
    if 8 % bits or sys.byteorder != "little":
        return unpack_codes(packed, bits, columns) + (1 << (bits - 1))
    octets, mask = packed.contiguous().view(torch.uint8), (1 << bits) - 1
    codes = torch.stack([octets >> shift & mask for shift in range(0, 8, bits)], dim=-1)
    return codes.flatten(1)[:, :columns].contiguous()
