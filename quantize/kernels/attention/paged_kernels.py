"""Triton kernels of attention on an INT4 KV cache in pages (`paged.py`); `paged_launch.py` starts them.

Sequences of any lengths, each with as many new tokens as it has, are one launch: a program finds its queries by
`starts` and its records by the block table. Numerics are those of `kernels.py`.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from quantize.kernels.attention.kernels import group_scores, mix, query_halves, softmax, visible
from quantize.kernels.attention.kv_kernels import halves, load_group, store_group, to_e4m3


@triton.jit(do_not_specialize=["T"])
def store_pages_kernel(
    key, value, S, slots, pages, T, kt, kh, vt, vh, page_bytes, head_bytes, cell_bytes,
    SIZE: tl.constexpr, RECORD: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
    SYMMETRIC: tl.constexpr, E4M3: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Records of key·S and value [T, H, D] into slots [T] of pages of SIZE tokens; negative ones: nowhere."""
    t, h = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1)
    slot = tl.load(slots + t, mask=t < T, other=-1).to(tl.int64)
    held = slot >= 0
    slot = tl.maximum(slot, 0)
    cell = pages + slot // SIZE * page_bytes + h * head_bytes + slot % SIZE * cell_bytes
    for group in tl.static_range(G):
        at = key + t.to(tl.int64) * kt + h * kh
        even, odd = halves(at, held, group, S + h * D, D, G, BC, True)
        store_group(even, odd, cell, held, group, D, G, BC, SYMMETRIC, E4M3)
        at = value + t.to(tl.int64) * vt + h * vh
        even, odd = halves(at, held, group, S, D, G, BC, False)
        store_group(even, odd, cell + RECORD, held, group, D, G, BC, SYMMETRIC, E4M3)


@triton.jit(do_not_specialize=["T", "window", "tiles"])
def attend_pages_kernel(
    query, S, pages, table, starts, lengths, parts, tops, totals,
    H, T, window, tiles, scaling, qt, qh, page_bytes, head_bytes, cell_bytes, table_row,
    R: tl.constexpr, SIZE: tl.constexpr, RECORD: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
    SYMMETRIC: tl.constexpr, E4M3: tl.constexpr, OPERAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """parts [P, H·R, T, D], tops and totals [P, H·R, T] of this program's tiles of keys; scaling is in log₂.

    T: queries of all sequences. H counts key heads, each read by R query heads. A program has BM // R new tokens
    of one sequence.
    """
    TOKENS: tl.constexpr = BM // R
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    begin = tl.load(starts + b).to(tl.int32)
    new = tl.load(starts + b + 1).to(tl.int32) - begin
    length = tl.load(lengths + b).to(tl.int32)
    m = tl.arange(0, BM)
    tile = tl.program_id(2) * TOKENS
    t = tile + m // R
    live = (m < TOKENS * R) & (t < new)
    head = h * R + m % R
    rows = query + (begin + t).to(tl.int64) * qt + head.to(tl.int64) * qh
    even0, odd0, even1, odd1, scale = query_halves(rows, live, S + h * D, D, G, BC, OPERAND)
    scale *= scaling
    first = tl.program_id(0) * tiles * BN
    if window is not None:
        first += tl.maximum(length - new + tile - window + 1, 0) // BN * BN
    # Nothing behind the last query of the tile is seen; a tile without queries reads nothing.
    last = tl.minimum(length, length - new + tile + TOKENS)
    last = tl.where(tile < new, tl.minimum(first + tiles * BN, last), 0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mixed_even0, mixed_odd0 = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    mixed_even1, mixed_odd1 = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(first, last, BN):
        s = start + tl.arange(0, BN)
        inside = s < length
        page = tl.load(table + b * table_row + s // SIZE, mask=inside, other=0).to(tl.int64)
        key = pages + page * page_bytes + h * head_bytes + (s % SIZE).to(tl.int64) * cell_bytes
        value = key + RECORD
        k0, key_zero0, key_scale0 = load_group(key, inside, 0, D, G, BC, SYMMETRIC, E4M3)
        v0, value_zero0, value_scale0 = load_group(value, inside, 0, D, G, BC, SYMMETRIC, E4M3)
        if G == 2:
            k1, key_zero1, key_scale1 = load_group(key, inside, 1, D, G, BC, SYMMETRIC, E4M3)
            v1, value_zero1, value_scale1 = load_group(value, inside, 1, D, G, BC, SYMMETRIC, E4M3)
        scores = group_scores(even0, odd0, k0, key_zero0, key_scale0)
        if G == 2:
            scores += group_scores(even1, odd1, k1, key_zero1, key_scale1)
        seen = visible(s, tl.where(live, t, new), length, new, window, None, 0, 0, True)
        scores = tl.where(seen, scores * scale[:, None], float("-inf"))
        weights, top, total, factor = softmax(scores, top, total)
        weights = to_e4m3(weights * 448.0, OPERAND).to(tl.float32)
        mixed_even0, mixed_odd0 = mix(
            mixed_even0, mixed_odd0, weights, factor, v0, value_zero0, value_scale0
        )
        if G == 2:
            mixed_even1, mixed_odd1 = mix(
                mixed_even1, mixed_odd1, weights, factor, v1, value_zero1, value_scale1
            )
    row = (tl.program_id(0) * H * R + head).to(tl.int64) * T + begin + t
    tl.store(tops + row, top, mask=live)
    tl.store(totals + row, total, mask=live)
    byte = tl.arange(0, BC)
    where = parts + row[:, None] * D + 2 * byte[None, :]
    inside = live[:, None] & (byte < D // G // 2)[None, :]
    tl.store(where, mixed_even0, mask=inside)
    tl.store(where + 1, mixed_odd0, mask=inside)
    if G == 2:
        tl.store(where + D // 2, mixed_even1, mask=inside)
        tl.store(where + D // 2 + 1, mixed_odd1, mask=inside)
