"""Starts the Triton kernels that multiply with `bitvec` weights; importing
this module needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.formats.bitvec import groups_per_row
from quantize.kernels.bitvec.kernels import decode_kernel, planes_kernel, sum_kernel

# Rows of x that planes_kernel takes: it multiplies every bit plane, so its work grows with bits
# times rows, where decode_kernel decodes once for all rows.
_FEW = 16
_PER_PROCESSOR = 6  # programs of planes_kernel that a multiprocessor's registers hold at once
_HALVES = 0x00010001  # the lowest bit of both halves of a word
_INTERPRETED = not isinstance(sum_kernel, triton.JITFunction)
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def multiply(
    x: Tensor,
    planes: Tensor,
    index: Tensor,
    lines: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [M, K], its rows contiguous → [M, N]; what it takes is checked by
    `quantize.kernels.bitvec.api.multiply`."""
    # Triton reads no torch.uint16
    index = index.view(torch.int16) if index.dtype == torch.uint16 else index
    weight = (planes, index, lines, scales)
    layout = {"BITS": bits, "GS": group_size, "COEFS": lines.shape[1], "Z": scales.shape[0]}
    if len(x) <= _FEW and x.dtype != torch.float32:
        return _by_planes(x, weight, bias, layout)
    return _by_tiles(x, weight, bias, layout)


def _by_planes(
    x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, layout: dict[str, int]
) -> Tensor:
    (M, K), N, bits = x.shape, len(weight[0]), layout["BITS"]
    BM, BR = (8, 256) if M <= 8 else (16, 128)  # what two warps hold in registers
    G, tiles = groups_per_row(K, layout["GS"]), triton.cdiv(N * bits, BR)
    P, groups = _split(G, tiles, x.device)
    fold = bits & (bits - 1) == 0
    parts = torch.empty(P, M, N, 1 if fold else bits, dtype=torch.float32, device=x.device)
    sizes = (M, N, K, G, x.stride(0), weight[0].shape[1], groups)
    tile = {"BR": BR, "BM": BM, "num_warps": 2, "num_stages": 3}
    planes_kernel[tiles, P](x, *weight, parts, *sizes, _HALVES, **layout, FOLD=fold, **tile)
    return _sum(parts, bias, x.dtype)


def _by_tiles(
    x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, layout: dict[str, int]
) -> Tensor:
    (M, K), N = x.shape, len(weight[0])
    G, tile = groups_per_row(K, layout["GS"]), _tile(M, x.dtype)
    tiles = triton.cdiv(N, tile["BN"]), triton.cdiv(M, tile["BM"])
    P, groups = _split(G, tiles[0] * tiles[1], x.device)
    out = torch.empty(P, M, N, 1, dtype=x.dtype if P == 1 else torch.float32, device=x.device)
    sizes = (M, N, K, G, x.stride(0), weight[0].shape[1], groups)
    # the interpreter multiplies no bfloat16
    operand = tl.float32 if _INTERPRETED else _OPERANDS[x.dtype]
    decode_kernel[(*tiles, P)](
        x, *weight, bias, out, *sizes, **layout, WHOLE=P == 1, OPERAND=operand, **tile
    )
    return out.view(M, N) if P == 1 else _sum(out, bias, x.dtype)


def _tile(M: int, dtype: torch.dtype) -> dict[str, Any]:
    if dtype == torch.float32:  # no tensor cores: the tile is what registers hold
        return {"BN": 32, "BM": 16, "num_warps": 4, "num_stages": 1}
    if M <= 64:
        return {"BN": 64, "BM": 32 if M <= 32 else 64, "num_warps": 4, "num_stages": 3}
    return {"BN": 128, "BM": 128, "num_warps": 8, "num_stages": 3}


def _split(G: int, tiles: int, device: torch.device) -> tuple[int, int]:
    # Parts that fill the device, and the groups of each.
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    groups = triton.cdiv(G, max(1, processors * _PER_PROCESSOR // tiles))
    return triton.cdiv(G, groups), groups


def _sum(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    P, M, N, planes = parts.shape
    y = torch.empty(M, N, dtype=dtype, device=parts.device)
    PADDED = triton.next_power_of_2(planes)
    sum_kernel[triton.cdiv(N, 128), M](
        parts, bias, y, P, M, N, PLANES=planes, PADDED=PADDED, BN=128
    )
    return y
