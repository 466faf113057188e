"""Triton kernel of attention for many queries, in FP8; `attention_launch.py` starts it.

Keys are multiplied in E4M3 on FP8 tensor cores, values in float16 (dequantized INT4) or E4M3.
Tiles of both are asked for three at a time (FireQ, arXiv 2505.20839, keeps as many). Softmax is
that of `attention_kernels.py`.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from quantize.kernels.attention.kernels import (
    channels,
    quantize_rows,
    query_scale,
    softmax,
    visible,
)
from quantize.kernels.attention.kv_kernels import to_e4m3


@triton.jit
def _tiles(
    first, last, query0, query1, scale, t, keys, key_scale, values, mask, mixed, top, total,
    length, L, T, window, vs, vd, mask_t, mask_s,
    EDGE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    OPERAND: tl.constexpr, VALUE: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Attention of one tile of queries to tokens first … last; EDGE: where some may
    # not be seen or are not there.
    SIZE: tl.constexpr = D // G
    group, channel = tl.arange(0, BG), tl.arange(0, BD)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        s = start + tl.arange(0, BN)
        # Whole tiles need no mask, which would take loads along s apart.
        inside = s < length if EDGE else tl.full((BN,), True, tl.int1)
        place = keys + s.to(tl.int64)[None, :] * D + group[:, None]
        mask_k = (group < SIZE)[:, None] & inside[None, :]
        key = tl.load(place, mask=mask_k, other=0.0).to(OPERAND)
        scores = tl.dot(query0, key)  # [BM, BG] @ [BG, BN] → [BM, BN]
        scores *= tl.load(key_scale + s, mask=inside, other=0.0)[None, :]
        if G == 2:
            key = tl.load(place + SIZE, mask=mask_k, other=0.0).to(OPERAND)
            scores += (
                tl.dot(query1, key) * tl.load(key_scale + L + s, mask=inside, other=0.0)[None, :]
            )
        scores *= scale[:, None]
        if EDGE:
            seen = visible(s, t, length, T, window, mask, mask_t, mask_s, CAUSAL)
            scores = tl.where(seen, scores, float("-inf"))
        weights, top, total, factor = softmax(scores, top, total)
        place = values + s.to(tl.int64)[:, None] * vs + channel[None, :] * vd
        value = tl.load(place, mask=inside[:, None] & (channel < D)[None, :], other=0.0).to(VALUE)
        weights = to_e4m3(weights * 448.0, OPERAND).to(VALUE)
        # FP8 tensor cores add with 14 bits: each tile starts anew.
        # [BM, BN] @ [BN, BD]
        mixed = tl.dot(weights, value, mixed * factor[:, None], max_num_imprecise_acc=BN)
    return mixed, top, total


@triton.jit(do_not_specialize=["T", "L", "window"])
def prefill_kernel(
    query, S, keys, key_scale, values, value_unit, mask, lengths, out,
    H, R, T, L, window, scaling, qb, qh, qt, vb, vh, vs, vd, ob, oh, ot, mask_b, mask_t, mask_s,
    D: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr,
    OPERAND: tl.constexpr, VALUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [B, H·R, T, D] from E4M3 keys [B, H, L, D] with key_scale [B, H, G, L] and
    values over value_unit [B, H].

    H counts key heads, each read by R query heads; scaling is in log₂.
    """
    SIZE: tl.constexpr = D // G
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    h, b = tl.program_id(1) // R, tl.program_id(2).to(tl.int64)
    head = b * H + h
    t = tile * BM + tl.arange(0, BM)
    rows = query + b * qb + tl.program_id(1).to(tl.int64) * qh + t.to(tl.int64) * qt
    x0 = channels(rows, t < T, S + h * D, 0, 1, SIZE, BG)
    largest = tl.max(tl.abs(x0), axis=1)
    if G == 2:
        x1 = channels(rows, t < T, S + h * D, SIZE, 1, SIZE, BG)
        largest = tl.maximum(largest, tl.max(tl.abs(x1), axis=1))
    scale = query_scale(largest)
    query0 = quantize_rows(x0, scale, OPERAND)
    query1 = query0
    if G == 2:
        query1 = quantize_rows(x1, scale, OPERAND)
    scale *= scaling
    length = L
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + b).to(tl.int32), L)
    if mask is not None:
        mask += b * mask_b
    keys += head * L * D
    key_scale += head * G * L
    values += b * vb + h * vh
    # All queries of the tile see the tokens before `whole`, and none those
    # before `first` and from `last` on.
    first, whole, last = 0, length, length
    if CAUSAL:
        whole = length - T + tile * BM + 1
        last = tl.maximum(tl.minimum(length - T + tile * BM + BM, length), 0)
    if window is not None:
        first = tl.maximum(length - T + tile * BM - window + 1, 0) // BN * BN
    whole = tl.maximum(whole, 0) // BN * BN
    mixed = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if mask is None and window is None:
        mixed, top, total = _tiles(
            0, whole, query0, query1, scale, t, keys, key_scale, values, mask, mixed, top, total,
            length, L, T, window, vs, vd, mask_t, mask_s,
            False, D, G, BG, BD, CAUSAL, OPERAND, VALUE, BN, STAGES,
        )  # fmt: skip
        first = whole
    mixed, top, total = _tiles(
        first, last, query0, query1, scale, t, keys, key_scale, values, mask, mixed, top, total,
        length, L, T, window, vs, vd, mask_t, mask_s,
        True, D, G, BG, BD, CAUSAL, OPERAND, VALUE, BN, STAGES,
    )  # fmt: skip
    unit = tl.load(value_unit + head)
    mixed = mixed / (tl.maximum(total, 1.1754943508222875e-38) * 448.0)[:, None] * unit
    channel = tl.arange(0, BD)
    where = (
        b * ob
        + tl.program_id(1).to(tl.int64) * oh
        + t.to(tl.int64)[:, None] * ot
        + channel[None, :]
    )
    tl.store(
        out + where, mixed.to(out.dtype.element_ty), mask=(t < T)[:, None] & (channel < D)[None, :]
    )
