"""Triton kernel that rounds activations to E4M3, one scale a token; `launch.py` starts it."""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded_e4m3(value):
    """float32 → the nearest E4M3 number, saturating at ±448, in float32; as
    `quantize.formats.fp8.e4m3`."""
    value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # An addend so large that a float32 beside it has steps of an eighth of the power, 2⁻⁹ at least.
    addend = tl.where(power < 0.015625, 0.015625, power) * 1572864.0
    return (value + addend) - addend


@triton.jit
def as_e4m3(value, CASTS: tl.constexpr):
    """A float16 or float32 → E4M3; CASTS: by the device's cast, else (the interpreter's
    rounds wrongly) by its bits."""
    if CASTS:
        codes = value.to(tl.float8e4nv)
    else:
        near = rounded_e4m3(value.to(tl.float32))
        size = tl.abs(near)
        bits = near.to(tl.int32, bitcast=True)
        code = tl.where(
            size < 0.015625, (size * 512.0).to(tl.int32), ((bits & 0x7FFFFFFF) >> 20) - 960
        )
        code = tl.where(near != near, 127, code) | ((bits >> 24) & 128)
        codes = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return codes


@triton.jit
def _round(value, DTYPE: tl.constexpr):
    # float32 rounded to DTYPE; bfloat16 by its bits, which the interpreter would cut off.
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        near = (even & -65536).to(tl.float32, bitcast=True)
        out = tl.where(value == value, near, value)
    else:
        out = value.to(DTYPE).to(tl.float32)
    return out


@triton.jit
def _inputs(x, weight, k, K, spread, DTYPE: tl.constexpr):
    # Activations [BK], normalized where there is a weight; 0 beyond the last.
    inputs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if weight is not None:
        factor = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
        inputs = _round(_round(inputs * spread, DTYPE) * factor, DTYPE)
    return inputs


@triton.jit
def quantize_kernel(
    x, weight, codes, scale,
    K, x_stride, eps,
    GS: tl.constexpr, FOLDED: tl.constexpr, CASTS: tl.constexpr, DTYPE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Codes [M, K] and scale [M] of x [M, K], after RMSNorm where there is a weight [K].

    GS: codes of every group come in the order that `int4_kernels` gives weights of that group size
    (`folded_eights` if FOLDED, else `eights`); 0: in their own.
    """
    m = tl.program_id(0).to(tl.int64)
    x += m * x_stride
    spread = 1.0
    if weight is not None:
        squares = tl.zeros((BK,), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            inputs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            squares += inputs * inputs
        spread = tl.div_rn(
            1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), K.to(tl.float32)) + eps)
        )
    largest = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        largest = tl.maximum(largest, tl.abs(_inputs(x, weight, k, K, spread, DTYPE)))
    size = tl.maximum(tl.div_rn(tl.max(largest, axis=0), 448.0), 1.0 / (448.0 * 512.0))
    tl.store(scale + m, size)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        parts = as_e4m3(tl.div_rn(_inputs(x, weight, k, K, spread, DTYPE), size), CASTS)
        if GS > 0:
            words = tl.reshape(parts, (BK // GS, 4, GS // 32, 2, 2, 2))
            placed = (
                tl.permute(words, (0, 2, 5, 1, 4, 3))
                if FOLDED
                else tl.permute(words, (0, 2, 5, 1, 3, 4))
            )
            parts = tl.reshape(placed, (BK,))
        tl.store(codes + m * K + k, parts, mask=k < K)
