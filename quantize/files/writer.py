"""Writing a checkpoint so that it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.files.encoding import Encoding
from quantize.files.transaction import Transaction

if TYPE_CHECKING:
    from torch import Tensor


class CheckpointWriter(Transaction):
    """A transaction whose tensors go through an encoding.

    Another writer goes on from `written` of this one, where `kept` is the folder in which its
    files stayed.
    """

    def __init__(
        self,
        output: Path,
        encoding: Encoding,
        kept: Path | None = None,
        written: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(output, kept, written["hashes"] if written else None, overwrite)
        self._encoding = encoding
        if written:
            encoding.restore(written)

    @property
    def progress(self) -> dict[str, Any]:
        """What another writer must know of the files so far to go on: plain JSON."""
        return self._encoding.progress | {"hashes": dict(self._hashes)}

    @property
    def total_size(self) -> int:
        """Bytes of tensor data written so far."""
        return self._encoding.total_size

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next part of the model."""
        self._encoding.add(self, tensors)

    def finish(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write what needs all parts, side files and config.json's content; `commit` comes last.

        facts: config with all defaults of the model's class filled in.
        """
        self._encoding.finish(self, config, facts)
