"""E4M3 numerics of the INT4×FP8 tensor-core path, in plain torch.

A Hopper kernel cannot multiply INT4 by FP8: it expands each group scale into the eight
products -8s … -1s rounded to E4M3 and looks the weight up, so the weight it multiplies is
E4M3(q·s) (FireQ, arXiv 2505.20839; vLLM's w4a8 scheme does the same with a per-row factor).
Everything here computes in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
FACTOR_FLOOR = 1.0 / (E4M3_MAX * 512.0)
"""vLLM's floor of a token's scale and of a row's factor: what is zero or nearly so divides nothing."""
_MIN_NORMAL = 2.0**-6  # of E4M3
_LUT_SPAN = 8.0  # the largest |q| of an INT4 code: products q·s8 with s8 <= 448/8 cannot overflow


def e4m3(x: Tensor) -> Tensor:
    """Round float32 to the nearest E4M3 value (saturating at ±448), as float32."""
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    # A float32's exponent bits alone are its power of two; three mantissa bits leave steps of an
    # eighth of it, and subnormals keep the steps of 2⁻⁶. On a CPU this is several times faster
    # than a cast to float8 and back.
    step = (
        (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=_MIN_NORMAL).mul_(0.125)
    )
    return x.div_(step).round_().mul_(step)


def quantize_activations(x: Tensor) -> Tensor:
    """Fake-quantize x [..., K] with one dynamic scale per token: s = max|x| / 448, E4M3(x / s)·s.

    Returns float32 of the same shape. A token of zeros stays zeros.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp_min(FACTOR_FLOOR)
    return e4m3(x / scale).mul_(scale)


def quantize_activations_in_dtype(x: Tensor) -> Tensor:
    """Fake-quantize x [..., K] as compressed-tensors does it in Python: scale
    and division in x's own dtype.

    Equal to `quantize_activations` for float32; in bfloat16 the rounded scale moves some
    values across an E4M3 border.
    """
    scale = x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return e4m3((x / scale).float()).to(x.dtype) * scale


def row_factor(scale: Tensor) -> Tensor:
    """Per-row factor [N, 1] that vLLM's Hopper scheme derives from group scales [N, G]:
    rowmax|s| / 448, floored."""
    return (scale.float().abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp_min(FACTOR_FLOOR)


def product_weight(codes: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Weight that the tensor core multiplies: E4M3(q·s8)·8·factor with s8 =
    E4M3(E4M3(scale / factor) / 8).

    codes: integer or float, broadcastable with scale; factor: per-row factor of
    `row_factor`. Returns float32.
    """
    s8 = e4m3(e4m3(scale.float() / factor) / _LUT_SPAN)
    return e4m3(codes.float() * s8) * (_LUT_SPAN * factor)


def representable_scale(scale: Tensor, factor: Tensor) -> Tensor:
    """Round group scales [N, G] to bfloat16 values that survive a reload:
    E4M3(scale / factor)·factor.

    The bfloat16 rounding moves s / factor by at most 2⁻⁹, less than half an E4M3 step, so the
    loader finds the same E4M3 code again, provided that the row's largest |scale| is 448·factor
    exactly. Smallest magnitude: one E4M3 subnormal. Signs stay.
    """
    code = e4m3(scale.float().abs() / factor).clamp_min(2.0**-9)
    return (code * factor).copysign(scale).to(torch.bfloat16)


def reloaded(scale: Tensor, shards: int = 1) -> Tensor:
    """Group scales [N, G] that an engine multiplies with once it derived row factors from stored
    ones, where each of so many GPUs holds as many of a row's groups: bfloat16 [N, G].

    What vLLM's `convert_bf16_scales_to_fp8` makes of the shards. ValueError where G does not divide.
    """
    N, G = scale.shape
    if G % shards:
        raise ValueError(f"{G} groups do not divide among {shards} shards")
    own = scale.reshape(N * shards, G // shards)
    return representable_scale(own, row_factor(own)).view(N, G)
