"""Plain-torch twins of the kernels: slow, short, and what the kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """x [..., K] times a `bitvec` weight [N, K], plus bias [N] → [..., N] in x's dtype; decoded and added in float32.

    Tensors are those of `quantize.kernels.bitvec.api.multiply`.
    """
    codes = unpack_planes(planes, bits, x.shape[-1])
    weight = BitVec(codes, index.int(), lines, scales, bits, group_size).unpack()
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def experts_reference(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `quantize.kernels.experts.api.routed_experts` computes with SiLU, in float64: all experts for all tokens."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e, (above, below) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = (x.double() @ above.double().T).chunk(2, dim=1)
        y += weights[:, e, None].double() * (F.silu(gate) * up @ below.double().T)
    return y
