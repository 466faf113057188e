"""Products with a packed weight that is decoded a few rows at a time: what runs where no kernel reads the
packed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights decoded at once. On a CPU what fits a cache, 4 MB in float32; an accelerator wants few,
# large operations, and 64 MB is still little beside a model.
_ROOM = {"cpu": 1 << 20}
_ROOM_ELSEWHERE = 1 << 24

Rows = Callable[[int, int, torch.dtype], Tensor]
"""Decodes output rows first … last − 1 in a dtype: [last − first, K]."""


def pieces(N: int, K: int, device: torch.device) -> list[slice]:
    """Output rows of a weight [N, K] to decode at once."""
    step = max(1, _ROOM.get(device.type, _ROOM_ELSEWHERE) // K)
    return [slice(first, min(first + step, N)) for first in range(0, N, step)]


def multiply_by_rows(x: Tensor, N: int, rows: Rows, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight [N, K], of which `rows` decodes parts in x's dtype, plus bias [N] in it
    → [..., N]."""
    parts = pieces(N, x.shape[-1], x.device)
    if len(parts) == 1:
        return F.linear(x, rows(0, N, x.dtype), bias)
    out = x.new_empty(*x.shape[:-1], N)
    for part in parts:
        weight = rows(part.start, part.stop, x.dtype)
        out[..., part] = F.linear(x, weight, None if bias is None else bias[part])
    return out
