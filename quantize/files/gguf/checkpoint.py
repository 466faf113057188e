"""A folder with config.json and model.gguf as a checkpoint in transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint, read_json
from quantize.files.folder import inside
from quantize.files.gguf.container import Entry, read_container
from quantize.files.gguf.encoding import read_rows, stored_shape
from quantize.files.gguf.layout import FILE, Names, Place

Unblock = Callable[[Tensor, str], Tensor]
"""Bytes of blocks [N, bytes of a row] and their type → values in float32."""
Reblock = Callable[[Tensor, str], Tensor]
"""A float matrix and a type of blocks → values in float32 as they would be read again."""
_ROPE = "rope_freqs.weight"
"""What llama.cpp reads there, transformers computes of config.json."""
_DTYPES = {"F32": "F32", "F16": "F16"}


class GgufCheckpoint(Checkpoint):
    """What pq wrote as GGUF, by transformers' names.

    Linears in blocks are `NAME.weight_q4_0` and the like, uint8; other matrices in blocks, such as
    the embedding, are dequantized to float32 when they are read. Rows and norms are as transformers
    has them.

    packed: full names of the linears in blocks. names: the family of an architecture, None for one
    that pq does not write. ModelError as `Checkpoint`, and for tensors that have no name there.
    """

    def __init__(
        self,
        folder: Path,
        packed: Collection[str],
        names: Callable[[str], Names | None],
        unblock: Unblock,
        reblock: Reblock,
    ) -> None:
        self.folder = folder
        self.config = read_json(inside(folder, folder / "config.json"))
        self.shards = [FILE]
        path = inside(folder, folder / FILE)
        if not path.is_file():
            raise ModelError(f"{path}: is missing; copy the folder again, or convert again")
        self._path, self._unblock, self._reblock = path, unblock, reblock
        container = read_container(path)
        self.metadata = container.metadata
        architecture = self.metadata.get("general.architecture")
        family = names(architecture) if isinstance(architecture, str) else None
        if family is None:
            raise ModelError(f"{path}: architecture {architecture!r} is none that pq writes")
        self._family = family
        self._tensors: dict[str, tuple[Entry, Place]] = {}
        self.shapes, self.dtypes = {}, {}
        for tensor, entry in container.tensors.items():
            if tensor == _ROPE:
                continue
            self._take(tensor, entry, packed)
        self._where = dict.fromkeys(self._tensors, FILE)

    def _take(self, tensor: str, entry: Entry, packed: Collection[str]) -> None:
        known = self._family.module(tensor)
        if known is None:
            raise ModelError(f"{self._path}: tensor {tensor[:80]} has no place in the model")
        module, part = known
        try:
            heads = self._family.heads(tensor, self.metadata)
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"{self._path}: says nothing of its heads") from None
        rows = entry.shape[0]
        if heads is not None and (heads < 1 or rows % (2 * heads)):
            raise ModelError(f"{self._path}: {tensor} has {rows} rows, for {heads} heads")
        norm = len(entry.shape) == 1 and tensor.endswith("norm.weight")
        offset = self._family.norm_offset if norm else 0.0
        blocks = entry.type.weights > 1
        name = f"{module}.{part}"
        if blocks and module in packed:
            name = f"{module}.weight_{entry.type.name}"
            self.shapes[name], self.dtypes[name] = stored_shape(entry), "U8"
        else:
            self.shapes[name] = entry.shape
            self.dtypes[name] = _DTYPES.get(entry.type.name, "F32")
        self._tensors[name] = entry, Place(tensor, entry.type.name, heads, offset)

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """As `Checkpoint.rows`; where rows are interleaved, all are read."""
        self._place(name)
        entry, place = self._tensors[name]
        if not 0 <= first < end <= entry.shape[0]:
            raise ModelError(
                f"{self.folder}: {name} is {list(self.shapes[name])} and has no entries {first} to "
                f"{end}"
            )
        if place.heads is not None:
            return self.tensor(name)[first:end].clone()
        return self._values(name, entry, read_rows(self._path, entry, first, end), place)

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            self._place(name)
            entry, place = self._tensors[name]
            yield name, self._values(name, entry, read_rows(self._path, entry), place)

    def _values(self, name: str, entry: Entry, stored: Tensor, place: Place) -> Tensor:
        back = place.read(stored).contiguous()
        if entry.type.weights == 1 or self.dtypes[name] == "U8":
            return back
        try:
            return self._unblock(back, entry.type.name)
        except ValueError as err:
            raise ModelError(f"{self._path}: {place.name}: {err}") from None

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """What `tensor` reads back as, were it written as `name` is here."""
        entry, place = self._tensors[name]
        if self.dtypes[name] == "U8":
            return tensor
        if entry.type.weights > 1:
            return self._reblock(tensor, entry.type.name)
        return place.read(place.stored(tensor)).contiguous()

    def entries(self) -> dict[str, dict[str, Any]]:
        """dtype and shape of every tensor as it reads; data_offsets tell the bytes in the file."""
        return {
            name: {
                "dtype": self.dtypes[name],
                "shape": self.shapes[name],
                "data_offsets": (entry.offset, entry.offset + entry.bytes),
            }
            for name, (entry, _) in self._tensors.items()
        }
