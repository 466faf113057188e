"""What every packed layout offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

STORED_AS: Mapping[torch.dtype, str] = {
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
"""Dtypes of packed tensors → their names in safetensors headers."""


def noted_shape(tensors: Mapping[str, Tensor], suffixes: Sequence[str]) -> tuple[int, int]:
    """[N, K] of the linear whose tensors these are, by suffix; ValueError unless all are
    there and the note is one."""
    if missing := [suffix for suffix in suffixes if suffix not in tensors]:
        raise ValueError(f"{missing[0]} is missing")
    note = tensors["weight_shape"]
    if (note.dtype, tuple(note.shape)) != (torch.int64, (2,)):
        raise ValueError(
            f"weight_shape is {note.dtype} {tuple(note.shape)}, expected torch.int64 (2,)"
        )
    N, K = note.tolist()
    return N, K


class Packed(Protocol):
    """A linear's weight [N, K] in its packed form."""

    @property
    def bits(self) -> int:
        """Bits of a weight code."""

    @property
    def group_size(self) -> int:
        """Consecutive inputs of one output row that share a code book."""

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (N, K)."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, all that the code book takes counted."""

    def scheme(self, fp8_activations: bool) -> AnyScheme:
        """How it is stored and run; ValueError for FP8 activations
        where there is no such kernel."""

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint tensors by suffix."""

    def unpack(self) -> Tensor:
        """Weight [N, K] in float32."""

    def kernel_weight(self) -> Tensor:
        """Weight [N, K] in float32 that the serving kernel multiplies where activations are FP8."""

    def unit(self) -> Tensor:
        """Mean step between neighbouring codes of every group, float32
        [N, G]; 0 in a group of zeros."""

    def points(self) -> Tensor:
        """Values of all codes in units of the step, rising, float32 [2^bits]; their
        mean where groups differ."""


class AnyScheme(Protocol):
    """How a set of linears is stored and run."""

    @property
    def bits(self) -> int:
        """Bits of a weight code."""

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs of one output row that share a code book; None: all of them."""

    @property
    def fp8_activations(self) -> bool:
        """Whether inputs are rounded to E4M3 per token."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names of a linear's tensors in the checkpoint, after the linear's own."""

    def layout(self, N: int, K: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of a linear [N, K], by suffix; ValueError
        where it cannot be stored so."""

    def stored_bits(self, N: int, K: int) -> float:
        """Bits that one weight of a linear [N, K] takes, all that its code book takes counted."""

    def read(self, tensors: Mapping[str, Tensor]) -> Packed:
        """The weight stored in `tensors` by suffix; ValueError when they do not fit the scheme."""

    def as_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """One entry of config_groups."""


def scheme_names(schemes: Iterable[AnyScheme]) -> list[str]:
    """Each way of packing once, by bits and group."""
    kinds = {(s.bits, s.group_size, s.fp8_activations, s.as_json([])["format"]) for s in schemes}
    return [
        f"{bits}-bit {f'g{group}' if group else 'channel-wise'} {layout} with "
        f"{'FP8' if fp8 else '16-bit'} activations"
        for bits, group, fp8, layout in sorted(
            kinds, key=lambda kind: (kind[0], kind[1] or 0, *kind[2:])
        )
    ]
