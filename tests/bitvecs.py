"""Random `bitvec` weights for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.bitvec import BitVec, groups_per_row


def random_bitvec(
    N: int,
    K: int,
    bits: int = 4,
    group_size: int = 128,
    bias: bool = False,
    lines: int = 5,
    scales: int = 1,
) -> BitVec:
    """Random codes, lines and scales; the last line is in use, so that indices fill their dtype."""
    generator = torch.Generator().manual_seed(N + K + bits)
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)
    shape = (N, groups_per_row(K, group_size))
    index = torch.randint(0, lines * scales, shape, dtype=torch.int32, generator=generator)
    index[-1, -1] = lines * scales - 1
    shapes = torch.randn(lines, bits + bias, generator=generator).half()
    return BitVec(
        codes, index, shapes, torch.rand(scales, generator=generator) + 0.5, bits, group_size
    )


def multiply_arguments(weight: BitVec, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Planes, index, lines and scales, as `multiply` takes them."""
    tensors = weight.tensors()
    return tuple(
        tensors[f"weight_{name}"].to(device) for name in ("planes", "index", "lines", "scales")
    )


def exact_product(x: Tensor, weight: BitVec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b in float64, and the sum of its terms' absolute values, which bounds what rounding can do."""
    x, values = x.double().cpu(), weight.unpack().double()
    product, size = x @ values.T, x.abs() @ values.abs().T
    return (
        (product, size)
        if bias is None
        else (product + bias.double().cpu(), size + bias.double().abs().cpu())
    )
