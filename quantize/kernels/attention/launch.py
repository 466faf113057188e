"""Starts the Triton kernels of attention on the INT4 cache and in FP8; importing
this module needs Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.kernels import combine_kernel, decode_kernel
from quantize.kernels.attention.kv_kernels import expand_kernel, store_kernel, unit_kernel
from quantize.kernels.attention.prefill_kernels import prefill_kernel
from quantize.kernels.attention.reference import View

# Queries of a key head, new tokens times heads, that decode_kernel takes: as many as a tile of it
# holds. It reads records as they are; for more queries it pays to expand them first.
FEW = 64
# Programs of decode_kernel for every multiprocessor: more parts hide more of the memory's latency,
# and make more for combine_kernel to add up.
_PER_PROCESSOR = 4
_INTERPRETED = not isinstance(combine_kernel, triton.JITFunction)
# the interpreter does not round to the nearest E4M3 value
_E4M3 = tl.float16 if _INTERPRETED else tl.float8e4nv
_LOG2E = math.log2(math.e)


def store(key: Tensor, value: Tensor, S: Tensor, keys: Tensor, values: Tensor, start: Tensor | None,
          scheme: KvScheme) -> None:  # fmt: skip
    """Write records of K·S and V [B, H, T, d] into keys and values
    [B, H, …, R] from token start[b] on."""
    B, H, T, _ = key.shape
    strides = (
        *key.stride()[:3],
        *value.stride()[:3],
        *keys.stride()[:2],
        *values.stride()[:2],
        keys.stride(2),
    )
    layout = head_layout(key.shape[3], scheme)
    store_kernel[triton.cdiv(T, 16), B * H](
        key, value, S, start, keys, values, H, T, *strides, **layout, BT=16
    )


def attend_records(query: Tensor, keys: Tensor, values: Tensor, S: Tensor, out: Tensor, scaling: float,
                   scheme: KvScheme, view: View) -> None:  # fmt: skip
    """Write attention to records into `out`; `view` is causal, window, mask
    [B, 1, T, L] and lengths."""
    if query.shape[1] // keys.shape[1] * query.shape[2] <= FEW:
        _decode(query, keys, values, S, out, scaling, scheme, view)
    else:
        codes = _expand(keys, values, view[3], query.shape[3], scheme)
        attend_codes(query, *codes, S, out, scaling, view)


def attend_codes(query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, unit: Tensor, S: Tensor, out: Tensor,
                 scaling: float, view: View) -> None:  # fmt: skip
    """Write attention to E4M3 keys, key_scale [B, H, G, L], and E4M3 or float16
    values, unit [B, H], into `out`."""
    (B, H, T, D), (L, G) = query.shape, (keys.shape[2], key_scale.shape[2])
    causal, window, mask, lengths = view
    fp8 = values.dtype == torch.float8_e4m3fn
    tile = _prefill_tile(T, D)
    strides = (*query.stride()[:3], *values.stride(), *out.stride()[:3], *_mask_strides(mask))
    prefill_kernel[triton.cdiv(T, tile["BM"]), H, B](
        query, S, keys, key_scale, values, unit, mask, lengths, out,
        keys.shape[1], H // keys.shape[1], T, L, window, scaling * _LOG2E, *strides,
        D=D, G=G, BG=triton.next_power_of_2(D // G), BD=triton.next_power_of_2(D), CAUSAL=causal,
        OPERAND=_E4M3, VALUE=_E4M3 if fp8 else tl.float16, **tile,
    )  # fmt: skip


def _decode(query: Tensor, keys: Tensor, values: Tensor, S: Tensor, out: Tensor, scaling: float, scheme: KvScheme,
            view: View) -> None:  # fmt: skip
    (B, H, T, D), (Hkv, L) = query.shape, keys.shape[1:3]
    causal, window, mask, lengths = view
    tile = _decode_tile(H // Hkv * T)
    span = L if window is None else min(L, window + T - 1 + tile["BN"])
    P, tiles = split_tiles(triton.cdiv(span, tile["BN"]), B * Hkv, query.device)
    parts = torch.empty(P, B * H * T, D, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, P, B * H * T, dtype=torch.float32, device=query.device).unbind()
    strides = (*query.stride()[:3], *keys.stride()[:2], *values.stride()[:2], *_mask_strides(mask))
    decode_kernel[P, B * Hkv](
        query, S, keys, values, mask, lengths, parts, tops, totals,
        Hkv, T, L, window, tiles, scaling * _LOG2E, *strides,
        R=H // Hkv, ROW=keys.stride(2), **head_layout(D, scheme), CAUSAL=causal, OPERAND=_E4M3, **tile,
    )  # fmt: skip
    BD = triton.next_power_of_2(D)
    combine_kernel[(B * H * T,)](
        parts, tops, totals, out, P, H, T, *out.stride()[:3], D=D, BD=BD, BP=16
    )


def _expand(
    keys: Tensor, values: Tensor, lengths: Tensor | None, D: int, scheme: KvScheme
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # What prefill_kernel reads: E4M3 codes and scales of keys, float16 values and their unit.
    (B, H, L, _), device, layout = keys.shape, keys.device, head_layout(D, scheme)
    codes = torch.empty(B, H, L, D, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(B, H, layout["G"], L, dtype=torch.float32, device=device)
    expanded = torch.empty(B, H, L, D, dtype=torch.float16, device=device)
    unit = torch.empty(B, H, dtype=torch.float32, device=device)
    strides = *keys.stride()[:2], *values.stride()[:2]
    unit_kernel[(B * H,)](
        values, lengths, unit, H, L, *strides[2:], ROW=keys.stride(2), **layout, BT=1024
    )
    expand_kernel[triton.cdiv(L, 64), B * H](
        keys,
        values,
        codes,
        scale,
        expanded,
        unit,
        H,
        L,
        *strides,
        ROW=keys.stride(2),
        **layout,
        BT=64,
    )
    return codes, scale, expanded, unit


def head_layout(D: int, scheme: KvScheme) -> dict[str, Any]:
    """Constants of a kernel that reads or writes records of heads of D channels."""
    G = D // scheme.group(D)
    BC = max(16, triton.next_power_of_2(D // G // 2))  # tl.dot adds at least 16 products
    return {
        "D": D,
        "G": G,
        "BC": BC,
        "SYMMETRIC": scheme.symmetric,
        "E4M3": scheme.scale_dtype == "e4m3",
    }


def _decode_tile(rows: int) -> dict[str, int]:
    BM = max(16, triton.next_power_of_2(rows))
    return {"BM": BM, "BN": 64, "num_warps": 8 if BM == 64 else 4, "num_stages": 3}


def _prefill_tile(T: int, D: int) -> dict[str, int]:
    # What registers hold: tensor cores that multiply values in E4M3 need room for their sums twice.
    if D > 128:
        return {"BM": 64, "BN": 64, "STAGES": 3, "num_warps": 8}
    if T <= 64:
        return {"BM": 64, "BN": 64, "STAGES": 3, "num_warps": 4}
    return {"BM": 128, "BN": 128 if D <= 64 else 64, "STAGES": 3, "num_warps": 8}


def split_tiles(tiles: int, sequences: int, device: torch.device) -> tuple[int, int]:
    """Parts that fill the device, and the tiles of each."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    each = triton.cdiv(tiles, max(1, processors * _PER_PROCESSOR // sequences))
    return triton.cdiv(tiles, each), each


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(2), mask.stride(3))
