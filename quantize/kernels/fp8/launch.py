"""Starts the Triton kernel that rounds activations to E4M3; importing this module needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.fp8.kernels import quantize_kernel

_INTERPRETED = not isinstance(quantize_kernel, triton.JITFunction)
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def quantize(
    x: Tensor, norm: Tensor | None, eps: float, group_size: int, folded: bool
) -> tuple[Tensor, Tensor]:
    """What `quantize.kernels.fp8.reference.quantize_reference` computes;
    rows of x are contiguous."""
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    sizes: dict[str, Any] = (
        {"BK": 1024, "num_warps": 4} if K <= 1024 else {"BK": 4096, "num_warps": 8}
    )
    quantize_kernel[(M,)](
        x, norm, codes, scale, K, x.stride(0), eps,
        GS=group_size, FOLDED=folded, CASTS=not _INTERPRETED, DTYPE=_DTYPES[x.dtype], **sizes,
    )  # fmt: skip
    return codes, scale
