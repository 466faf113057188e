"""Triton kernels that store keys and values as records of
`quantize/formats/kv4.py`, and read them back.

Bits are those of `kv4.quantize` on a CPU: divisions are IEEE ones, scales are rounded by integer
arithmetic. Channels 2j and 2j + 1 share a byte, so tiles hold even and odd channels apart.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """Float32 |x| < 2²² to the nearest integer, ties to even."""
    return (x + 12582912.0) - 12582912.0  # 1.5 · 2²³: sums have no room for a fraction


@triton.jit
def to_e4m3(x, OPERAND: tl.constexpr):
    """Float32 |x| ≤ 448 to the nearest E4M3 value, as OPERAND: float8e4nv, or a wider
    type (rounded by arithmetic)."""
    if tl.float8e4nv != OPERAND:
        # Three mantissa bits leave steps of an eighth of a power of two, and
        # 2⁻⁹ below the normal numbers.
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        inverse = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
        x = nearest(x * inverse) * step
    return x.to(OPERAND)


@triton.jit
def _stored_scale(scale, E4M3: tl.constexpr):
    # Nonnegative float32 as bits of the stored type: `kv4._representable`.
    if E4M3:
        rounded = tl.maximum(to_e4m3(tl.minimum(scale, 448.0), tl.float32), 0.001953125)
        normal = (rounded.to(tl.int32, bitcast=True) >> 20) - 960
        bits = tl.where(rounded < 0.015625, (rounded * 512.0).to(tl.int32), normal)
        nan = 0x7F
    else:
        wide = scale.to(tl.int32, bitcast=True)
        bits = tl.maximum((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16, 0x80)
        nan = 0x7FC0
    return tl.where(scale < float("inf"), bits, nan)


@triton.jit
def _scale(bits, E4M3: tl.constexpr):
    # Stored bits as float32.
    if E4M3:
        # The four exponent bits at their place in a float32 are 120 too low.
        value = (bits << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where(bits == 0x7F, float("nan"), value)
    else:
        value = (bits << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _load_scale(record, inside, group, D: tl.constexpr, E4M3: tl.constexpr):
    if E4M3:
        bits = tl.load(record + D // 2 + group, mask=inside, other=0).to(tl.int32)
    else:
        where = record + D // 2 + 2 * group
        low = tl.load(where, mask=inside, other=0).to(tl.int32)
        bits = low | (tl.load(where + 1, mask=inside, other=0).to(tl.int32) << 8)
    return _scale(bits, E4M3)


@triton.jit
def load_group(record, inside, group, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, SYMMETRIC: tl.constexpr,
               E4M3: tl.constexpr):  # fmt: skip
    """One group of records at the pointers `record` [BN] → its bytes uint8 [BN, BC], what nibbles
    exceed codes by, int8 [BN], and its scales, float32 [BN]; 0 outside.
    """
    BYTES: tl.constexpr = D // G // 2
    byte = tl.arange(0, BC)
    where = record[:, None] + group * BYTES + byte[None, :]
    packed = tl.load(where, mask=inside[:, None] & (byte < BYTES)[None, :], other=0)
    if SYMMETRIC:
        zero = tl.full(record.shape, 8, tl.int8)
    else:
        zero = tl.load(record + D // 2 + (1 if E4M3 else 2) * G + group, mask=inside, other=0).to(
            tl.int8
        )
    return packed, zero, _load_scale(record, inside, group, D, E4M3)


@triton.jit
def finite_exponent(scale):
    """Exponent bits of float32 scales ≥ 0, int32; 0 for NaN and infinity."""
    exponent = scale.to(tl.int32, bitcast=True) >> 23 & 0xFF
    return tl.where(exponent < 255, exponent, 0)


@triton.jit
def low_codes(packed, zero):
    """Codes of even channels, float16: integers −15 … 15."""
    return ((packed & 15).to(tl.int8) - zero[:, None]).to(tl.float16)


@triton.jit
def high_codes(packed, zero):
    """Codes of odd channels, float16: integers −15 … 15."""
    return ((packed >> 4).to(tl.int8) - zero[:, None]).to(tl.float16)


@triton.jit
def _nibbles(x, scale, zero, SYMMETRIC: tl.constexpr):
    # Float32 x [BT, BC] of one group as uint8 0 … 15.
    code = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if SYMMETRIC:
        nibble = nearest(tl.minimum(tl.maximum(code, -8.0), 7.0)) + 8.0
    else:
        nibble = nearest(tl.minimum(tl.maximum(code, -16.0), 16.0)) + zero[:, None]
        nibble = tl.minimum(tl.maximum(nibble, 0.0), 15.0)
    return tl.where(code == code, nibble, 0.0).to(tl.uint8)


@triton.jit
def store_group(
    even, odd, record, inside, group, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
    SYMMETRIC: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Round one group of BT tokens, its channels in two halves [BT, BC] padded with zeros, into
    their records."""
    BYTES: tl.constexpr = D // G // 2
    # NaN must show in the scale, but a maximum passes it over.
    broken = tl.max(((even != even) | (odd != odd)).to(tl.int32), axis=1) > 0
    if SYMMETRIC:
        top = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
        scale = tl.div_rn(top, tl.full(top.shape, 7.0, tl.float32))
    else:
        high = tl.maximum(tl.max(tl.maximum(even, odd), axis=1), 0.0)
        low = tl.minimum(tl.min(tl.minimum(even, odd), axis=1), 0.0)
        steps = tl.full(high.shape, 15.0, tl.float32)
        scale = tl.div_rn(high, steps) - tl.div_rn(low, steps)
    bits = _stored_scale(tl.where(broken, float("nan"), scale), E4M3)
    scale = _scale(bits, E4M3)
    zero = tl.zeros(scale.shape, tl.float32)
    if not SYMMETRIC:
        zero = tl.minimum(nearest(tl.minimum(tl.div_rn(-low, scale), 16.0)), 15.0)
        zero = tl.where(scale == scale, zero, 0.0)
    packed = _nibbles(even, scale, zero, SYMMETRIC) | (_nibbles(odd, scale, zero, SYMMETRIC) << 4)
    byte = tl.arange(0, BC)
    where = record[:, None] + group * BYTES + byte[None, :]
    tl.store(where, packed, mask=inside[:, None] & (byte < BYTES)[None, :])
    if E4M3:
        tl.store(record + D // 2 + group, bits.to(tl.uint8), mask=inside)
    else:
        tl.store(record + D // 2 + 2 * group, (bits & 0xFF).to(tl.uint8), mask=inside)
        tl.store(record + D // 2 + 2 * group + 1, (bits >> 8).to(tl.uint8), mask=inside)
    if not SYMMETRIC:
        tl.store(record + D // 2 + (1 if E4M3 else 2) * G + group, zero.to(tl.uint8), mask=inside)


@triton.jit
def halves(
    x,
    inside,
    group,
    factor,
    D: tl.constexpr,
    G: tl.constexpr,
    BC: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
):
    """Even and odd channels of one group of the tokens at `x` [BT], times `factor` [D]: two float32
    [BT, BC]."""
    BYTES: tl.constexpr = D // G // 2
    byte = tl.arange(0, BC)
    channel = group * 2 * BYTES + 2 * byte
    mask = inside[:, None] & (byte < BYTES)[None, :]
    even = tl.load(x[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(x[:, None] + channel[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        even *= tl.load(factor + channel, mask=byte < BYTES, other=1.0)[None, :]
        odd *= tl.load(factor + channel + 1, mask=byte < BYTES, other=1.0)[None, :]
    return even, odd


@triton.jit(do_not_specialize=["T"])
def store_kernel(
    key, value, S, start, keys, values,
    H, T, kb, kh, kt, vb, vh, vt, keys_b, keys_h, values_b, values_h, row,
    D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, SYMMETRIC: tl.constexpr, E4M3: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """keys and values [B, H, …, R] from token start[b] (or 0) on = records of
    key·S and value [B, H, T, D].

    The strides of key are kb, kh, kt, of records keys_b, keys_h and row; value and values alike.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    place = t.to(tl.int64) * row
    if start is not None:
        place += tl.load(start + b).to(tl.int64) * row
    for group in tl.static_range(G):
        even, odd = halves(
            key + b * kb + h * kh + t.to(tl.int64) * kt, t < T, group, S + h * D, D, G, BC, True
        )
        record = keys + b * keys_b + h * keys_h + place
        store_group(even, odd, record, t < T, group, D, G, BC, SYMMETRIC, E4M3)
        even, odd = halves(
            value + b * vb + h * vh + t.to(tl.int64) * vt, t < T, group, S, D, G, BC, False
        )
        record = values + b * values_b + h * values_h + place
        store_group(even, odd, record, t < T, group, D, G, BC, SYMMETRIC, E4M3)


@triton.jit(do_not_specialize=["L"])
def unit_kernel(
    values, lengths, unit, H, L, values_b, values_h,
    ROW: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, SYMMETRIC: tl.constexpr,
    E4M3: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """unit [B, H] = the power of two below the largest scale in the records of a head
    (NaN and infinity aside)."""
    if lengths is not None:
        L = tl.minimum(tl.load(lengths + tl.program_id(0) // H).to(tl.int32), L)
    head = (
        values + (tl.program_id(0) // H).to(tl.int64) * values_b + tl.program_id(0) % H * values_h
    )
    largest = tl.zeros((BT,), tl.int32)
    for start in range(0, L, BT):
        t = start + tl.arange(0, BT)
        for group in tl.static_range(G):
            scale = _load_scale(head + t.to(tl.int64) * ROW, t < L, group, D, E4M3)
            largest = tl.maximum(largest, finite_exponent(scale))
    exponent = tl.minimum(tl.maximum(tl.max(largest, axis=0), 1), 253)
    tl.store(unit + tl.program_id(0), (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["L"])
def expand_kernel(
    keys, values, key_codes, key_scale, value_codes, value_unit,
    H, L, keys_b, keys_h, values_b, values_h,
    ROW: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, SYMMETRIC: tl.constexpr,
    E4M3: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Records [B, H, L, R] → key_codes E4M3 [B, H, L, D] with key_scale [B, H, G, L],
    value_codes float16 [B, H, L, D].

    Values are divided by value_unit [B, H], a power of two near their largest scale: all codes but
    those of far smaller scales fit float16 exactly, asymmetric ones to 2⁻¹².
    """
    SIZE: tl.constexpr = D // G
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = t < L
    channel = tl.arange(0, 2 * BC)
    mask = inside[:, None] & (channel < SIZE)[None, :]
    unit = tl.load(value_unit + head)
    for group in tl.static_range(G):
        where = (head * L + t)[:, None] * D + group * SIZE + channel[None, :]
        record = keys + b * keys_b + h * keys_h + t.to(tl.int64) * ROW
        packed, zero, scale = load_group(record, inside, group, D, G, BC, SYMMETRIC, E4M3)
        codes = tl.interleave(low_codes(packed, zero), high_codes(packed, zero))
        tl.store(key_codes + where, codes.to(key_codes.dtype.element_ty), mask=mask)
        tl.store(key_scale + (head * G + group) * L + t, scale, mask=inside)
        record = values + b * values_b + h * values_h + t.to(tl.int64) * ROW
        packed, zero, scale = load_group(record, inside, group, D, G, BC, SYMMETRIC, E4M3)
        codes = tl.interleave(low_codes(packed, zero), high_codes(packed, zero)).to(tl.float32)
        tl.store(value_codes + where, (codes * (scale / unit)[:, None]).to(tl.float16), mask=mask)
