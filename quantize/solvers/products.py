"""Products with matrices of which half is known: symmetric ones and triangular ones.

Each goes through a few wide strips of columns and leaves out what is zero, or what symmetry gives: of eight strips that
is seven sixteenths of the work.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantize.cost.footprint import SOLVER_ROWS

_STRIPS = 8
# Columns of a strip, at least: narrower ones multiply slower than they spare.
_NARROWEST = 512
# The same of `gram`, whose columns are long.
_NARROWEST_GRAM = 384
# The largest triangle that is inverted at once, by solving for the identity: three times its least work.
_TRIANGLE = 256


def strips(K: int) -> Iterator[slice]:
    """Columns 0 … K in wide pieces."""
    width = max(_NARROWEST, -(-K // _STRIPS))
    for start in range(0, K, width):
        yield slice(start, min(start + width, K))


def gram(x: Tensor) -> Tensor:
    """xᵀ x [K, K] of x [M, K]: what lies above the diagonal is computed, in a few wide pieces, and
    mirrored.

    Exactly symmetric. Of four pieces that is five eighths of the work; narrower ones leave a second
    core waiting.
    """
    K = x.shape[1]
    width = max(_NARROWEST_GRAM, -(-K // 4))
    if width >= K:
        return x.T @ x
    out = x.new_empty(K, K)
    for start in range(0, K, width):
        stop = min(start + width, K)
        out[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def quadratic(rows: Tensor, metric: Tensor) -> Tensor:
    """Row by row r M rᵀ → [N]; rows [N, K], metric [K, K] symmetric."""
    total = rows.new_zeros(len(rows))
    for span in strips(len(metric)):
        product = rows[:, span] @ metric[span, span.start :]
        product[:, span.stop - span.start :].mul_(2)  # what lies below the diagonal is the same
        total += product.mul_(rows[:, span.start :]).sum(dim=1)
    return total


def times_upper_(rows: Tensor, upper: Tensor) -> Tensor:
    """rows [N, K] times an upper triangular matrix [K, K], in place."""
    for span in reversed(list(strips(len(upper)))):  # a strip needs those before it as they were
        rows[:, span] = rows[:, : span.stop] @ upper[: span.stop, span]
    return rows


def times_upper_transposed_(rows: Tensor, upper: Tensor) -> Tensor:
    """rows [N, K] times the transpose of an upper triangular matrix [K, K], in place."""
    for span in strips(len(upper)):  # a strip needs those behind it as they were
        rows[:, span] = rows[:, span.start :] @ upper[span, span.start :].T
    return rows


def invert_lower_(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix [K, K] with zeros above its diagonal, in place.

    [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ B A⁻¹, D⁻¹]], down to small triangles: K³ / 3 operations, as LAPACK's `trtri`,
    which torch does not have.
    """
    K = len(lower)
    if K <= _TRIANGLE:
        unit = torch.eye(K, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
    half = K // 2
    A, B, D = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    for columns in torch.split(B, SOLVER_ROWS, dim=1):
        columns.copy_(torch.linalg.solve_triangular(D, columns, upper=False))
    for rows in torch.split(B, SOLVER_ROWS):
        rows.copy_(torch.linalg.solve_triangular(A, rows, upper=False, left=False).neg_())
    invert_lower_(A)
    invert_lower_(D)
    return lower


def turn_(matrix: Tensor) -> Tensor:
    """Reverse the order of rows and of columns of a dense matrix [K, K], in place."""
    flat = (matrix if matrix.is_contiguous() else matrix.mT).view(-1)
    total = len(flat)
    piece = SOLVER_ROWS * len(matrix)
    for start in range(0, total // 2, piece):
        stop = min(start + piece, total // 2)
        front, back = flat[start:stop], flat[total - stop : total - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix
