"""y = x Wᵀ + b with W stored as `bitvec` (see
`quantize/formats/bitvec.py`), on whatever device x is."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.bitvec import BitVecScheme
from quantize.kernels.bitvec.reference import multiply_reference
from quantize.kernels.device import DTYPES, has_kernel


def multiply(
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
    """x [..., K] → [..., N] in x's dtype (bfloat16, float16 or float32; any
    strides), summed in float32.

    planes int32 [N, ceil(K/32)·bits], index uint8 or uint16 [N, G], lines float16 [S, bits (+ 1
    with a bias coefficient)], scales float32 [Z], all contiguous; bias [N] of any floating
    dtype. Values of `index` are trusted: to check them would make the host wait. ValueError for
    wrong shapes, dtypes or devices.
    """
    _check(x, planes, index, lines, scales, bias, bits, group_size)
    weight = (planes, index, lines, scales)
    if not has_kernel(x) or not x.numel() or not planes.numel():
        return multiply_reference(x, *weight, bias, bits=bits, group_size=group_size)
    from quantize.kernels.bitvec import launch

    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        return launch.multiply(rows, *weight, bias, bits, group_size).view(*x.shape[:-1], -1)


def _check(
    x: Tensor,
    planes: Tensor,
    index: Tensor,
    lines: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"activations are {x.dtype}, expected bfloat16, float16 or float32")
    for name, tensor, axes in (
        ("planes", planes, 2),
        ("index", index, 2),
        ("lines", lines, 2),
        ("scales", scales, 1),
    ):
        if tensor.ndim != axes or tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(f"{name} must be a contiguous tensor of {axes} axes on {x.device}")
    N, K = planes.shape[0], x.shape[-1]
    scheme = BitVecScheme(bits, group_size, lines.shape[1] > bits, lines.shape[0], scales.shape[0])
    for name, tensor in (
        ("planes", planes),
        ("index", index),
        ("lines", lines),
        ("scales", scales),
    ):
        dtype, shape = scheme.layout(N, K)[f"weight_{name}"]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(
                f"{name} is {found}, expected {dtype} {shape} for {N} outputs of {K} inputs"
            )
    if bias is not None and (tuple(bias.shape) != (N,) or bias.device != x.device):
        raise ValueError(
            f"bias is {tuple(bias.shape)} on {bias.device}, expected {(N,)} on {x.device}"
        )
