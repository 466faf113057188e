"""llama.cpp's blocks of 32 inputs: Q4_0, Q4_1 and Q8_0.

Worked bytes, Q4_0: 2 bytes of the float16 scale d, then 16 bytes of which byte j holds code j in
its low and code j + 16 in its high nibble, value d · (nibble − 8). Codes −8 … 7 of which the first
is −8 and the seventeenth 7 start with 0xF0. Q4_1 has the float16 minimum m behind d and value
d · nibble + m. Q8_0 has d and 32 signed bytes, value d · byte. (`block_q4_0` and the like in ggml.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.formats.packed_int import PackedInt

BLOCK = 32
"""Inputs that share a scale."""


@dataclass(frozen=True)
class Kind:
    """One type of block."""

    name: str
    """As llama.cpp calls it, in lower case."""
    number: int
    """By which files name it (`ggml_type`)."""
    bits: int
    bytes: int
    """Of a block."""
    lowest: int
    """Smallest code as `PackedBlocks` holds it."""
    has_minimum: bool = False

    @property
    def suffix(self) -> str:
        """Name of a linear's tensor, after the linear's own."""
        return f"weight_{self.name}"

    @property
    def bits_per_weight(self) -> float:
        """Scales counted."""
        return 8 * self.bytes / BLOCK


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("q4_0", 2, 4, 18, -8),
        Kind("q4_1", 3, 4, 20, 0, has_minimum=True),
        Kind("q8_0", 8, 8, 34, -128),
    )
}
SUFFIXES = tuple(kind.suffix for kind in KINDS.values())
"""Names of packed tensors, after the linear's own."""


@dataclass(frozen=True)
class BlockScheme:
    """How a set of linears is stored: in blocks of one type."""

    kind: str

    fp8_activations = False

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return self._kind.bits

    @property
    def group_size(self) -> int:
        """Always 32."""
        return BLOCK

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The one tensor of a linear, after the linear's name."""
        return (self._kind.suffix,)

    def layout(self, N: int, K: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """uint8 [N, K / 32 · bytes of a block]; ValueError where blocks do not divide K."""
        if K % BLOCK:
            raise ValueError(f"{K} inputs are no multiple of the block {BLOCK}")
        return {self._kind.suffix: (torch.uint8, (N, K // BLOCK * self._kind.bytes))}

    def stored_bits(self, N: int, K: int) -> float:
        """Bits that one weight takes, scales counted."""
        return self._kind.bits_per_weight

    def read(self, tensors: Mapping[str, Tensor]) -> PackedBlocks:
        """The weight stored in `tensors` by suffix; ValueError where it is no such blocks."""
        if self._kind.suffix not in tensors:
            raise ValueError(f"{self._kind.suffix} is missing")
        return PackedBlocks.from_bytes(tensors[self._kind.suffix], self.kind)

    def as_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """One entry of config_groups."""
        return {"targets": list(targets), "format": self.kind}

    @classmethod
    def from_json(cls, group: Mapping[str, Any]) -> BlockScheme:
        """Undo `as_json`; ValueError for blocks that pq does not write."""
        if group["format"] not in KINDS:
            raise ValueError(f"blocks are {group['format']!r}, only {', '.join(KINDS)} are read")
        return cls(group["format"])


@dataclass(frozen=True)
class PackedBlocks:
    """A linear's weight [N, K] as codes with a float16 scale, and of some types a float16 minimum,
    for every 32 inputs. Value = code · scale + minimum. Scales may be negative."""

    kind: str
    codes: Tensor  # int8 [N, K]
    scale: Tensor  # float16 [N, K / 32]
    minimum: Tensor | None = None  # float16 [N, K / 32]

    def __post_init__(self) -> None:
        kind, (N, K) = KINDS[self.kind], self.codes.shape
        if K % BLOCK:
            raise ValueError(f"{K} inputs are no multiple of the block {BLOCK}")
        if (self.minimum is not None) != kind.has_minimum:
            raise ValueError(f"{self.kind} has {'a' if kind.has_minimum else 'no'} minimum")
        for name, tensor in (("scale", self.scale), ("minimum", self.minimum)):
            if tensor is None:
                continue
            if tensor.dtype != torch.float16 or tuple(tensor.shape) != (N, K // BLOCK):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected float16 "
                    f"{(N, K // BLOCK)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"a {name} is NaN or Inf")

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return KINDS[self.kind].bits

    @property
    def group_size(self) -> int:
        """Always 32."""
        return BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales counted."""
        return KINDS[self.kind].bits_per_weight

    def scheme(self, fp8_activations: bool) -> BlockScheme:
        """How it is stored; ValueError for FP8 activations, which llama.cpp has not."""
        if fp8_activations:
            raise ValueError("llama.cpp has no FP8 activations")
        return BlockScheme(self.kind)

    def tensors(self) -> dict[str, Tensor]:
        """The one checkpoint tensor, uint8 [N, K / 32 · bytes of a block]."""
        kind = KINDS[self.kind]
        N, K = self.shape
        codes = self.codes.view(N, K // BLOCK, BLOCK)
        if kind.bits == 4:
            nibbles = (codes - kind.lowest).to(torch.uint8)
            if nibbles.numel() and int(nibbles.max()) > 15:
                raise ValueError(f"codes outside the range of {self.kind}")
            data = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
        else:
            data = codes.view(torch.uint8)
        heads = [self.scale] if self.minimum is None else [self.scale, self.minimum]
        parts = [head.contiguous().view(torch.uint8).view(N, K // BLOCK, 2) for head in heads]
        return {kind.suffix: torch.cat([*parts, data], dim=2).reshape(N, -1)}

    @classmethod
    def from_bytes(cls, data: Tensor, name: str) -> PackedBlocks:
        """Read back the tensor of `tensors()`; ValueError where it cannot be one."""
        kind = KINDS[name]
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % kind.bytes:
            raise ValueError(
                f"{kind.suffix} is {data.dtype} {tuple(data.shape)}, expected uint8 rows of "
                f"{kind.bytes} bytes a block"
            )
        blocks = data.view(len(data), -1, kind.bytes)
        ends = 2 * (1 + kind.has_minimum)
        heads = blocks[..., :ends].contiguous().view(torch.float16)
        rest = blocks[..., ends:]
        if kind.bits == 4:
            nibbles = torch.cat([rest & 15, rest >> 4], dim=2).to(torch.int8)
            codes = nibbles + kind.lowest
        else:
            codes = rest.contiguous().view(torch.int8)
        minimum = heads[..., 1].contiguous() if kind.has_minimum else None
        return cls(name, codes.reshape(len(data), -1), heads[..., 0].contiguous(), minimum)

    def unpack(self) -> Tensor:
        """Weight [N, K] in float32, as llama.cpp dequantizes it."""
        N, K = self.shape
        values = self.codes.float().view(N, K // BLOCK, BLOCK) * self.scale.float()[..., None]
        if self.minimum is not None:
            values = values + self.minimum.float()[..., None]
        return values.reshape(N, K)

    def kernel_weight(self) -> Tensor:
        """As `unpack`: no kernel of ours multiplies blocks with FP8 activations."""
        return self.unpack()

    def unit(self) -> Tensor:
        """Step between neighbouring codes of every block, float32 [N, K / 32]."""
        return self.scale.float()

    def points(self) -> Tensor:
        """Values of all codes in units of the step, rising, without the minimum, float32."""
        low = KINDS[self.kind].lowest
        return torch.arange(low, low + (1 << self.bits), dtype=torch.float32).to(self.codes.device)


@dataclass(frozen=True)
class Exported:
    """What became of integer groups that were put into blocks."""

    blocks: PackedBlocks
    scales: int
    """Groups there were."""
    rounded: int
    """Those of them whose bfloat16 scale float16 does not hold, which got the nearest."""
    change: float
    """The largest relative change of a scale."""


def export(packed: PackedInt) -> Exported:
    """Integer groups as blocks with the same codes: up to 4 bits as Q4_0, more as Q8_0.

    A group of 32·n inputs becomes n blocks of one scale. float16 holds bfloat16's mantissa and the
    exponents of scales between 6.1e-5 and 65504; below that it loses bits, which is counted.
    ValueError for groups that blocks do not divide, and for a scale that float16 does not reach.
    """
    if packed.group_size % BLOCK:
        raise ValueError(
            f"groups of {packed.group_size} inputs are no whole blocks of {BLOCK}; set group_size "
            f"to a multiple of {BLOCK}"
        )
    scale = packed.scale.to(torch.float16)
    if not torch.isfinite(scale).all():
        raise ValueError(f"a scale of {float(packed.scale.float().abs().max()):.3g} is above 65504")
    then, now = packed.scale.float(), scale.float()
    rounded = then != now
    moved = ((now - then).abs() / then.abs().clamp_min(torch.finfo(torch.float32).tiny))[rounded]
    blocks = PackedBlocks(
        "q4_0" if packed.bits <= 4 else "q8_0",
        packed.codes,
        scale.repeat_interleave(packed.group_size // BLOCK, dim=1),
    )
    change = float(moved.max()) if moved.numel() else 0.0
    return Exported(blocks, math.prod(scale.shape), int(rounded.sum()), change)


def nearest_q8(weight: Tensor) -> PackedBlocks:
    """A float matrix [N, K] as Q8_0 with scales max|w| / 127, as llama.cpp rounds it; ValueError
    where blocks do not divide K or a weight is above what float16 scales reach."""
    N, K = weight.shape
    if K % BLOCK:
        raise ValueError(f"{K} inputs are no multiple of the block {BLOCK}")
    grouped = weight.float().view(N, K // BLOCK, BLOCK)
    scale = (grouped.abs().amax(dim=2) / 127).to(torch.float16)
    step = torch.where(scale > 0, scale.float(), 1.0)[..., None]
    codes = (grouped / step).round_().clamp_(-127, 127).to(torch.int8)
    return PackedBlocks("q8_0", codes.reshape(N, K), scale)
