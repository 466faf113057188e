"""Lazy, suspicious reading of a Hugging Face safetensors checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize.errors import ModelError
from quantize.files import strict_json
from quantize.files.adapter import require_no_adapter
from quantize.files.finite import FLOATS, require_finite_floats
from quantize.files.folder import inside, read_json
from quantize.files.hashing import sha256_file
from quantize.files.side_files import side_files, without_model_code
from quantize.files.small import Dequantized
from quantize.files.weight_files import (
    INDEX_NAME,
    NAMED,
    SINGLE_NAME,
    WeightFiles,
    index_problems,
    require_shard,
    weight_files,
)

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "header_entries", "read_json"]

# buffers that early Llama checkpoints store and models compute anew
_COMPUTED = (".rotary_emb.inv_freq",)


def bits_of(dtype: str) -> int:
    """Bits of a value, by what the safetensors format calls its dtype; 8 for one without a number
    (BOOL)."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


class Checkpoint:
    """A folder with config.json and safetensors weights. Opens shards only while tensors are read.

    Its weights are those that transformers would load (`weight_files`). Raises ModelError for
    pickles, adapters, missing, truncated or escaping shards, and for two tensors of one name that
    differ.
    Links are followed within the folder and to the Hub cache's blobs, nowhere else.
    """

    dequantized: Dequantized | None = None
    """What of it is stored small and dequantized when it is read; None where nothing is."""
    notes: tuple[str, ...] = ()
    """What of the folder is not read though it might be meant, a line each."""
    passed_over: tuple[str, ...] = ()
    """Stored tensors that models compute anew, which are as if they were not there."""
    _index: str | None = None
    problems: tuple[str, ...] = ()
    """Where the index and the shards disagree; transformers goes by the shards, and so does pq."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelError(
                f"{folder}: no such folder; give a local model folder or a Hub id (org/name)"
            )
        require_no_adapter(folder)
        told = read_json(inside(folder, folder / "config.json"))
        self.config = without_model_code({k: v for k, v in told.items() if k != NAMED})
        if place := strict_json.not_finite(self.config):
            raise ModelError(
                f"{folder}/config.json: {place} is not a finite number; give the original file"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor by name, from the headers alone."""
        self.dtypes: dict[str, str] = {}
        """What the safetensors format calls the dtype of every tensor (BF16, F8_E4M3), by name."""
        self._where = self._read_headers(weight_files(folder, told))
        self.shards = sorted(set(self._where.values()))

    def bytes_of(self, name: str) -> float:
        """What a tensor takes on the disk."""
        return math.prod(self.shapes[name]) * bits_of(self.dtypes[name]) / 8

    def _read_headers(self, files: WeightFiles) -> dict[str, str]:
        """Shard of every tensor by name."""
        self.notes = (f"{self.folder}: {files.note}",) if files.note else ()
        self._index = files.index
        held = {shard: self._kinds_in(shard) for shard in files.shards}
        self.problems = index_problems(files, held)
        if self.problems:
            more = f" and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            self.notes += (
                f"{self.folder}: {files.index} and its shards disagree, and the shards count, as in "
                f"transformers ({self.problems[0]}{more})",
            )
        where: dict[str, str] = {}
        for shard, kinds in held.items():
            for name, kind in kinds.items():
                if name in where and not self._is_twice(name, where[name], shard):
                    raise ModelError(
                        f"{self.folder}: tensor {name} is in {where[name]} and in {shard}, with "
                        "other values; the checkpoint is inconsistent, download it again"
                    )
                where[name] = shard
                self.dtypes[name], self.shapes[name] = kind
        if not where:
            raise ModelError(f"{self.folder}: the checkpoint holds no tensors")
        self.passed_over = tuple(sorted(name for name in where if name.endswith(_COMPUTED)))
        for name in self.passed_over:
            del self.dtypes[name], self.shapes[name], where[name]
        return where

    def _is_twice(self, name: str, *shards: str) -> bool:
        """Whether two shards hold the same tensor."""
        one, two = (self._tensor_in(shard, name) for shard in shards)
        same = one.dtype == two.dtype and one.shape == two.shape
        return same and torch.equal(
            one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)
        )

    def _tensor_in(self, shard: str, name: str) -> Tensor:
        path = self._shard_path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as err:
            raise ModelError(f"{path}: cannot be read ({err}); download it again") from None
        return tensor

    def _shard_path(self, shard: str) -> Path:
        return require_shard(self.folder, shard, self._index)

    def _kinds_in(self, shard: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of every tensor in a shard."""
        path = self._shard_path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                kinds = {n: (str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}
        except (SafetensorError, OSError, ValueError) as err:
            raise ModelError(
                f"{path}: not a readable safetensors file ({err}); download it again"
            ) from None
        header_entries(path)  # the library takes the last of two tensors of one name
        return kinds

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self, prefix: str = "") -> list[str]:
        """Tensor names that start with `prefix`, sorted."""
        return sorted(name for name in self._where if name.startswith(prefix))

    def tensor(self, name: str) -> Tensor:
        """One tensor, copied into memory."""
        return next(t for _, t in self._read([name]))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, keyed by the rest of their names."""
        return {
            name.removeprefix(prefix): tensor for name, tensor in self._read(self.names(prefix))
        }

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Entries `first` to `end` (which is not among them) of a tensor's first dimension;
        the others are not read. ModelError where it has none such."""
        shard, shape = self._place(name), self.shapes[name]
        if not shape or not 0 <= first < end <= shape[0]:
            raise ModelError(
                f"{self.folder}: {name} is {list(shape)} and has no entries {first} to {end}"
            )
        path = self._shard_path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                rows: Tensor = file.get_slice(name)[first:end].clone()
        except (SafetensorError, OSError) as err:
            raise ModelError(f"{path}: cannot be read ({err}); download it again") from None
        return rows

    def slice(self, name: str, index: int) -> Tensor:
        """Entry `index` of a tensor's first dimension, such as one expert of several; the
        others are not read. ModelError as `rows`."""
        return self.rows(name, index, index + 1)[0]

    def _place(self, name: str) -> str:
        """The shard that holds a tensor; ModelError for a tensor that there is not."""
        if name not in self._where:
            raise ModelError(f"{self.folder}: tensor {name} is missing from the checkpoint")
        return self._where[name]

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._place(name), []).append(name)
        for shard, wanted in by_shard.items():
            path = self._shard_path(shard)
            try:
                # The map is closed after each read: resident memory stays
                # bounded by what is asked for.
                with safe_open(path, framework="pt") as file:
                    for name in wanted:
                        yield name, file.get_tensor(name).clone()
            except (SafetensorError, OSError) as err:
                raise ModelError(f"{path}: cannot be read ({err}); download it again") from None

    def require_finite(self, copied: Callable[[str], bool] = lambda name: False) -> None:
        """ModelError for a tensor that cannot be quantized (`require_finite_floats`);
        memory holds one at a time. copied: whether a tensor is not quantized, and may be of any
        dtype."""
        for name, tensor in self._read(self.names()):
            if tensor.dtype in FLOATS or not copied(name):
                require_finite_floats({name: tensor}, "")

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """What `tensor` reads back as, were it written as `name` is here: of safetensors, the same."""
        return tensor

    def entries(self) -> dict[str, dict[str, Any]]:
        """What the header of its shard says of every tensor: dtype, shape and data_offsets."""
        # The safetensors library, which had checked every header, does not tell byte ranges.
        return {
            name: entry
            for shard in self.shards
            for name, entry in header_entries(self.folder / shard).items()
            if name in self
        }

    def side_files(self) -> list[Path]:
        """The files beside the weights that go with the model (`quantize.files.side_files`)."""
        return side_files(self.folder)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and every shard."""
        return {name: sha256_file(self.folder / name) for name in ("config.json", *self.shards)}


def unreadable(folder: Path, why: Exception) -> ModelError:
    """The error for a quantization_config that cannot be made sense of."""
    text = " ".join(f"{why}".split())[:200]
    return ModelError(
        f"{folder}/config.json: quantization_config is not one that pq reads ({text})"
    )


def header_entries(path: Path) -> dict[str, Any]:
    """The JSON header of a shard that the safetensors library accepts; ModelError
    where a name stands twice."""
    try:
        with path.open("rb") as file:
            entries: dict[str, Any] = strict_json.parse(
                file.read(int.from_bytes(file.read(8), "little")).decode()
            )
    except (OSError, ValueError, RecursionError) as err:
        raise ModelError(f"{path}: its header cannot be read ({err}); download it again") from None
    return entries
