"""A linear layer whose weight stays packed integers: a kernel multiplies with it,
or it is decoded by rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from quantize.formats.fp8 import quantize_activations
from quantize.formats.packed_int import IntScheme
from quantize.kernels.by_rows import multiply_by_rows
from quantize.kernels.int4.api import fold, multiply, takes
from quantize.kernels.int4.decode import decode
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
        return multiply_by_rows(x, self.out_features, self.rows, bias)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Decoded weight [last − first, K] of these output rows."""
        packed, scale = self.weight_packed[first:last], self.weight_scale[first:last]
        scheme = self.scheme
        return decode(packed, scale, scheme.bits, self.in_features, scheme.fp8_activations, dtype)
