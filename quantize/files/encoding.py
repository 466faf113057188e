"""How the tensors of an output become files: what shards of safetensors, or any other, do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.files.transaction import Transaction


class Encoding(Protocol):
    """Turns the parts of one model, which come one after the other, into files of a transaction.

    What it wrote it compares with the tensors while these are still at hand: VerifyError where
    it differs.
    """

    @property
    def total_size(self) -> int:
        """Bytes of tensor data so far."""

    @property
    def progress(self) -> dict[str, Any]:
        """What another one must know to go on (`restore`): plain JSON, without a key `hashes`."""

    def restore(self, written: Mapping[str, Any]) -> None:
        """Go on where the one that said `written` was; its files are in the transaction."""

    def add(self, files: Transaction, tensors: Mapping[str, Tensor]) -> None:
        """Take in the next part, whose tensors no other part holds."""

    def finish(
        self, files: Transaction, config: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Write what needs all parts and side files.

        config: config.json of the output. facts: the same with all defaults of the model's class
        filled in.
        """
