"""How experts that stand in one tensor are stored where that is small: gpt-oss' MXFP4, stacked FP8."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quantize.files.headers import Header

_BLOCKS, _SCALES = "_blocks", "_scales"
_FP8_SCALES = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class Stacked:
    """One matrix of every expert, small, with its scales."""

    parts: tuple[str, ...]
    """Full names of its tensors."""
    weights: int
    kind: str
    """mxfp4, or the dtype of its codes."""
    bits: int
    group_size: int | None
    """Weights that share a scale; None where that is a block of rows as well."""
    expected_bits: float | None
    """What its format takes for so many weights."""


def stacked_of(headers: Mapping[str, Header]) -> dict[str, Stacked]:
    """Every such tensor by the name that the 16-bit model has for it."""
    out: dict[str, Stacked] = {}
    for name, header in headers.items():
        plain = name.removesuffix(_BLOCKS)
        scales = headers.get(plain + _SCALES)
        if name.endswith(_BLOCKS) and header.dtype == "U8" and scales and header.shape[-1:]:
            weights = 2 * math.prod(header.shape)  # two codes a byte, a scale for each last axis
            group = 2 * header.shape[-1]
            bits = weights * (4 + 8 / group) if group else None
            out[plain] = Stacked((name, plain + _SCALES), weights, "mxfp4", 4, group, bits)
        elif header.dtype.startswith("F8_") and len(header.shape) > 2:
            parts = [name + end for end in _FP8_SCALES if name + end in headers]
            if parts and not name.endswith(".weight"):  # else it is found by its module
                weights, kind = math.prod(header.shape), header.dtype.lower()
                out[name] = Stacked((name, *parts), weights, kind, 8, None, None)
    return out
