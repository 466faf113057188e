"""Activations rounded to E4M3 with one scale a token, on any device.

Triton computes it on NVIDIA devices, elsewhere the plain-torch twin does. While `torch.compile`
traces, it is an operator of the library `pq`. There is no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from quantize.kernels.device import DTYPES, runs_fp8_on
from quantize.kernels.fp8.reference import quantize_reference

Variant = Literal["folded", "exact"]
"""Weights beside E4M3 activations. `folded`: E4M3(q · s8) and one factor a row
(`formats.fp8.product_weight`), as FireQ and vLLM multiply. `exact`: q · scale, where the scale
meets the float32 sum of its group."""

GROUP_SIZES = (32, 64, 128)


def quantize_tokens(
    x: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    group_size: int = 0,
    variant: Variant = "folded",
) -> tuple[Tensor, Tensor]:
    """E4M3 codes [..., K] and scales float32 [...] of x [..., K]: codes · scale is
    `formats.fp8.quantize_activations`.

    With a weight `norm` [K] in x's dtype, of RMSNorm(x) as transformers computes it. With
    a group size codes come in the order that `quantize.kernels.int4.api.multiply_codes`
    wants for weights of that group size and variant, else in their own. ValueError for
    wrong shapes, dtypes or devices.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"activations are {x.dtype}, expected bfloat16, float16 or float32")
    K = x.shape[-1]
    if norm is not None and (
        tuple(norm.shape) != (K,) or norm.dtype != x.dtype or norm.device != x.device
    ):
        raise ValueError(
            f"norm is {norm.dtype} {tuple(norm.shape)}, expected {x.dtype} {(K,)} on {x.device}"
        )
    if group_size and (group_size not in GROUP_SIZES or K % group_size):
        raise ValueError(f"{K} inputs are no multiple of a group of 32, 64 or 128: {group_size}")
    norm = None if norm is None else norm.contiguous()
    run = _QUANTIZE if is_compiling() else _quantize
    codes, scale = run(as_rows(x), norm, eps, group_size, is_folded(variant))
    return codes.view(x.shape), scale.view(x.shape[:-1])


def is_folded(variant: Variant) -> bool:
    """Whether weights are folded; ValueError for a variant that there is not."""
    if variant not in ("folded", "exact"):
        raise ValueError(f"there is no variant '{variant}', only 'folded' and 'exact'")
    return variant == "folded"


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] → [M, K] whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _quantize(
    x: Tensor, norm: Tensor | None, eps: float, group_size: int, folded: bool
) -> tuple[Tensor, Tensor]:
    if not x.numel() or not runs_fp8_on(x.device):
        return quantize_reference(x, norm, eps, group_size, folded)
    from quantize.kernels.fp8 import launch

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return launch.quantize(x, norm, eps, group_size, folded)


_QUANTIZE = torch.library.custom_op("pq::quantize_tokens", _quantize, mutates_args=())


@_QUANTIZE.register_fake
def _(
    x: Tensor, norm: Tensor | None, eps: float, group_size: int, folded: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(
        x.shape[:1], dtype=torch.float32
    )
