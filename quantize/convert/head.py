"""lm_head at fewer bits: clipped rounding, which needs no calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.packed_int import PackedInt
from quantize.solvers.grid import Grid

HEAD_GROUP = 128
"""Group of an encoded lm_head; as in most stages: smaller ones cost more bits for scales."""
_WEIGHTS = 1 << 24
"""Encoded at once: all of a large vocabulary in float32 would be the peak of a conversion."""


def encode_head(weight: Tensor, bits: int, device: torch.device) -> tuple[PackedInt, float]:
    """lm_head [V, D] at `bits`, and the squared error relative to the weights. device: where it is
    computed."""
    grid = Grid(bits, HEAD_GROUP, signed=True)
    codes, scales = [], []
    error = size = 0.0
    for rows in torch.split(weight, max(1, _WEIGHTS // weight.shape[1])):
        part = rows.to(device).float()
        scale, factor = grid.fit_scale(part)
        code, value = grid.round(part, scale, factor)
        codes.append(code)
        scales.append(scale)
        error += float((value - part).square().sum())
        size += float(part.square().sum())
    packed = grid.pack(torch.cat(codes), torch.cat(scales))
    return packed, error / size if size else 0.0
