"""Plain-torch twin of the bit-vector kernels: slow, short, and what they are tested against."""

from __future__ import annotations

from torch import Tensor

from quantize.formats.bitvec import BitVec, unpack_planes


def multiply_reference(
    x: Tensor,
    planes: Tensor,
    index: Tensor,
    lines: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [..., K] times a `bitvec` weight [N, K], plus bias [N] → [..., N] in x's dtype;
    decoded and added in float32.

    Tensors are those of `quantize.kernels.bitvec.api.multiply`.
    """
    codes = unpack_planes(planes, bits, x.shape[-1])
    weight = BitVec(codes, index.int(), lines, scales, bits, group_size).unpack()
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
