"""A linear layer whose weight stays sums of bit vectors: a kernel, lookup or decoding
by rows multiplies with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize.formats.bitvec import BitVecScheme
from quantize.kernels.bitvec.api import multiply
from quantize.kernels.bitvec.lookup import Stored, looks_up
from quantize.kernels.device import has_kernel
from quantize.serving.native_linear import NativeLinear, constant


class BitVecLinear(NativeLinear[BitVecScheme]):
    """y = x Wᵀ + b in x's dtype, W as `BitVec` unpacks it, summed in float32 (float64 for such x).

    An index is trusted to lie within the codebook.
    """

    weight_planes: Tensor
    weight_index: Tensor
    weight_lines: Tensor
    weight_scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if x.requires_grad and torch.is_grad_enabled():
            return self._by_rows(x)  # the only way that knows its gradient
        if has_kernel(x):
            weight = (self.weight_planes, self.weight_index, self.weight_lines, self.weight_scales)
            return multiply(
                x, *weight, self.bias, bits=self.scheme.bits, group_size=self.scheme.group_size
            )
        return self._by_lookup(x) if looks_up(x) else self._by_rows(x)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Decoded weight [last − first, K] of these output rows; in float32 the very
        values of `BitVec.unpack`."""
        return self._stored().rows(first, last, self.in_features, dtype)

    def _by_rows(self, x: Tensor) -> Tensor:
        return self._stored().multiply_by_rows(x, self.bias)

    def _by_lookup(self, x: Tensor) -> Tensor:
        return self._stored().multiply_by_lookup(x, self.bias)

    def _stored(self) -> Stored:
        weight = (self.weight_planes, self.weight_index, self.weight_lines, self.weight_scales)
        return Stored(*weight, self.scheme.bits, self.scheme.group_size)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle cannot hold unsigned 16-bit integers.
        index = self.weight_index.detach()
        signed = index.view(torch.int16) if index.dtype == torch.uint16 else index
        return self.__dict__ | {
            "_parameters": self._parameters | {"weight_index": constant(signed)}
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.weight_index.dtype == torch.int16:
            self.weight_index = constant(self.weight_index.detach().view(torch.uint16))
