"""Triton kernels of routed experts; `experts_launch.py` starts them.

`group_kernel` numbers the pairs of a token and an expert that it visits, expert by expert: one row
a pair. The products then run over tiles of rows of one expert. How many rows an expert has is known
on the device alone, so the grid has room for all tokens in every expert, and programs without rows
leave at once. Each pair's output is a row of its own, and `mix_kernel` adds the rows of a token in
a fixed order: no atomics, the same result in every run.
"""

# Arguments have Triton's types, which are none to a type checker.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_kernel(
    weights, first, tokens, rows,
    M, N, R,
    PADDED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Weights [M, N] → first [N + 1], where each expert's rows start; tokens [R], the token of a
    row; rows [M, N], −1 where a token does not visit an expert. Rows from R on have no place.
    """
    e = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    count = tl.zeros((BT, PADDED), tl.int32)
    for start in range(0, M, BT):
        m = start + tl.arange(0, BT)
        before = (m[:, None] < M) & (expert[None, :] < e)
        weight = tl.load(
            weights + m.to(tl.int64)[:, None] * N + expert[None, :], mask=before, other=0.0
        )
        count += (weight != 0).to(tl.int32)
    row = tl.sum(tl.sum(count, axis=1), axis=0)
    if e == 0:
        tl.store(first, 0)
    for start in range(0, M, BT):
        m = start + tl.arange(0, BT)
        where = m.to(tl.int64) * N + e
        visits = tl.load(weights + where, mask=m < M, other=0.0) != 0
        place = row + tl.cumsum(visits.to(tl.int32), axis=0) - 1
        tl.store(tokens + place, m, mask=visits & (place < R))
        tl.store(rows + where, tl.where(visits, place, -1), mask=m < M)
        row += tl.sum(visits.to(tl.int32), axis=0)
    tl.store(first + e + 1, tl.minimum(row, R))


@triton.jit
def _inputs(x, row, inside, column, K, OPERAND: tl.constexpr):
    # Columns of rows that start at `row`: [BM, BK]; 0 beyond the last row and the last column.
    mask = inside[:, None] & (column[None, :] < K)
    return tl.load(x + row[:, None] + column[None, :], mask=mask, other=0.0).to(OPERAND)


@triton.jit
def _weights(weight, output, inside, column, K, OPERAND: tl.constexpr):
    # Weights of outputs that are rows of [·, K], as a right factor: [BK, BN]; 0
    # beyond the last output and input.
    mask = (column[:, None] < K) & inside[None, :]
    return tl.load(weight + output[None, :] * K + column[:, None], mask=mask, other=0.0).to(OPERAND)


@triton.jit
def gate_up_kernel(
    x, first, tokens, gate_up, hidden,
    D, E, x_stride,
    OPERAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden [R, E] = silu(x W_gᵀ) ⊙ x W_uᵀ, row by row with the weights of its expert."""
    e = tl.program_id(2).to(tl.int64)
    start = tl.load(first + e) + tl.program_id(0) * BM
    last = tl.load(first + e + 1)
    if start >= last:
        return
    row = start + tl.arange(0, BM)
    output = tl.program_id(1) * BN + tl.arange(0, BN)
    token = tl.load(tokens + row, mask=row < last, other=0).to(tl.int64)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for step in range(0, D, BK):
        column = step + tl.arange(0, BK)
        inputs = _inputs(x, token * x_stride, row < last, column, D, OPERAND)
        w_gate = _weights(gate_up, e * 2 * E + output, output < E, column, D, OPERAND)
        w_up = _weights(gate_up, (e * 2 + 1) * E + output, output < E, column, D, OPERAND)
        # [BM, BK] @ [BK, BN] → [BM, BN]
        gate = tl.dot(inputs, w_gate, gate, input_precision="ieee")
        up = tl.dot(inputs, w_up, up, input_precision="ieee")
    product = gate / (1 + tl.exp(-gate)) * up
    where = row.to(tl.int64)[:, None] * E + output[None, :]
    inside = (row < last)[:, None] & (output < E)[None, :]
    tl.store(hidden + where, product.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    hidden, first, down, parts,
    D, E,
    OPERAND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts [R, D] = hidden [R, E] W_dᵀ, row by row with the weights of its expert."""
    e = tl.program_id(2).to(tl.int64)
    start = tl.load(first + e) + tl.program_id(0) * BM
    last = tl.load(first + e + 1)
    if start >= last:
        return
    row = start + tl.arange(0, BM)
    output = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, E, BK):
        column = step + tl.arange(0, BK)
        inputs = _inputs(hidden, row.to(tl.int64) * E, row < last, column, E, OPERAND)
        weight = _weights(down, e * D + output, output < D, column, E, OPERAND)
        # [BM, BK] @ [BK, BN] → [BM, BN]
        total = tl.dot(inputs, weight, total, input_precision="ieee")
    where = row.to(tl.int64)[:, None] * D + output[None, :]
    tl.store(parts + where, total, mask=(row < last)[:, None] & (output < D)[None, :])


@triton.jit
def mix_kernel(
    parts, rows, weights, y,
    N, D, R,
    PADDED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y [M, D] = the sum of each token's rows, times its weights; NaN where
    one of them has no place."""
    m = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(rows + m * N + expert, mask=expert < N, other=-1).to(tl.int64)
    weight = tl.load(weights + m * N + expert, mask=row >= 0, other=0.0).to(tl.float32)
    there = (row >= 0) & (row < R)
    part = tl.load(
        parts + row[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
    )
    part = tl.where((row >= R)[:, None], float("nan"), part)
    total = tl.sum(part * weight[:, None], axis=0)
    tl.store(y + m * D + d, total.to(y.dtype.element_ty), mask=d < D)
