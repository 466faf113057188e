"""`quant_method: mxfp4`, as gpt-oss is published: the experts' weights in 4-bit floats.

`gate_up_proj_blocks` uint8 [E, N, K / 32, 16] holds two codes E2M1 a byte, the earlier input in the
low half; `gate_up_proj_scales` uint8 [E, N, K / 32] holds E8M0, 2^(byte − 127) for 32 inputs. The
16-bit model has `gate_up_proj` [E, K, N]: inputs before outputs. Source: OCP Microscaling Formats
1.0; transformers' GptOssExperts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.formats.sources.source import (
    Kinds,
    Reader,
    Section,
    SourceFormat,
    Stored,
    left_over,
)

_BLOCKS, _SCALES = "_blocks", "_scales"
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF, *(-value for value in _HALF))
"""The values of the sixteen codes."""
_BIAS, _NAN = 127, 255
"""Of E8M0."""


@dataclass(frozen=True)
class Mxfp4Tensor:
    """Experts [E, K, N] from blocks [E, N, K / 32, 16] and scales [E, N, K / 32]."""

    blocks: str
    scales: str
    shape: tuple[int, ...]

    @property
    def parts(self) -> Collection[str]:
        """Names of blocks and scales."""
        return [self.blocks, self.scales]

    def values(self, first: int, end: int, stored: Reader) -> Tensor:
        """Codes times powers of two (`SmallTensor.values`), turned so that inputs come before outputs."""
        exponents = stored.rows(self.scales, first, end)
        if exponents.eq(_NAN).any():
            raise ValueError(f"{self.scales} holds a scale that is no number; download it again")
        codes = stored.rows(self.blocks, first, end)
        table = torch.tensor([[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)])
        pairs = table[codes.int()].flatten(-2)  # [e, N, K / 32, 32]
        scaled = torch.ldexp(pairs, (exponents.int() - _BIAS).unsqueeze(-1))
        return scaled.flatten(-2).transpose(-1, -2)


class Mxfp4(SourceFormat):
    """Experts of 4-bit floats in blocks of 32."""

    name = "mxfp4"

    def recognizes(self, section: Section) -> bool:
        """By quant_method."""
        return section.get("quant_method") == "mxfp4"

    def stored(self, section: Section, kinds: Kinds) -> Stored:
        """Every tensor whose blocks there are."""
        tensors = {}
        for name, (dtype, shape) in kinds.items():
            if name.endswith(_SCALES) and f"{name.removesuffix(_SCALES)}{_BLOCKS}" not in kinds:
                raise ValueError(f"{name} is the scale of no blocks")
            if not name.endswith(_BLOCKS):
                continue
            plain = name.removesuffix(_BLOCKS)
            scales = plain + _SCALES
            if (dtype, len(shape), shape[-1:]) != ("U8", 4, (16,)):
                raise ValueError(f"{name} is {dtype} {list(shape)}, expected U8 [E, N, K / 32, 16]")
            if scales not in kinds:
                raise ValueError(f"{name} has no scales: {scales} is missing")
            if kinds[scales] != ("U8", shape[:-1]):
                found = f"{kinds[scales][0]} {list(kinds[scales][1])}"
                raise ValueError(f"{scales} is {found}, its blocks imply U8 {list(shape[:-1])}")
            if plain in kinds:
                raise ValueError(f"{plain} is stored twice: plain, and as {name}")
            E, N, G, _ = shape
            tensors[plain] = Mxfp4Tensor(name, scales, (E, 32 * G, N))
        stored = Stored(tensors, (), "MXFP4 in blocks of 32")
        left_over(kinds, stored, self.name)
        return stored
