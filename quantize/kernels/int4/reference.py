"""Plain-torch twins of the INT4 kernels: slow, short, and what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.fp8 import e4m3, row_factor
from quantize.formats.packed_int import unpack_codes
from quantize.kernels.fp8.reference import operand_order


class Weight(NamedTuple):
    """A packed INT4 weight [N, K] of G groups a row, contiguous: q · scale,
    or E4M3(q · s8) · factor."""

    packed: Tensor
    """int32 [N, K/8], as `quantize.formats.packed_int` packs 4 bits."""
    scale: Tensor
    """bfloat16 [N, G]; with a factor s8, float16 [N, G]."""
    factor: Tensor | None = None
    """float32 [N]."""

    def part(self, rows: slice = slice(None), groups: slice = slice(None)) -> Weight:
        """Some of the rows and of the groups of each, as one of several GPUs holds them; a row's
        factor stays that of all its groups."""
        K, G = self.packed.shape[1] * 8, self.scale.shape[1]
        first, last, _ = groups.indices(G)
        words = slice(first * (K // G) // 8, last * (K // G) // 8)
        factor = None if self.factor is None else self.factor[rows].contiguous()
        packed, scale = self.packed[rows, words], self.scale[rows, groups]
        return Weight(packed.contiguous(), scale.contiguous(), factor)

    def decode(self) -> Tensor:
        """Weight float32 [N, K] that is multiplied."""
        K = self.packed.shape[1] * 8
        codes = unpack_codes(self.packed, 4, K).float()
        products = codes * self.scale.float().repeat_interleave(K // self.scale.shape[1], dim=1)
        return products if self.factor is None else e4m3(products) * self.factor[:, None]


def fold_reference(scale: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s8 = E4M3(E4M3(scale / f) / 8), float16 [N, G], and 8f, float32
    [N], of scale bfloat16 [N, G].

    f is `factor` [N, 1], or else `row_factor`; products and factors are those of
    `quantize.formats.fp8.product_weight`.
    """
    factor = row_factor(scale) if factor is None else factor
    return e4m3(e4m3(scale.float() / factor) / 8).half(), (factor * 8).flatten()


def multiply_reference(
    x: Tensor,
    token_scale: Tensor | None,
    weights: Sequence[Weight],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x [M, K] Ŵᵀ + bias [N], or of weights gate and up silu(x Ŵ_gᵀ) ⊙ x Ŵ_uᵀ → [M, N]
    in dtype, summed in float32.

    With a scale [M] x holds E4M3 codes in the order of `operand_order`.
    """
    inputs = x.float()
    if token_scale is not None:
        K, groups = x.shape[1], weights[0].scale.shape[1]
        order = operand_order(K, K // groups, weights[0].factor is not None, x.device)
        inputs = torch.empty_like(inputs).index_copy_(1, order, inputs * token_scale[:, None])
    products = [inputs @ weight.decode().T for weight in weights]
    y = products[0] if len(products) == 1 else F.silu(products[0]) * products[1]
    return (y if bias is None else y + bias.float()).to(dtype)
