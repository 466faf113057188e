"""Few rows times INT4 weights on a CPU, by an operator of torch that reads its own packed form.

In bfloat16 it takes 2.7, 0.4, 4.8 and 29 ms for 1, 4, 16 and 64 rows times a weight of 2048 × 2048 where
decoding by rows takes 23, 22, 25 and 36 (AVX-512, one thread); in other dtypes torch has a slow loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.packed_int import unpack_codes

_GROUPS = (32, 64, 128, 256)
_ROWS = 16  # that outputs must be a multiple of
# Rows of x up to which it is faster than decoding, which takes time once for all of them.
_FEW = 64
_VECTORS = ("AVX2", "AVX512")
"""What the operator was written for; elsewhere it is a loop over single weights."""


def can_repack(N: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether torch has such an operator here for a weight of N outputs and activations of `dtype`."""
    fits = dtype == torch.bfloat16 and group_size in _GROUPS and N % _ROWS == 0
    return fits and torch.backends.cpu.get_cpu_capability().startswith(_VECTORS)


def repack(packed: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """packed int32 [N, columns / 8] and scale bfloat16 [N, G] of `quantize.formats.packed_int` → the
    operator's weight, uint8 [N, columns / 2], and its scales and zero points, [G, N, 2]."""
    codes = unpack_codes(packed, 4, columns).to(torch.int32) + 8
    weight: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return weight, torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()


def prefers_repacked(x: Tensor) -> bool:
    """Whether the operator is faster for x [..., K] than decoding."""
    few = 0 < x.shape[:-1].numel() <= _FEW
    return few and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def multiply_repacked(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] times a weight of `repack`, plus bias [N] → [..., N] in bfloat16, as x is."""
    K, N = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, K).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, K // len(scale), scale)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.view(*x.shape[:-1], N)
