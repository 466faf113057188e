"""Plain-torch twins of the INT4 and E4M3 kernels: slow, short, and what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.fp8 import e4m3, row_factor
from quantize.formats.packed_int import unpack_codes


class Weight(NamedTuple):
    """A packed INT4 weight [N, K] of G groups a row, contiguous: q · scale, or E4M3(q · s8) · factor."""

    packed: Tensor
    """int32 [N, K/8], as `quantize.formats.packed_int` packs 4 bits."""
    scale: Tensor
    """bfloat16 [N, G]; with a factor s8, float16 [N, G]."""
    factor: Tensor | None = None
    """float32 [N]."""

    def decode(self) -> Tensor:
        """Weight float32 [N, K] that is multiplied."""
        K = self.packed.shape[1] * 8
        codes = unpack_codes(self.packed, 4, K).float()
        products = codes * self.scale.float().repeat_interleave(K // self.scale.shape[1], dim=1)
        return products if self.factor is None else e4m3(products) * self.factor[:, None]


def fold_reference(scale: Tensor) -> tuple[Tensor, Tensor]:
    """s8 = E4M3(E4M3(scale / f) / 8), float16 [N, G], and 8f, float32 [N], of scale bfloat16 [N, G].

    f is `row_factor`; products and factors are those of `quantize.formats.fp8.product_weight`.
    """
    factor = row_factor(scale)
    return e4m3(e4m3(scale.float() / factor) / 8).half(), (factor * 8).flatten()


def quantize_reference(
    x: Tensor, norm: Tensor | None = None, eps: float = 0.0, group_size: int = 0, folded: bool = False
) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] and scales float32 [M] of x [M, K]; codes · scale is `formats.fp8.quantize_activations(x)`.

    RMSNorm comes first where there is a weight `norm` [K], as transformers computes it: in float32, rounded to x's
    dtype, times the weight. With a group size codes come in the order of `operand_order`.
    """
    if norm is not None:
        x = norm * (x.float() * torch.rsqrt(x.float().pow(2).mean(dim=1, keepdim=True) + eps)).to(x.dtype)
    scale = (x.float().abs().amax(dim=1) / 448.0).clamp_min(1.0 / (448.0 * 512.0))
    codes = e4m3(x.float() / scale[:, None]).to(torch.float8_e4m3fn)
    return (codes[:, operand_order(x.shape[1], group_size, folded, x.device)] if group_size else codes), scale


def operand_order(K: int, group_size: int, folded: bool, device: torch.device | str = "cpu") -> Tensor:
    """Input at each place of E4M3 codes, int64 [K], for weights of this group size.

    In a group, input 8·(V·t + v) + 4c + 2b + h stands at place (v, h, t, c, b), where V = group_size / 32, or for
    folded weights (v, h, t, b, c): so four threads find the weights of their words in their registers.
    """
    inputs = torch.arange(K, device=device).view(-1, 4, group_size // 32, 2, 2, 2)
    return inputs.permute(0, 2, 5, 1, *((4, 3) if folded else (3, 4))).reshape(K)


def multiply_reference(
    x: Tensor, token_scale: Tensor | None, weights: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [M, K] Ŵᵀ + bias [N], or of weights gate and up silu(x Ŵ_gᵀ) ⊙ x Ŵ_uᵀ → [M, N] in dtype, summed in float32.

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
