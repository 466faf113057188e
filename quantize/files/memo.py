"""Costly results kept on the disk under the hash of what they follow from, so that a
stopped run can pick them up."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.files.disk import report_errors
from quantize.parallel.ranks import ALONE, Ranks

_FACTS = "facts"


def digest(facts: Any, tensors: Iterable[Tensor]) -> str:
    """SHA-256 of JSON data and of the bytes, dtypes and shapes of tensors."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        # In pieces: `numpy` of a view of bytes shares memory, a whole copy on the CPU need not fit.
        for piece in torch.split(tensor.detach().flatten(), 1 << 24):
            found.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()


class Memo:
    """A folder of results, one file each; without a folder it remembers nothing. Of
    several ranks the first has it."""

    def __init__(self, folder: Path | None, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks

    def recall(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts kept under a key; None where there are none,
        or none that can be read."""
        if self.folder is None:
            return None
        tensors, facts = (self._read(key) if self.ranks.first else None) or ({}, None)
        facts = self.ranks.tell(facts)
        return None if facts is None else (self.ranks.tensors(tensors), facts)

    def _read(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        try:
            with safe_open(self._path(key), framework="pt") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
                return {name: file.get_tensor(name).clone() for name in file.keys()}, facts  # noqa: SIM118 - no dict
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def keep(self, key: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep tensors and facts; the file appears whole or not at all.
        OutputError where the disk refuses."""
        if self.folder is None or not self.ranks.first:
            return
        path = self._path(key)
        part = path.with_suffix(f".{os.getpid()}.part")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with report_errors(path):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file(plain, part, metadata={_FACTS: json.dumps(facts)})
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
