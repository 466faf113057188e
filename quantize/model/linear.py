"""A quantized linear layer: packed codes, computed as the serving kernel computes them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats.fp8 import quantize_activations, quantize_activations_in_dtype
from quantize.formats.scheme import Packed

Numerics = Literal["kernel", "stock"]
"""`kernel`: E4M3 weight products, as an INT4×FP8 tensor-core kernel. `stock`: code ×
scale, as transformers loads it.
Activations are rounded per token to E4M3 in both, by `stock` in the computing dtype.
Equal for 16-bit activations."""


class PackedLinear(nn.Module):
    """y = x̂ Ŵᵀ + b with x̂ the (optionally FP8) activations and Ŵ [N, K] decoded
    once from its packed form."""

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        fp8_activations: bool,
        dtype: torch.dtype,
        numerics: Numerics,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.fp8_activations = fp8_activations
        self.out_features, self.in_features = packed.shape
        as_kernel = self.as_kernel = fp8_activations and numerics == "kernel"
        weight = packed.kernel_weight() if as_kernel else packed.unpack()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if self.as_kernel:
            x = quantize_activations(x).to(self.weight.dtype)
        elif self.fp8_activations:
            x = quantize_activations_in_dtype(x)
        return F.linear(x, self.weight, self.bias)
