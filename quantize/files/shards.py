"""Tensors as shards of safetensors with an index, one shard a part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.errors import VerifyError
from quantize.files.checkpoint import INDEX_NAME
from quantize.files.transaction import Transaction


class Shards:
    """The encoding of Hugging Face checkpoints: model-0000I-of-0000N.safetensors and an index."""

    def __init__(self, n_shards: int) -> None:
        self._n_shards = n_shards
        self._weight_map: dict[str, str] = {}
        self._total_size = 0

    @property
    def total_size(self) -> int:
        """Bytes of tensor data written so far."""
        return self._total_size

    @property
    def progress(self) -> dict[str, Any]:
        """What another one must know of the shards so far to go on."""
        return {"weight_map": self._weight_map, "total_size": self._total_size}

    def restore(self, written: Mapping[str, Any]) -> None:
        """Go on behind the shards that `written` names."""
        self._weight_map = dict(written["weight_map"])
        self._total_size = written["total_size"]

    def add(self, files: Transaction, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard, read it back and compare it bit for bit.

        VerifyError for a name of an earlier shard.
        """
        number = len({*self._weight_map.values()}) + 1
        name = f"model-{number:05d}-of-{self._n_shards:05d}.safetensors"
        if doubled := sorted(set(tensors) & set(self._weight_map)):
            raise VerifyError(
                f"{doubled[0]} would be written twice; this is a bug in pq, please report it"
            )
        plain = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
        files.write(
            name,
            lambda path: save_file(plain, path, metadata={"format": "pt"}),
            lambda path: _compare(path, plain),
        )
        self._weight_map |= dict.fromkeys(plain, name)
        self._total_size += sum(t.numel() * t.element_size() for t in plain.values())

    def finish(
        self, files: Transaction, config: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Write the index; VerifyError when fewer shards were written than announced."""
        written = set(self._weight_map.values())
        if len(written) != self._n_shards:
            raise VerifyError(
                f"{len(written)} of {self._n_shards} shards were written; this is a bug in pq"
            )
        weight_map = dict(sorted(self._weight_map.items()))
        index = {"metadata": {"total_size": self._total_size}, "weight_map": weight_map}
        files.write_json(INDEX_NAME, index)


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """VerifyError unless the shard holds these tensors bit for bit, and no others."""
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(tensors):
            raise VerifyError(f"{path}: holds other tensors than were written; check the disk")
        for name, tensor in tensors.items():
            back = file.get_tensor(name)
            same = back.dtype == tensor.dtype and back.shape == tensor.shape
            if not same or not torch.equal(_bits(back), _bits(tensor)):
                raise VerifyError(
                    f"{path}: {name} reads back differently from what was written; check the disk"
                )


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, also of one without axes."""
    return tensor.reshape(-1).view(torch.uint8)
