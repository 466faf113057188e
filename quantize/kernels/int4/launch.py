"""Starts the Triton kernels of products with packed INT4 weights; importing
this module needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.kernels.int4.kernels import fold_kernel, int4_kernel, int4_sum_kernel
from quantize.kernels.int4.reference import Weight

_LEAST = 4  # groups of a part: fewer would not keep the pipeline of loads full
_INTERPRETED = not isinstance(int4_sum_kernel, triton.JITFunction)
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Tile:
    """How a product is cut into programs."""

    rows: int | None
    """Rows of x up to which it is used; None: any number."""
    BN: int
    """Rows of weights of a program."""
    BM: int
    """Rows of x of a program."""
    num_warps: int
    num_stages: int
    programs: int
    """Programs that a multiprocessor runs at once: so far the inputs are split
    where the outputs are few."""


_FEW = (Tile(16, 64, 16, 4, 5, 4), Tile(32, 64, 32, 4, 4, 3), Tile(64, 64, 64, 4, 4, 2))
TILES: dict[torch.dtype, tuple[Tile, ...]] = {
    torch.float8_e4m3fn: (*_FEW, Tile(None, 128, 128, 8, 4, 1)),
    torch.bfloat16: (*_FEW, Tile(None, 128, 128, 8, 3, 1)),
    torch.float16: (*_FEW, Tile(None, 128, 128, 8, 3, 1)),
    # no tensor cores: the tile is what registers hold
    torch.float32: (Tile(None, 32, 16, 4, 1, 4),),
}
"""The tiles that kernels are compiled for, by the dtype of x;
tests/kernels/test_int4_kernels.py runs each of them."""


def tile_for(M: int, dtype: torch.dtype) -> Tile:
    """The tile for M rows of x of this dtype."""
    return next(tile for tile in TILES[dtype] if tile.rows is None or tile.rows >= M)


def multiply(
    x: Tensor,
    token_scale: Tensor | None,
    weights: Sequence[Weight],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x [M, K], its rows contiguous → [M, N] in dtype, of one weight, or of gate and up.

    What it takes is checked by `quantize.kernels.int4.api`.
    """
    (N, G), (M, K), gated = weights[0].scale.shape, x.shape, len(weights) == 2
    tile = tile_for(M, x.dtype)
    tiles = triton.cdiv(N * len(weights), tile.BN), triton.cdiv(M, tile.BM)
    P, groups = _split(G, tiles[0] * tiles[1], tile.programs, x.device)
    width = N if P == 1 else N * len(weights)
    out = torch.empty(P, M, width, dtype=dtype if P == 1 else torch.float32, device=x.device)
    fp8 = x.dtype == torch.float8_e4m3fn
    # the interpreter multiplies no bfloat16
    operand = tl.float32 if _INTERPRETED or fp8 else _OPERANDS[x.dtype]
    up = weights[1] if gated else (None, None, None)
    int4_kernel[(*tiles, P)](
        x, token_scale, *weights[0], *up, bias, out, M, N, G, x.stride(0), groups,
        FP8=fp8, FOLDED=weights[0].factor is not None, GATED=gated, WHOLE=P == 1, CASTS=not _INTERPRETED, GS=K // G,
        DTYPE=tl.float8e4nv if fp8 else _OPERANDS[x.dtype], OPERAND=operand,
        BN=tile.BN, BM=tile.BM, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out.view(M, N) if P == 1 else _sum(out, bias, N, dtype)


def fold(scale: Tensor) -> tuple[Tensor, Tensor]:
    """What `quantize.kernels.int4.reference.fold_reference` computes."""
    N, G = scale.shape
    s8 = torch.empty(N, G, dtype=torch.float16, device=scale.device)
    factor = torch.empty(N, dtype=torch.float32, device=scale.device)
    fold_kernel[(triton.cdiv(N, 16),)](scale, s8, factor, N, G, BN=16, BG=32, num_warps=4)
    return s8, factor


def _split(G: int, tiles: int, programs: int, device: torch.device) -> tuple[int, int]:
    # Parts that fill the device, and the groups of each: so many at least that
    # several loads are under way.
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    groups = max(_LEAST, triton.cdiv(G, max(1, processors * programs // tiles)))
    return triton.cdiv(G, groups), groups


def _sum(parts: Tensor, bias: Tensor | None, N: int, dtype: torch.dtype) -> Tensor:
    P, M, width = parts.shape
    y = torch.empty(M, N, dtype=dtype, device=parts.device)
    sizes: dict[str, Any] = {"GATED": width != N, "BN": 128}
    int4_sum_kernel[triton.cdiv(N, 128), M](parts, bias, y, P, M, N, **sizes)
    return y
