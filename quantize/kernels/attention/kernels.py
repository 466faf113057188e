"""Triton kernels of attention with E4M3 queries and probabilities;
`attention_launch.py` starts them.

Softmax runs online in units of log₂, and the maximum that probabilities are taken against is
rounded up to an integer: a later, larger one rescales by a power of two, which no E4M3 rounding
notices but that of subnormals (below 2⁻¹⁵ of the largest probability, where an earlier maximum
rounds finer). So neither tiles nor splits change how probabilities round.

`decode_kernel` reads records of `quantize/formats/kv4.py` as they stand. Programs share a
sequence, and `combine_kernel` adds their parts in a fixed order: results are the same in every
run. The query heads that share a key head, and the few new tokens, are the rows of one tile. Codes
are exact in float16, and scales of values meet the probabilities, relative to the power of two of
the tile's largest, with 11 bits.

Lengths are not specialized on: a growing cache runs one compiled kernel.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from quantize.kernels.attention.kv_kernels import (
    finite_exponent,
    high_codes,
    load_group,
    low_codes,
    to_e4m3,
)


@triton.jit
def channels(query, inside, S, first, STEP: tl.constexpr, COUNT: tl.constexpr, BC: tl.constexpr):
    """Channels first, first + STEP, … of the queries at `query` [BM], over S:
    float32 [BM, BC], 0 outside."""
    channel = tl.arange(0, BC)
    mask = inside[:, None] & (channel < COUNT)[None, :]
    x = tl.load(query[:, None] + first + STEP * channel[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    over = tl.load(S + first + STEP * channel, mask=channel < COUNT, other=1.0)
    return tl.div_rn(x, tl.broadcast_to(over[None, :], x.shape))


@triton.jit
def _largest(x, y):
    return tl.maximum(tl.max(tl.abs(x), axis=1), tl.max(tl.abs(y), axis=1))


@triton.jit
def query_scale(top):
    """Scales [BM] of queries in E4M3 whose largest channels are `top`:
    `fp8.quantize_activations`."""
    return tl.maximum(tl.div_rn(top, tl.full(top.shape, 448.0, tl.float32)), 1.0 / 229376.0)


@triton.jit
def quantize_rows(x, scale, OPERAND: tl.constexpr):
    """x [BM, BC] over scale [BM] in E4M3."""
    return to_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), OPERAND)


@triton.jit
def visible(s, t, length, T, window, mask, mask_t, mask_s, CAUSAL: tl.constexpr):
    """Which tokens s [BN] the queries t [BM] see: [BM, BN]. The last query
    stands at the last token."""
    place = length - T + t
    seen = (s < length)[None, :] & (t < T)[:, None]
    if CAUSAL:
        seen = seen & (s[None, :] <= place[:, None])
    if window is not None:
        seen = seen & (s[None, :] > place[:, None] - window)
    if mask is not None:
        where = mask + t.to(tl.int64)[:, None] * mask_t + s[None, :] * mask_s
        seen = seen & (tl.load(where, mask=seen, other=0) != 0)
    return seen


@triton.jit
def softmax(scores, top, total):
    """One step of online softmax, scores in log₂ → weights, top, total, factor
    of what was summed before."""
    new = tl.maximum(top, tl.ceil(tl.max(scores, axis=1)))
    base = tl.where(new == float("-inf"), 0.0, new)
    factor = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    return weights, new, total * factor + tl.sum(weights, axis=1), factor


@triton.jit
def query_halves(
    query, inside, S, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, OPERAND: tl.constexpr
):
    """Q / S of the queries at `query` [BM] rounded to E4M3, as float16 [BM, BC]: even and odd channels
    of the first group and of the last one; and their scale [BM]."""
    BYTES: tl.constexpr = D // G // 2
    even0, odd0 = (
        channels(query, inside, S, 0, 2, BYTES, BC),
        channels(query, inside, S, 1, 2, BYTES, BC),
    )
    even1, odd1 = even0, odd0
    largest = _largest(even0, odd0)
    if G == 2:
        even1 = channels(query, inside, S, 2 * BYTES, 2, BYTES, BC)
        odd1 = channels(query, inside, S, 2 * BYTES + 1, 2, BYTES, BC)
        largest = tl.maximum(largest, _largest(even1, odd1))
    scale = query_scale(largest)
    even0, odd0 = quantize_rows(even0, scale, OPERAND), quantize_rows(odd0, scale, OPERAND)
    even1, odd1 = quantize_rows(even1, scale, OPERAND), quantize_rows(odd1, scale, OPERAND)
    return (
        even0.to(tl.float16),
        odd0.to(tl.float16),
        even1.to(tl.float16),
        odd1.to(tl.float16),
        scale,
    )


@triton.jit
def group_scores(even, odd, packed, zero, scale):
    """Products of one group of queries, in halves [BM, BC], with packed keys [BN, BC] times scale:
    float32 [BM, BN]."""
    product = tl.dot(even, tl.trans(low_codes(packed, zero)))  # [BM, BC] @ [BC, BN] → [BM, BN]
    return tl.dot(odd, tl.trans(high_codes(packed, zero)), product) * scale[None, :]


@triton.jit
def mix(even, odd, weights, factor, packed, zero, scale):
    """Sums of one group of values [BM, BC], in halves, times `factor`, plus weights [BM, BN] times
    packed values."""
    exponent = tl.minimum(tl.maximum(tl.max(finite_exponent(scale), axis=0), 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = (weights * (scale * inverse)[None, :]).to(tl.float16)
    # [BM, BN] @ [BN, BC] → [BM, BC]
    even = even * factor[:, None] + tl.dot(scaled, low_codes(packed, zero)) * unit
    odd = odd * factor[:, None] + tl.dot(scaled, high_codes(packed, zero)) * unit
    return even, odd


@triton.jit(do_not_specialize=["T", "L", "window", "tiles"])
def decode_kernel(
    query, S, keys, values, mask, lengths, parts, tops, totals,
    H, T, L, window, tiles, scaling, qb, qh, qt, keys_b, keys_h, values_b, values_h, mask_b, mask_t, mask_s,
    R: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
    SYMMETRIC: tl.constexpr, E4M3: tl.constexpr, CAUSAL: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """parts [P, B, H·R, T, D], tops and totals [P, B, H·R, T] of this
    program's tiles; scaling is in log₂.

    Records have the strides keys_b, keys_h and ROW bytes; H counts key
    heads, each read by R query heads.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    m = tl.arange(0, BM)
    t = m % T
    live = m < R * T
    rows = query + b * qb + (h * R + m // T).to(tl.int64) * qh + t.to(tl.int64) * qt
    even0, odd0, even1, odd1, scale = query_halves(rows, live, S + h * D, D, G, BC, OPERAND)
    scale *= scaling
    if mask is not None:
        mask += b * mask_b
    length = L
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + b).to(tl.int32), L)
    first = tl.program_id(0) * tiles * BN
    if window is not None:
        first += tl.maximum(length - T - window + 1, 0) // BN * BN
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mixed_even0, mixed_odd0 = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    mixed_even1, mixed_odd1 = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(first, tl.minimum(first + tiles * BN, length), BN):
        s = start + tl.arange(0, BN)
        inside = s < length
        key = keys + b * keys_b + h * keys_h + s.to(tl.int64) * ROW
        value = values + b * values_b + h * values_h + s.to(tl.int64) * ROW
        # All is asked for at once: values arrive while scores are computed.
        k0, key_zero0, key_scale0 = load_group(key, inside, 0, D, G, BC, SYMMETRIC, E4M3)
        v0, value_zero0, value_scale0 = load_group(value, inside, 0, D, G, BC, SYMMETRIC, E4M3)
        if G == 2:
            k1, key_zero1, key_scale1 = load_group(key, inside, 1, D, G, BC, SYMMETRIC, E4M3)
            v1, value_zero1, value_scale1 = load_group(value, inside, 1, D, G, BC, SYMMETRIC, E4M3)
        scores = group_scores(even0, odd0, k0, key_zero0, key_scale0)
        if G == 2:
            scores += group_scores(even1, odd1, k1, key_zero1, key_scale1)
        seen = visible(s, tl.where(live, t, T), length, T, window, mask, mask_t, mask_s, CAUSAL)
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
    row = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * R * T + m
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


@triton.jit(do_not_specialize=["P", "T"])
def combine_kernel(
    parts, tops, totals, out,
    P, H, T, ob, oh, ot,
    D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, D] = what the P parts of `decode_kernel` come to; a query
    that saw nothing gives zeros."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channel = tl.arange(0, BD)
    top = tl.full((BP,), float("-inf"), tl.float32)
    for start in range(0, P, BP):
        part = start + tl.arange(0, BP)
        top = tl.maximum(
            top, tl.load(tops + part.to(tl.int64) * rows + row, mask=part < P, other=float("-inf"))
        )
    base = tl.max(top, axis=0)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.zeros((BP,), tl.float32)
    mixed = tl.zeros((BP, BD), tl.float32)
    for start in range(0, P, BP):
        part = start + tl.arange(0, BP)
        where = part.to(tl.int64) * rows + row
        factor = tl.exp2(tl.load(tops + where, mask=part < P, other=float("-inf")) - base)
        total += factor * tl.load(totals + where, mask=part < P, other=0.0)
        inside = (part < P)[:, None] & (channel < D)[None, :]
        mixed += factor[:, None] * tl.load(
            parts + where[:, None] * D + channel[None, :], mask=inside, other=0.0
        )
    share = tl.sum(mixed, axis=0) / (
        tl.maximum(tl.sum(total, axis=0), 1.1754943508222875e-38) * 448.0
    )
    b = row // T // H
    h = row // T % H
    t = row % T
    tl.store(
        out + b * ob + h * oh + t * ot + channel, share.to(out.dtype.element_ty), mask=channel < D
    )
