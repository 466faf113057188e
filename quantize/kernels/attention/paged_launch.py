"""Starts the Triton kernels of attention on pages; importing this module needs Triton.

Grids depend on shapes alone, and nothing waits for the device: CUDA graphs can hold every launch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.kernels import combine_kernel
from quantize.kernels.attention.launch import head_layout, split_tiles
from quantize.kernels.attention.paged_kernels import attend_pages_kernel, store_pages_kernel

_INTERPRETED = not isinstance(combine_kernel, triton.JITFunction)
# the interpreter does not round to the nearest E4M3 value
_E4M3 = tl.float16 if _INTERPRETED else tl.float8e4nv
_LOG2E = math.log2(math.e)
_KEYS = 64  # of a tile
# Rows of a tile of queries: as many as one decoding step has, or what registers hold.
_FEWEST, _MOST = 16, 64


def store(
    key: Tensor, value: Tensor, S: Tensor, scheme: KvScheme, pages: Tensor, slots: Tensor
) -> None:
    """What `quantize.kernels.attention.paged.store_pages` does."""
    T, (_, H, D) = len(slots), key.shape
    strides = (*key.stride()[:2], *value.stride()[:2], *pages.stride()[:3])
    sizes = {"SIZE": pages.shape[2], "RECORD": scheme.record_bytes(D)}
    store_pages_kernel[triton.cdiv(T, 16), H](
        key, value, S, slots, pages, T, *strides, **sizes, **head_layout(D, scheme), BT=16
    )


def attend(
    query: Tensor,
    pages: Tensor,
    S: Tensor,
    scheme: KvScheme,
    scaling: float,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    window: int | None,
    most_new: int,
    most_tokens: int,
) -> None:
    """What `quantize.kernels.attention.paged.attend_pages` does.

    most_new and most_tokens: no sequence has more new tokens, or more in all.
    """
    (T, heads, D), (_, H, size, _) = query.shape, pages.shape
    B, R = len(lengths), heads // H
    BM = min(_MOST, max(_FEWEST, triton.next_power_of_2(R * most_new)))
    BM = max(BM, triton.next_power_of_2(R))
    queries = triton.cdiv(most_new, BM // R)
    span = most_tokens if window is None else min(most_tokens, window + BM // R + _KEYS)
    P, tiles = split_tiles(triton.cdiv(span, _KEYS), B * H * queries, query.device)
    parts = torch.empty(P, heads * T, D, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, P, heads * T, dtype=torch.float32, device=query.device).unbind()
    strides = (*query.stride()[:2], *pages.stride()[:3], table.stride(0))
    attend_pages_kernel[P, B * H, queries](
        query, S, pages, table, starts, lengths, parts, tops, totals,
        H, T, window, tiles, scaling * _LOG2E, *strides,
        R=R, SIZE=size, RECORD=scheme.record_bytes(D), **head_layout(D, scheme), OPERAND=_E4M3, BM=BM, BN=_KEYS,
        num_warps=8 if BM == _MOST else 4, num_stages=3,
    )  # fmt: skip
    BD = triton.next_power_of_2(D)
    combine_kernel[(heads * T,)](
        parts, tops, totals, out, P, heads, T, 0, out.stride(1), out.stride(0), D=D, BD=BD, BP=16
    )
