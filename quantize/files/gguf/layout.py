"""How the tensors of a checkpoint stand in a GGUF file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantize.files.gguf.container import NUMBERS

FILE = "model.gguf"
"""The one file that holds all tensors."""
BLOCKS = {f"weight_{name}": name for name in NUMBERS if name.startswith("q")}
"""Last part of the name of a packed tensor → its type in the file."""
_LARGEST = torch.finfo(torch.float16).max


class Names(Protocol):
    """What a family of models calls its tensors in a file."""

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""

    @property
    def norm_offset(self) -> float:
        """What is added to weights of norms."""

    def tensor(self, name: str) -> str | None:
        """Name in the file of a tensor with transformers' name."""

    def module(self, tensor: str) -> tuple[str, str] | None:
        """Undo `tensor`: the module, and the part."""

    def heads(self, tensor: str, facts: Mapping[str, Any]) -> int | None:
        """How many heads have their rows interleaved; None where rows stay in order."""


@dataclass(frozen=True)
class Place:
    """Where and how one tensor of a checkpoint stands in a file."""

    name: str
    type: str
    """Its type in the file."""
    heads: int | None
    offset: float

    def stored(self, tensor: Tensor) -> Tensor:
        """The tensor as the file holds it: packed rows as they are, all others in float16 or
        float32."""
        if self.type.startswith("q"):
            return interleaved(tensor, self.heads)
        dtype = torch.float16 if self.type == "F16" else torch.float32
        return interleaved(tensor.to(torch.float32) + self.offset, self.heads).to(dtype)

    def read(self, stored: Tensor) -> Tensor:
        """Undo `stored`; floats in the dtype of the file, but norms with an offset."""
        back = apart(stored, self.heads)
        return back - self.offset if self.offset else back


def place_of(names: Names, name: str, tensor: Tensor, facts: Mapping[str, Any]) -> Place:
    """Where a tensor of a checkpoint goes; ValueError where a file has no place for it.

    Vectors are kept in float32, as llama.cpp wants them, and so is a matrix with a value beyond
    float16. facts: metadata of the file.
    """
    owner, _, part = name.rpartition(".")
    kind = BLOCKS.get(part)
    plain = f"{owner}.weight" if kind else name
    found = names.tensor(plain)
    if found is None:
        raise ValueError(f"tensor {name} has no place in a GGUF file of {names.architecture}")
    heads = names.heads(found, facts)
    if kind:
        return Place(found, kind, heads, 0.0)
    vector = tensor.dim() < 2
    beyond = vector or bool((tensor.abs() > _LARGEST).any())
    offset = names.norm_offset if vector and found.endswith("norm.weight") else 0.0
    return Place(found, "F32" if beyond else "F16", heads, offset)


def interleaved(tensor: Tensor, heads: int | None) -> Tensor:
    """Rows of each head [d] with its two halves in turn: 0, d/2, 1, d/2 + 1, … where transformers'
    RoPE turns j with j + d/2 and llama.cpp's neighbours."""
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def apart(tensor: Tensor, heads: int | None) -> Tensor:
    """Undo `interleaved`."""
    if heads is None:
        return tensor
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
