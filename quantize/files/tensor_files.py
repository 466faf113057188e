"""Tensors in several files of bounded size, read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

_FILE_BYTES = 1 << 28
"""Of a file of tensors: writing takes so much memory again, and smaller files would be many."""


def portions(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors by files of about `_FILE_BYTES`; writing a file takes its size again."""
    some: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        some[name] = tensor.detach().cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= _FILE_BYTES:
            yield some
            some = {}
            size = 0
    if some:
        yield some


class TensorFiles(Mapping[str, Tensor]):
    """Tensors in files, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
