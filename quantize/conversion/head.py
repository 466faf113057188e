"""lm_head at fewer bits: clipped rounding, which needs no calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantize.formats.grouping import ADAPTED, adaptation, fitting_group
from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.solvers.grid import Grid

HEAD_GROUP = 128
"""Group of an encoded lm_head, or where it does not divide the inputs what stages take then; as in
most stages: smaller ones cost more bits for scales."""
_WEIGHTS = 1 << 24
"""Encoded at once: all of a large vocabulary in float32 would be the peak of a conversion."""


def head_scheme(bits: int, hidden: int) -> IntScheme:
    """How an lm_head with so many inputs is packed."""
    return IntScheme(bits, fitting_group(HEAD_GROUP, [hidden]), False)


def encode_head(
    weight: Tensor, bits: int, device: torch.device
) -> tuple[PackedInt, dict[str, Any]]:
    """lm_head [V, D] at `bits`, and facts about it: the squared error relative to the weights, and
    where its group is another one than asked for, which. device: where it is computed."""
    V, D = weight.shape
    group = fitting_group(HEAD_GROUP, [D])
    grid = Grid(bits, D if group is None else group, signed=True)
    codes, scales = [], []
    error = size = 0.0
    for rows in torch.split(weight, max(1, _WEIGHTS // D)):
        part = rows.to(device).float()
        scale, factor = grid.fit_scale(part)
        code, value = grid.round(part, scale, factor)
        codes.append(code)
        scales.append(scale)
        error += float((value - part).square().sum())
        size += float(part.square().sum())
    packed = replace(grid.pack(torch.cat(codes), torch.cat(scales)), channelwise=group is None)
    facts: dict[str, Any] = {"weight_error": error / size if size else 0.0}
    change = adaptation((V, D), HEAD_GROUP, group, lost_fp8=False)
    return packed, facts | ({ADAPTED: change} if change else {})
