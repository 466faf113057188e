"""Starts the Triton kernels of routed experts; importing this module needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.experts.kernels import down_kernel, gate_up_kernel, group_kernel, mix_kernel

# Bytes of what lies between the kernels, 256 MB; more tokens than that go in turns. Less would
# launch more often, more would take what a model needs for itself.
_HELD = 1 << 28
_INTERPRETED = not isinstance(mix_kernel, triton.JITFunction)
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def routed_experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, most: int) -> Tensor:
    """x [M, D], its rows contiguous → [M, D]; the rest is checked by
    `quantize.kernels.experts.api.routed_experts`."""
    D, E = down.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    step = max(1, _HELD // (most * (E * x.element_size() + D * 4)))
    for first in range(0, len(x), step):
        turn = slice(first, first + step)
        _launch_turn(x[turn], weights[turn], gate_up, down, most, y[turn])
    return y


def _launch_turn(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, most: int, y: Tensor
) -> None:
    M, (N, D, E), device = len(x), down.shape, x.device
    R, PADDED = M * most, triton.next_power_of_2(N)
    first = torch.empty(N + 1, dtype=torch.int32, device=device)
    tokens = torch.empty(R, dtype=torch.int32, device=device)
    rows = torch.empty(M, N, dtype=torch.int32, device=device)
    hidden = torch.empty(R, E, dtype=x.dtype, device=device)
    parts = torch.empty(R, D, dtype=torch.float32, device=device)

    BT = min(triton.next_power_of_2(M), max(16, 2048 // PADDED))
    group_kernel[(N,)](weights, first, tokens, rows, M, N, R, PADDED=PADDED, BT=BT)
    tile = _tile(triton.cdiv(R, N), x.dtype)
    # The interpreter multiplies no bfloat16.
    tile["OPERAND"] = tl.float32 if _INTERPRETED else _OPERANDS[x.dtype]
    blocks = triton.cdiv(M, tile["BM"])
    gate_up_kernel[blocks, triton.cdiv(E, tile["BN"]), N](
        x, first, tokens, gate_up, hidden, D, E, x.stride(0), **tile
    )
    down_kernel[blocks, triton.cdiv(D, tile["BN"]), N](hidden, first, down, parts, D, E, **tile)
    BD = max(16, min(128, 8192 // PADDED))
    mix_kernel[M, triton.cdiv(D, BD)](parts, rows, weights, y, N, D, R, PADDED=PADDED, BD=BD)


def _tile(visitors: int, dtype: torch.dtype) -> dict[str, Any]:
    # For so many tokens an expert: few read weights, and want many small programs; many multiply.
    if dtype == torch.float32:  # no tensor cores: the tile is what registers hold
        return {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2}
    if visitors <= 32:
        return {
            "BM": 16 if visitors <= 16 else 32,
            "BN": 32,
            "BK": 128,
            "num_warps": 4,
            "num_stages": 4,
        }
    if visitors <= 128:
        return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
