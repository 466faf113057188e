"""Triton kernels of products with `bitvec` weights; `bitvec.py` starts them,
`reference.py` is their twin.

Up to 16 rows of 16-bit activations (`planes_kernel`): tensor cores sum the activations that each
plane selects, and a group's sums meet its coefficients once. One AND makes two factors: the
halves of a word, masked to the same place j, are float16 numbers as they stand. A lone bit j < 8
is the subnormal 2^(j−24), exact in tensor cores, and the inputs of place j are scaled by
2^(13−j), so that all products carry 2^−11; places 8 … 15 are shifted down by 8 first. Activations
are scaled by a power of two to the range of their group: bfloat16 and float16 pass unrounded, but
for what is below 2^−21 of the group's largest. Planes are rows of the product, N · bits of them:
no number of bits leaves lanes idle.

More rows, or float32 (`decode_kernel`): weights are decoded into registers, Σ c_k · bit, and
multiplied as a tile. Both split the inputs over programs where the outputs alone do not fill the
device, and `sum_kernel` adds the parts in a
fixed order: results are the same in every run.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plane_words(
    planes, outputs, plane, group, N, K, stride, BITS: tl.constexpr, RUNS: tl.constexpr
):
    # Words of one group: [rows, RUNS]; 0 beyond the last output and the last input.
    run = group * RUNS + tl.arange(0, RUNS)
    words = planes + outputs.to(tl.int64)[:, None] * stride + run[None, :] * BITS + plane
    return tl.load(words, mask=(outputs[:, None] < N) & (run[None, :] * 32 < K), other=0)


@triton.jit
def _lines(index, outputs, group, N, G):
    # The line of each output's group, beyond the last that of the last. A 16-bit
    # index comes as a signed one.
    found = tl.load(
        index + outputs.to(tl.int64) * G + tl.minimum(group, G - 1), mask=outputs < N, other=0
    )
    return found.to(tl.int32) & 0xFFFF


@triton.jit
def _inputs(x, m, group, M, K, stride, GS: tl.constexpr):
    # Activations of one group: [BM, GS]; 0 beyond the last row and the last input.
    column = group * GS + tl.arange(0, GS)
    inside = (m[:, None] < M) & (column[None, :] < K)
    return tl.load(x + m.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def planes_kernel(
    x, planes, index, lines, scales, parts,
    M, N, K, G, x_stride, plane_stride, groups, halves,
    BITS: tl.constexpr, GS: tl.constexpr, COEFS: tl.constexpr, Z: tl.constexpr, FOLD: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """parts [P, M, N, planes] = what this program's groups add; FOLD: the planes
    of an output are added up."""
    RUNS: tl.constexpr = GS // 32
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    outputs, plane = rows // BITS, rows % BITS
    m = tl.arange(0, BM)
    place = tl.arange(0, 16)
    # Were the mask a constant, the compiler would mask the halves apart:
    # three operations instead of one.
    mask = halves << (place % 8)
    factor = ((140 - tl.arange(0, GS) % 8) << 23).to(tl.float32, bitcast=True)  # 2^(13 − j)
    total = tl.zeros((BR, BM), tl.float32)
    first = tl.program_id(1) * groups
    line = _lines(index, outputs, first, N, G)
    for group in range(first, tl.minimum(first + groups, G)):
        # Asked for before the work they are needed after, like the next group's
        # lines: nothing waits for them.
        shape = lines + line // Z * COEFS
        scale = tl.load(scales + line % Z)
        coefficient = tl.load(shape + plane).to(tl.float32) * scale * 2048.0
        if COEFS > BITS:
            constant = tl.load(shape + BITS, mask=plane == 0, other=0.0).to(tl.float32) * scale
        line = _lines(index, outputs, group + 1, N, G)
        inputs = _inputs(x, m, group, M, K, x_stride, GS).to(tl.float32)
        exponent = tl.max(tl.abs(inputs), axis=1).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        up = (exponent << 23).to(tl.float32, bitcast=True)
        small = tl.reshape(
            (inputs * down[:, None] * factor[None, :]).to(tl.float16), (BM, RUNS, 2, 16)
        )
        small = tl.reshape(tl.permute(small, (3, 1, 2, 0)), (GS, BM))

        words = _plane_words(planes, outputs, plane[:, None], group, N, K, plane_stride, BITS, RUNS)
        # [BR, 16, RUNS]
        pairs = (words[:, None, :] >> (place // 8 * 8)[None, :, None]) & mask[None, :, None]
        bits = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)).to(
            tl.float16, bitcast=True
        )
        sums = tl.dot(tl.reshape(bits, (BR, GS)), small)  # [BR, GS] @ [GS, BM] → [BR, BM]

        total += sums * coefficient[:, None] * up[None, :]
        if COEFS > BITS:
            total += constant[:, None] * tl.sum(inputs, axis=1)[None, :]
    if FOLD:
        total = tl.sum(tl.reshape(total, (BR // BITS, BITS, BM)), axis=1)
        rows = tl.program_id(0) * (BR // BITS) + tl.arange(0, BR // BITS)
        width = N
    else:
        width = N * BITS
    where = (tl.program_id(1) * M + m).to(tl.int64)[None, :] * width + rows[:, None]
    tl.store(parts + where, total, mask=(rows[:, None] < width) & (m[None, :] < M))


@triton.jit
def decode_kernel(
    x, planes, index, lines, scales, bias, out,
    M, N, K, G, x_stride, plane_stride, groups,
    BITS: tl.constexpr, GS: tl.constexpr, COEFS: tl.constexpr, Z: tl.constexpr, WHOLE: tl.constexpr,
    OPERAND: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out [P, M, N]: one part in float32, or where it is the WHOLE of y, with
    the bias and in y's dtype."""
    STEP: tl.constexpr = 64  # inputs at once: a whole group's tile would not fit
    RUNS: tl.constexpr = STEP // 32
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = 1 << tl.arange(0, 32)
    total = tl.zeros((BM, BN), tl.float32)
    first = tl.program_id(2) * groups * (GS // STEP)
    last = tl.minimum(first + groups * (GS // STEP), tl.cdiv(K, STEP))
    for step in range(first, last):
        inputs = _inputs(x, m, step, M, K, x_stride, STEP)
        line = _lines(index, outputs, step // (GS // STEP), N, G)
        shape = lines + line // Z * COEFS
        scale = tl.load(scales + line % Z)
        # Outputs come last, so that a thread holds all places of few words: masks are
        # constants, coefficients few.
        weight = tl.zeros((RUNS, 32, BN), tl.float32)
        if COEFS > BITS:
            weight += (tl.load(shape + BITS).to(tl.float32) * scale)[None, None, :]
        for k in tl.static_range(BITS):
            words = _plane_words(planes, outputs, k, step, N, K, plane_stride, BITS, RUNS)
            chosen = (tl.trans(words)[:, None, :] & mask[None, :, None]) != 0
            coefficient = tl.load(shape + k).to(tl.float32) * scale
            weight += tl.where(chosen, coefficient[None, None, :], 0.0)
        tile = tl.reshape(weight, (STEP, BN)).to(inputs.dtype).to(OPERAND)
        # [BM, STEP] @ [STEP, BN] → [BM, BN]
        total = tl.dot(inputs.to(OPERAND), tile, total, input_precision="ieee")
    if WHOLE and bias is not None:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    where = (tl.program_id(2) * M + m).to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(
        out + where, total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (outputs[None, :] < N)
    )


@triton.jit
def sum_kernel(
    parts, bias, y, P, M, N, PLANES: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """y [M, N] = bias + the sum of parts [P, M, N, PLANES] over parts and planes."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    plane = tl.arange(0, PADDED)
    inside = (n[:, None] < N) & (plane[None, :] < PLANES)
    total = tl.zeros((BN, PADDED), tl.float32)
    for part in range(P):
        where = (part * M + m) * N * PLANES + n[:, None] * PLANES + plane[None, :]
        total += tl.load(parts + where, mask=inside, other=0.0)
    out = tl.sum(total, axis=1)
    if bias is not None:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, out.to(y.dtype.element_ty), mask=n < N)
