"""A linear layer whose weight stays packed integers: a kernel multiplies with it,
or it is decoded by rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from quantize.formats.fp8 import product_weight, quantize_activations, row_factor
from quantize.formats.packed_int import IntScheme, unpack_codes
from quantize.kernels.int4.api import fold, multiply, takes
from quantize.kernels.int4.reference import Weight
from quantize.serving.native_linear import NativeLinear


class IntLinear(NativeLinear[IntScheme]):
    """y = x̂ Ŵᵀ + b as `PackedLinear` computes it with the serving
    kernel's numerics, in x's dtype."""

    weight_packed: Tensor
    weight_scale: Tensor
    # what came of a scale, and of which version of it
    _folded: tuple[Tensor, int, Weight] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype; the kernel has no gradient, so
        what needs one is decoded."""
        bits = self.scheme.bits
        group_size = self.scheme.group(self.in_features)
        fp8 = self.scheme.fp8_activations
        if takes(bits, group_size, x, fp8) and not (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.detach()
            return multiply(x, self.kernel_weight(), bias, fp8_activations=fp8)
        return self._by_rows(x)

    def kernel_weight(self) -> Weight:
        """The packed weight as kernels read it, its scales folded (once)
        where activations are E4M3."""
        weight = Weight(self.weight_packed, self.weight_scale)
        if not self.scheme.fp8_activations or torch.compiler.is_compiling():
            return weight
        version = 0 if weight.scale.is_inference() else weight.scale._version
        if (
            self._folded is None
            or self._folded[0] is not weight.scale
            or self._folded[1] != version
        ):
            if weight.scale.is_cuda and torch.cuda.is_current_stream_capturing():
                return weight  # what is made now holds nothing until the graph is replayed
            self._folded = weight.scale, version, fold(weight)
        return self._folded[2]._replace(packed=weight.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folded = None  # tensors change their storage and stay the same objects
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded": None}

    def _by_rows(self, x: Tensor) -> Tensor:
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
        codes = _unsigned_codes(packed, bits, self.in_features).view(
            *scale.shape, self.scheme.group(self.in_features)
        )
        if self.scheme.fp8_activations:
            # A group's products are few: looked up, as the kernel does it, they
            # are found faster than computed.
            values = torch.arange(-half, half, device=packed.device)
            # [N, G, 2^bits]
            products = product_weight(values, scale[:, :, None], row_factor(scale)[:, :, None])
            starts = torch.arange(
                0, products.numel(), 2 * half, dtype=torch.int32, device=packed.device
            )
            places = codes.to(torch.int32).add_(starts.view(*scale.shape, 1))
            weight = products.flatten().index_select(0, places.flatten())
        else:
            weight = codes.float().sub_(half).mul_(scale.float()[:, :, None])
        return weight.view(-1, self.in_features).to(dtype)


def _unsigned_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes + 2^(bits-1) [N, columns], 8-bit integers; faster than `unpack_codes`
    where no code crosses a byte."""
    if 8 % bits or sys.byteorder != "little":
        return unpack_codes(packed, bits, columns) + (1 << (bits - 1))
    octets, mask = packed.contiguous().view(torch.uint8), (1 << bits) - 1
    codes = torch.stack([octets >> shift & mask for shift in range(0, 8, bits)], dim=-1)
    return codes.flatten(1)[:, :columns].contiguous()
