"""Plain-torch twin of the kernel that rounds to E4M3: slow, short, and what the
kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.fp8 import e4m3


def quantize_reference(
    x: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    group_size: int = 0,
    folded: bool = False,
) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] and scales float32 [M] of x [M, K]; codes · scale is
    `formats.fp8.quantize_activations(x)`.

    RMSNorm comes first where there is a weight `norm` [K], as transformers computes it:
    in float32, rounded to x's dtype, times the weight. With a group size codes come in
    the order of `operand_order`.
    """
    if norm is not None:
        x = norm * (x.float() * torch.rsqrt(x.float().pow(2).mean(dim=1, keepdim=True) + eps)).to(
            x.dtype
        )
    scale = (x.float().abs().amax(dim=1) / 448.0).clamp_min(1.0 / (448.0 * 512.0))
    codes = e4m3(x.float() / scale[:, None]).to(torch.float8_e4m3fn)
    return (
        codes[:, operand_order(x.shape[1], group_size, folded, x.device)] if group_size else codes
    ), scale


def operand_order(
    K: int, group_size: int, folded: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Input at each place of E4M3 codes, int64 [K], for weights of this group size.

    In a group, input 8·(V·t + v) + 4c + 2b + h stands at place (v, h, t, c, b), where V =
    group_size / 32, or for folded weights (v, h, t, b, c): so four threads find the weights of
    their words in their registers.
    """
    inputs = torch.arange(K, device=device).view(-1, 4, group_size // 32, 2, 2, 2)
    return inputs.permute(0, 2, 5, 1, *((4, 3) if folded else (3, 4))).reshape(K)
