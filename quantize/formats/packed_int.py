"""`pack-quantized`: dense little-endian integer codes in int32 words,
one scale per group of inputs.

Worked bits, 4-bit: element i of a row lies in word i // 8 at bits 4·(i % 8) … +3 and holds q + 8,
so codes [-8, 7, 0, 1] start a row with word 0x...98F0: nibbles 0x0, 0xF, 0x8, 0x9 from the low
end. At 3 bits element i starts at bit 3·i of the row's bit string and may cross a word border; a
row always starts a new word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.formats.fp8 import product_weight, row_factor
from quantize.formats.scheme import noted_shape

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Names of a linear's tensors in the checkpoint, after the linear's own."""


def words_per_row(columns: int, bits: int) -> int:
    """int32 words that hold one row of `columns` codes."""
    return math.ceil(columns * bits / 32)


def stored_bits(bits: int, group_size: int | None, K: int) -> float:
    """Bits that one weight of a row of K takes, its share of the group's bfloat16 scale and of
    the row's last word counted: bits + 16 / group_size where K is a multiple of 32.

    group_size: None where a whole row shares one scale.
    """
    return (32 * words_per_row(K, bits) + 16 * (K // (K if group_size is None else group_size))) / K


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes [N, K] (any integer dtype, -2^(bits-1) … 2^(bits-1)-1) into
    int32 [N, ceil(K·bits/32)]."""
    half = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ValueError(f"codes outside the {bits}-bit range [{-half}, {half - 1}]")
    return torch.cat(
        [_pack_rows(rows, bits) for rows in torch.split(codes, _rows_at_once(codes.shape[1]))]
    )


def _rows_at_once(columns: int) -> int:
    # The int64 work space of a piece stays in the cache, and small beside the weight.
    return max(1, (1 << 18) // max(1, columns))


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    N, K = codes.shape
    # 32 codes fill exactly `bits` words, so every run of 32 codes packs alike.
    runs = math.ceil(K / 32)
    padded = torch.zeros(N, runs * 32, dtype=torch.int64, device=codes.device)
    padded[:, :K] = codes.to(torch.int64) + half
    run = padded.view(N, runs, 32)
    words = torch.zeros(N, runs, bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= run[..., i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= run[..., i] >> (32 - shift)
    words = words.view(N, runs * bits)[:, : words_per_row(K, bits)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_codes`: int32 [N, W] → int8 codes [N, columns]."""
    pieces = torch.split(packed, _rows_at_once(columns))
    return torch.cat([_unpack_rows(rows, bits, columns) for rows in pieces])


def _unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    N = packed.shape[0]
    runs = math.ceil(columns / 32)
    words = torch.zeros(N, runs * bits, dtype=torch.int64, device=packed.device)
    words[:, : packed.shape[1]] = packed.to(torch.int64) & 0xFFFFFFFF
    words = words.view(N, runs, bits)
    mask = (1 << bits) - 1
    run = torch.empty(N, runs, 32, dtype=torch.int8, device=packed.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = words[..., word] >> shift
        if shift + bits > 32:
            value = value | words[..., word + 1] << (32 - shift)
        run[..., i] = ((value & mask) - (1 << (bits - 1))).to(torch.int8)
    return run.view(N, runs * 32)[:, :columns].contiguous()


@dataclass(frozen=True)
class IntScheme:
    """How one set of linears is stored and run."""

    bits: int
    group_size: int | None
    """None: a whole row shares one scale (channel-wise), however many inputs it has."""
    fp8_activations: bool

    suffixes = SUFFIXES

    def group(self, K: int) -> int:
        """Inputs that share a scale in a linear with K of them."""
        return K if self.group_size is None else self.group_size

    def layout(self, N: int, K: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of a linear [N, K], by suffix; ValueError
        where groups do not divide K."""
        if K % self.group(K):
            raise ValueError(f"{K} inputs are no multiple of the group {self.group_size}")
        return {
            "weight_packed": (torch.int32, (N, words_per_row(K, self.bits))),
            "weight_scale": (torch.bfloat16, (N, K // self.group(K))),
            "weight_shape": (torch.int64, (2,)),
        }

    def stored_bits(self, N: int, K: int) -> float:
        """Bits that one weight takes, its share of the group's scale counted."""
        return stored_bits(self.bits, self.group_size, K)

    def read(self, tensors: Mapping[str, Tensor]) -> PackedInt:
        """The weight stored in `tensors` by suffix; ValueError when they do not fit the scheme."""
        return PackedInt.from_tensors(tensors, self.bits, self.group_size)

    def as_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """One entry of config_groups."""
        activations = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        return {
            "targets": list(targets),
            # Without it compressed-tensors >= 0.18 infers an 8-bit layout for INT4
            # weights with FP8 activations.
            "format": "pack-quantized",
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if self.group_size is None else "group",
                "group_size": self.group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": activations if self.fp8_activations else None,
            "output_activations": None,
        }

    @classmethod
    def from_json(cls, group: Mapping[str, Any]) -> IntScheme:
        """Undo `as_json`; ValueError for a scheme that pq does not write."""
        weights, activations = group["weights"], group.get("input_activations")
        kind, strategy = weights["type"], weights.get("strategy")
        if kind != "int" or not weights["symmetric"] or strategy not in ("group", "channel"):
            raise ValueError(f"weights are {kind}/{strategy}, only symmetric int groups are read")
        group_size = weights.get("group_size")
        if strategy == "channel" and group_size not in (None, -1):
            raise ValueError(f"weights have strategy channel and groups of {group_size!r} inputs")
        if strategy == "group" and group_size is None:
            raise ValueError("weights have strategy group and no group_size, only groups are read")
        if activations and (activations["type"] != "float" or activations["strategy"] != "token"):
            raise ValueError("activations are not dynamic per-token FP8")
        return cls(
            weights["num_bits"], None if strategy == "channel" else group_size, bool(activations)
        )


@dataclass(frozen=True)
class PackedInt:
    """A linear's weight [N, K] as signed integer codes with one scale per group of
    `group_size` inputs: bfloat16 where pq wrote it, the dtype of their model in others' checkpoints.

    Value = code · scale of its group (`unpack`). Scales may be negative: a flipped sign puts the extra
    code -2^(bits-1) on the other side.
    """

    codes: Tensor  # int8 [N, K]
    scale: Tensor  # of SCALE_DTYPES, [N, K / group_size]
    bits: int
    group_size: int
    channelwise: bool = False
    """Whether the one group of a row is declared as the row, not as a group of so many inputs."""

    def __post_init__(self) -> None:
        N, K = self.codes.shape
        if K % self.group_size:
            raise ValueError(f"{K} inputs are no multiple of the group {self.group_size}")
        if self.channelwise and self.group_size != K:
            raise ValueError(f"{K} inputs in groups of {self.group_size} are not channel-wise")
        if self.codes.dtype != torch.int8 or self.scale.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"codes are {self.codes.dtype} and scale {self.scale.dtype}, expected int8 and one "
                "of bfloat16, float16, float32"
            )
        if tuple(self.scale.shape) != (N, K // self.group_size):
            raise ValueError(
                f"scale is {tuple(self.scale.shape)}, expected {(N, K // self.group_size)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales counted."""
        return stored_bits(self.bits, self.group_size, self.shape[1])

    def scheme(self, fp8_activations: bool) -> IntScheme:
        """How it is stored and run."""
        group_size = None if self.channelwise else self.group_size
        return IntScheme(self.bits, group_size, fp8_activations)

    def unit(self) -> Tensor:
        """Step between neighbouring codes of every group, float32 [N, G]."""
        return self.scale.float()

    def points(self) -> Tensor:
        """Values of all codes in units of the step, float32 [2^bits]."""
        half = 1 << (self.bits - 1)
        return torch.arange(-half, half, dtype=torch.float32, device=self.codes.device)

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint tensors by suffix."""
        return {
            "weight_packed": pack_codes(self.codes, self.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], bits: int, group_size: int | None
    ) -> PackedInt:
        """Read back `tensors()`; ValueError when shapes or dtypes disagree. group_size: None
        where a whole row shares one scale."""
        N, K = noted_shape(tensors, SUFFIXES)
        packed = tensors["weight_packed"]
        if tuple(packed.shape) != (N, words_per_row(K, bits)) or packed.dtype != torch.int32:
            raise ValueError(
                f"weight_packed is {packed.dtype} {tuple(packed.shape)}, expected int32 for "
                f"{(N, K)}"
            )
        codes, scale = unpack_codes(packed, bits, K), tensors["weight_scale"]
        if group_size is None:
            return cls(codes, scale, bits, K, channelwise=True)
        return cls(codes, scale, bits, group_size)

    def unpack(self) -> Tensor:
        """Weight [N, K] in float32: what stock loaders compute (code · scale)."""
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)
        return self.codes.float() * scale

    def kernel_weight(self) -> Tensor:
        """Weight [N, K] in float32 that an INT4×FP8 tensor-core kernel
        multiplies (see `product_weight`)."""
        factor = row_factor(self.scale)
        scale = self.scale.repeat_interleave(self.group_size, dim=1)
        return product_weight(self.codes, scale, factor)
