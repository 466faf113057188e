"""FP8 codes with scales: one for a tensor, a row, or a block of rows and columns.

w[i, j] = code[i, j] · scale[i // rows, j // columns], the product rounded once, from float32. The
last block of a dimension may be cut off, as that of the 576 rows of DeepSeek-V3's kv_a_proj is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.formats.sources.source import Kinds, Reader

FP8 = "F8_E4M3"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
Block = tuple[int, int]
"""(rows, columns) that share a scale; 0 stands for all there are."""
WHOLE: Block = (0, 0)
ROW: Block = (1, 0)


def shown(block: Block) -> str:
    """How a form of FP8 is called."""
    names = {WHOLE: "FP8 with one scale a tensor", ROW: "FP8 with one scale a row"}
    return names.get(block, f"FP8 in blocks of {block[0]}x{block[1]}")


@dataclass(frozen=True)
class ScaledTensor:
    """FP8 codes [..., R, C] and scales, one alone or [..., ceil(R / rows), ceil(C / columns)]."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    block: Block
    zero_point: str | None = None
    """A tensor that must hold zeros: FP8 is symmetric."""

    @property
    def parts(self) -> Collection[str]:
        """Names of codes, scale and zero point."""
        return [part for part in (self.codes, self.scale, self.zero_point) if part is not None]

    def values(self, first: int, end: int, stored: Reader) -> Tensor:
        """Codes times scales (`SmallTensor.values`)."""
        if self.zero_point is not None and stored.tensor(self.zero_point).float().any():
            raise ValueError(f"{self.zero_point} is not zero, but FP8 is symmetric")
        codes = stored.rows(self.codes, first, end).float()
        if torch.isnan(codes).any():
            raise ValueError("holds FP8 codes that are no numbers; download it again")
        scale = self._scale(first, end, stored)
        if not (torch.isfinite(scale) & (scale >= 0)).all():
            raise ValueError(f"{self.scale} holds a scale that is negative or no number")
        if not scale.all() and (codes.ne(0) & scale.eq(0)).any():
            # A block of zeros may have a scale of zero; any other would be lost.
            raise ValueError(f"{self.scale} is zero where the codes are not")
        return codes.mul_(scale)

    def _scale(self, first: int, end: int, stored: Reader) -> Tensor:
        """Scales of some entries, of a shape that broadcasts with theirs."""
        if math.prod(self.scale_shape) == 1:
            return stored.tensor(self.scale).float().reshape([1] * len(self.shape))
        R, C = self.shape[-2:]
        high, wide = self.block[0] or R, self.block[1] or C
        if len(self.shape) > 2:  # the first dimension is that of the experts, on both sides
            scale = _spread(stored.rows(self.scale, first, end).float(), high, -2)[..., :R, :]
        else:
            start = first // high
            scale = _spread(stored.rows(self.scale, start, -(-end // high)).float(), high, 0)
            if len(scale) > 1:
                scale = scale[first - start * high :][: end - first]
        return _spread(scale, wide, -1)[..., :C]


def _spread(scale: Tensor, times: int, dim: int) -> Tensor:
    """Every scale `times` times along a dimension; one alone broadcasts as it is."""
    alone = times == 1 or scale.shape[dim] == 1
    return scale if alone else scale.repeat_interleave(times, dim)


def scaled(kinds: Kinds, codes: str, scale: str | None, blocks: Sequence[Block]) -> ScaledTensor:
    """A tensor from its header and its scale's; ValueError where the scale is missing or has a
    shape of none of `blocks`."""
    shape = kinds[codes][1]
    if scale is None:
        raise ValueError(f"{codes} is FP8 but its scale is missing")
    dtype, found = kinds[scale]
    if dtype not in _SCALES:
        raise ValueError(f"{scale} is {dtype}, expected one of {', '.join(_SCALES)}")
    if len(shape) < 2:
        raise ValueError(f"{codes} is FP8 {list(shape)}, expected a matrix")
    expected = [_grid(shape, block) for block in blocks]
    for block, grid in zip(blocks, expected, strict=True):
        if found == grid or (block == WHOLE and math.prod(found) == 1 and len(shape) == 2):
            return ScaledTensor(codes, scale, shape, found, block)
    fitting = " or ".join(str(list(grid)) for grid in expected)
    raise ValueError(f"{scale} is {list(found)}, {codes} {list(shape)} implies {fitting}")


def _grid(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a tensor in blocks."""
    sizes = zip(shape[-2:], block, strict=True)
    return (*shape[:-2], *(math.ceil(size / (of or size or 1)) for size, of in sizes))
