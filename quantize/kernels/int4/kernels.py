"""Triton kernels of products with packed INT4 weights; `int4_launch.py` starts them,
`int4_reference.py` is their twin.

Weights are the left factor, so that tensor cores take them from the registers where they were
decoded, and whatever the number of rows of x. Of a group's words a thread holds those next to each
other, and the order of a sum is free: x comes in the order in which words fall apart into operands
(`eights` and `pairs` below), so no weight moves between threads.

E4M3 operands: a byte that holds 0 … 8 is the E4M3 number of 2⁻⁹ times as much, so the integers −8 …
7 become operands by arithmetic on four bytes at once. Then each group's float32 sum meets its scale
(`exact`). Or each weight is the rounded product E4M3(q · s8) and a row has one factor (`FOLDED`;
FireQ, arXiv 2505.20839, and vLLM). Tensor cores add
E4M3 products in fewer than 24 bits: a group's sum is the longest that they keep.

16-bit operands: a nibble in the mantissa of 1024 (float16) or 128 (bfloat16),
which is then subtracted: exact.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from quantize.kernels.fp8.kernels import as_e4m3, rounded_e4m3


@triton.jit
def _runs(words, BN: tl.constexpr, GS: tl.constexpr):
    # Words [BN, GS/8] of a group as [BN, V, T]: one of four threads T
    # holds V that follow each other.
    return tl.permute(tl.reshape(words, (BN, 4, GS // 32)), (0, 2, 1))


@triton.jit
def _decode_four(fours):
    # Four bytes q + 8 → four E4M3 numbers q · 2⁻⁹: the sign bit and |q|.
    negative = ((fours >> 3) & 0x01010101) ^ 0x01010101
    return ((fours & 0x07070707) ^ (negative * 7)) + negative * 129


@triton.jit
def eights(words, BN: tl.constexpr, GS: tl.constexpr):
    """Words [BN, GS/8] → E4M3 [BN, GS] of q · 2⁻⁹, nibble 4c + 2b + h of word V·t + v
    at place (v, h, t, c, b)."""
    words = _runs(words, BN, GS)
    # [BN, V, T, h]
    fours = tl.join(_decode_four(words & 0x0F0F0F0F), _decode_four((words >> 4) & 0x0F0F0F0F))
    low = tl.join(fours.to(tl.int8), (fours >> 8).to(tl.int8))
    high = tl.join((fours >> 16).to(tl.int8), (fours >> 24).to(tl.int8))
    octets = tl.permute(tl.join(low, high), (0, 1, 3, 2, 5, 4))  # [BN, V, h, T, c, b]
    return tl.reshape(octets, (BN, GS)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _halves(words, BN: tl.constexpr, GS: tl.constexpr, MAGIC: tl.constexpr):
    # Words [BN, GS/8] → 16-bit numbers [BN, V, T, h, b, c] that are MAGIC, the nibble 4c +
    # 2b + h in their lowest bits.
    words = _runs(words, BN, GS)
    mask: tl.constexpr = 0x000F000F
    first = tl.join((words & mask) | MAGIC, ((words >> 4) & mask) | MAGIC)
    second = tl.join(((words >> 8) & mask) | MAGIC, ((words >> 12) & mask) | MAGIC)
    both = tl.join(first, second)
    return tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))


@triton.jit
def folded_eights(words, s8, BN: tl.constexpr, GS: tl.constexpr, CASTS: tl.constexpr):
    """Words [BN, GS/8] and s8 [BN], float16 → E4M3(q · s8) [BN, GS], nibble 4c + 2b + h
    at place (v, h, t, b, c)."""
    halves = tl.permute(_halves(words, BN, GS, 0x64006400), (0, 1, 3, 2, 4, 5))
    codes = tl.reshape(halves, (BN, GS)).to(tl.float16, bitcast=True) - 1032.0
    return as_e4m3(codes * s8[:, None], CASTS)


@triton.jit
def pairs(words, BN: tl.constexpr, GS: tl.constexpr, DTYPE: tl.constexpr, OPERAND: tl.constexpr):
    """Words [BN, GS/8] → OPERAND [BN, GS] of q, nibble 4c + 2b + h of word V·t + v
    at place (v, b, h, t, c)."""
    MAGIC: tl.constexpr = 0x43004300 if tl.bfloat16 == DTYPE else 0x64006400
    OFFSET: tl.constexpr = 136.0 if tl.bfloat16 == DTYPE else 1032.0
    HALF: tl.constexpr = tl.bfloat16 if tl.bfloat16 == DTYPE else tl.float16
    halves = tl.reshape(tl.permute(_halves(words, BN, GS, MAGIC), (0, 1, 4, 3, 2, 5)), (BN, GS))
    return halves.to(HALF, bitcast=True).to(OPERAND) - OFFSET


@triton.jit
def _paired_inputs(inputs, BM: tl.constexpr, GS: tl.constexpr):
    # Activations [BM, GS] in the order of `pairs`.
    apart = tl.permute(tl.reshape(inputs, (BM, 4, GS // 32, 2, 2, 2)), (0, 2, 4, 5, 1, 3))
    return tl.reshape(apart, (BM, GS))


@triton.jit
def fold_kernel(
    scale, s8, factor,
    N, G,
    BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Scales [N, G] → s8 [N, G] and 8 · row factor [N], as `quantize.formats.fp8` folds them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * G
    largest = tl.zeros((BN,), tl.float32)
    for start in range(0, G, BG):
        group = start + tl.arange(0, BG)[None, :]
        found = tl.load(scale + row + group, mask=group < G, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(found.to(tl.float32)), axis=1))
    size = tl.maximum(tl.div_rn(largest, 448.0), 1.0 / (448.0 * 512.0))
    tl.store(factor + n, size * 8.0, mask=n < N)
    for start in range(0, G, BG):
        group = start + tl.arange(0, BG)[None, :]
        found = tl.load(scale + row + group, mask=group < G, other=0.0).to(tl.float32)
        eighth = rounded_e4m3(rounded_e4m3(tl.div_rn(found, size[:, None])) * 0.125)
        tl.store(s8 + row + group, eighth.to(tl.float16), mask=(n < N)[:, None] & (group < G))


@triton.jit
def int4_kernel(
    x, token_scale, packed, scale, factor, up_packed, up_scale, up_factor, bias, out,
    M, N, G, x_stride, groups,
    FP8: tl.constexpr, FOLDED: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr, CASTS: tl.constexpr,
    GS: tl.constexpr, DTYPE: tl.constexpr, OPERAND: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out = x Ŵᵀ: one part in float32, [P, M, N] or [P, M, 2N] (gate, up), or where
    it is the WHOLE of y [M, N].

    FP8: x holds E4M3 codes in the order of `eights` or, FOLDED (scale is s8, and there
    is a factor), `folded_eights`;
    else it is in its own order. GATED: every second run of 8 rows of the tile is of the up
    projection, so that a thread holds both factors of silu(gate) · up.
    """
    r = tl.arange(0, BN)
    output = (
        tl.program_id(0) * (BN // 2) + r // 16 * 8 + r % 8 if GATED else tl.program_id(0) * BN + r
    )
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    # Beyond the last output and the last row the last is computed once more, and not stored.
    row = tl.minimum(output, N - 1).to(tl.int64)
    column = tl.minimum(m, M - 1).to(tl.int64)
    place = row[:, None] * (G * (GS // 8)) + tl.arange(0, GS // 8)[None, :]
    words_at, scales_at = packed + place, scale + row * G
    if GATED:
        is_up = r // 8 % 2 == 1
        words_at = tl.where(is_up[:, None], up_packed + place, words_at)
        scales_at = tl.where(is_up, up_scale + row * G, scales_at)
    x_at = x + column[:, None] * x_stride + tl.arange(0, GS)[None, :]

    total = tl.zeros((BN, BM), tl.float32)
    first = tl.program_id(2) * groups
    for group in range(first, tl.minimum(first + groups, G)):
        scales = tl.load(scales_at + group)
        words = tl.load(words_at + group * (GS // 8))
        inputs = tl.load(x_at + group * GS)
        if FOLDED:
            total += tl.dot(folded_eights(words, scales, BN, GS, CASTS), tl.trans(inputs))
        elif FP8:
            total += (
                tl.dot(eights(words, BN, GS), tl.trans(inputs))
                * (scales.to(tl.float32) * 512.0)[:, None]
            )
        else:
            inputs = tl.trans(_paired_inputs(inputs, BM, GS).to(OPERAND))
            weights = pairs(words, BN, GS, DTYPE, OPERAND)
            sums = tl.dot(weights, inputs, input_precision="ieee")  # [BN, GS] @ [GS, BM] → [BN, BM]
            total += sums * scales.to(tl.float32)[:, None]

    if FOLDED:
        factors = tl.load(factor + row)
        if GATED:
            factors = tl.where(is_up, tl.load(up_factor + row), factors)
        total *= factors[:, None]
    if FP8:
        total *= tl.load(token_scale + column)[None, :]
    if WHOLE and bias is not None:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    width = N
    if WHOLE and GATED:
        sides = tl.permute(tl.reshape(total, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(sides)
        total = tl.reshape(gate / (1 + tl.exp(-gate)) * up, (BN // 2, BM))
        output = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        inside = output < N
    elif GATED:
        inside = output < N
        output = tl.where(is_up, output + N, output)
        width = 2 * N
    else:
        inside = output < N
    where = (tl.program_id(2) * M + m).to(tl.int64)[None, :] * width + output[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=inside[:, None] & (m[None, :] < M))


@triton.jit
def int4_sum_kernel(
    parts, bias, y, P, M, N,
    GATED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [M, N] = the sum of parts [P, M, N], plus bias; GATED: of parts
    [P, M, 2N] silu(gate) · up."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    width = 2 * N if GATED else N
    total = tl.zeros((BN,), tl.float32)
    up = tl.zeros((BN,), tl.float32)
    for part in range(P):
        where = parts + (part * M + m) * width + n
        total += tl.load(where, mask=n < N, other=0.0)
        if GATED:
            up += tl.load(where + N, mask=n < N, other=0.0)
    if GATED:
        total = total / (1 + tl.exp(-total)) * up
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)
