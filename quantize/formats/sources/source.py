"""What a format of small sources answers for: which tensors are stored small, and their values.

A format is one file in this folder and one name in `quantize/formats/sources/registry.py`. What it
says of tensors comes from headers alone, before any data is read, and what it reads is a few rows
of one tensor: memory never holds two tensors in both forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

Section = Mapping[str, Any]
"""config.json's quantization_config."""

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""(dtype as safetensors calls it, shape) of every tensor of a checkpoint by name."""

PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes that need no scale."""


class Reader(Protocol):
    """What is stored, read when it is asked for."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Entries `first` to `end` of a tensor's first dimension, `end` not among them."""


class SmallTensor(Protocol):
    """One tensor of the 16-bit model, from what is stored of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the 16-bit tensor."""

    @property
    def parts(self) -> Collection[str]:
        """Names of the stored tensors that it is made of."""

    def values(self, first: int, end: int, stored: Reader) -> Tensor:
        """Entries `first` to `end` of the first dimension, float32 [end − first, …].

        ValueError for scales or codes that no quantizer writes.
        """


@dataclass(frozen=True)
class Stored:
    """How a whole checkpoint is stored."""

    tensors: Mapping[str, SmallTensor]
    """By the names that the 16-bit model has for them."""
    dropped: Collection[str]
    """Stored tensors that say nothing of weights: scales of activations and of KV caches."""
    form: str
    """What it is, for people: FP8 in blocks of 128x128."""


class SourceFormat(ABC):
    """One way in which models are published small."""

    name: ClassVar[str]
    """As people call it, in the list of what pq reads."""

    @abstractmethod
    def recognizes(self, section: Section) -> bool:
        """Whether quantization_config is one of this format, however broken."""

    @abstractmethod
    def stored(self, section: Section, kinds: Kinds) -> Stored:
        """What the tensors of a checkpoint are.

        ValueError for a section or tensors that do not fit the format.
        """


def left_over(kinds: Kinds, stored: Stored, name: str) -> None:
    """ValueError for a tensor that is neither a plain float nor a part of `stored`, and where
    nothing is stored small."""
    used = {part for tensor in stored.tensors.values() for part in tensor.parts}
    for tensor, (dtype, _) in kinds.items():
        if dtype not in PLAIN and tensor not in used and tensor not in stored.dropped:
            raise ValueError(f"{tensor} is {dtype}, which {name} has no use for")
    if not stored.tensors:
        raise ValueError(
            f"config.json says {name} but no tensor is stored so; if the weights are the original "
            "ones, remove quantization_config from config.json"
        )
