"""Lazy, suspicious reading of a Hugging Face safetensors checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize.errors import ModelError
from quantize.files import strict_json
from quantize.files.finite import FLOATS, require_finite_floats
from quantize.files.hashing import sha256_file
from quantize.files.small import Dequantized

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# buffers that early Llama checkpoints store and models compute anew
_COMPUTED = (".rotary_emb.inv_freq",)
# bytes, since all of a file is read; an index of 100,000 tensors has about ten MiB
_MAX_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; ModelError names the file and what is wrong with it."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(
                f"{path}: larger than {_MAX_JSON >> 20} MiB, not a model's {path.name}"
            )
        if not path.is_file():  # reading a pipe would wait for ever
            raise ModelError(f"{path}: is no plain file; put the model's own {path.name} there")
        data = strict_json.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: not found; give a folder that holds a Hugging Face model"
        ) from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as err:  # ValueError: no UTF-8, no JSON, or a number of 4300 digits
        raise ModelError(f"{path}: cannot be read as JSON ({err})") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return data


class Checkpoint:
    """A folder with config.json and safetensors weights. Opens shards only while tensors are read.

    Raises ModelError for pickles, missing, truncated or escaping shards, and tensors
    that are listed but not there.
    Links are followed within the folder and to the Hub cache's blobs, nowhere else.
    """

    dequantized: Dequantized | None = None
    """What of it is stored small and dequantized when it is read; None where nothing is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelError(
                f"{folder}: no such folder; give a local model folder or a Hub id (org/name)"
            )
        self.config = read_json(self._inside(folder / "config.json"))
        if place := strict_json.not_finite(self.config):
            raise ModelError(
                f"{folder}/config.json: {place} is not a finite number; give the original file"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor by name, from the headers alone."""
        self.dtypes: dict[str, str] = {}
        """What the safetensors format calls the dtype of every tensor (BF16, F8_E4M3), by name."""
        self._where = self._read_index()
        self.shards = sorted(set(self._where.values()))

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX_NAME
        if index.exists():
            weight_map = read_json(self._inside(index)).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(v, str) for v in weight_map.values()
            ):
                raise ModelError(f"{index}: weight_map must map tensor names to shard files")
            where = dict(weight_map)
        elif (self.folder / SINGLE_NAME).exists():
            where = dict.fromkeys(self._kinds_in(SINGLE_NAME), SINGLE_NAME)
        else:
            raise ModelError(self._no_weights())
        held = {shard: self._kinds_in(shard) for shard in sorted(set(where.values()))}
        for shard, kinds in held.items():
            listed, present = {name for name, s in where.items() if s == shard}, set(kinds)
            if missing := sorted(listed - present):
                raise ModelError(
                    f"{self.folder / shard}: tensor {missing[0]} is in the index but not in the "
                    "shard"
                )
            if extra := sorted(present - listed):
                raise ModelError(
                    f"{self.folder / shard}: tensor {extra[0]} is in the shard but the index "
                    f"places it in {where.get(extra[0], 'no file')}; the checkpoint is "
                    "inconsistent, download it again"
                )
        if not where:
            raise ModelError(f"{self.folder}: the checkpoint holds no tensors")
        stored = {n: kind for kinds in held.values() for n, kind in kinds.items()}
        wanted = [name for name in stored if not name.endswith(_COMPUTED)]
        self.dtypes = {name: stored[name][0] for name in wanted}
        self.shapes = {name: stored[name][1] for name in wanted}
        return {name: shard for name, shard in where.items() if name in self.shapes}

    def _no_weights(self) -> str:
        pickles = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder / pickles[0]}: pickle weights can run code and are not read; "
                "convert them first (load in transformers and save_pretrained with "
                "safe_serialization=True)"
            )
        if gguf := sorted(self.folder.glob("*.gguf")):
            return (
                f"{gguf[0]}: GGUF files are quantized already and are not read; give the model "
                "that it was made from, in safetensors"
            )
        return f"{self.folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}"

    def _shard_path(self, shard: str) -> Path:
        path = self.folder / shard
        if (
            Path(shard).name != shard
            or shard in ("", ".", "..")
            or "\\" in shard
            or not _is_file_name(shard)
        ):
            raise ModelError(
                f"{self.folder / INDEX_NAME}: shard {shard[:80]!r} is not a plain file name; "
                "refusing to follow it"
            )
        if not path.is_file():
            raise ModelError(f"{path}: shard is missing; download the checkpoint again")
        return self._inside(path)

    def _inside(self, path: Path) -> Path:
        # The Hub cache links files to blobs beside the snapshot; anything else that
        # leaves the folder is refused.
        try:
            target, root = path.resolve(), self.folder.resolve()
        except (OSError, RuntimeError):
            raise ModelError(f"{path}: is a link to itself; download it again") from None
        if not target.is_relative_to(root) and target.parent != (root.parent.parent / "blobs"):
            raise ModelError(
                f"{path}: links to {target}, outside the model folder; copy the file there instead"
            )
        return path

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
        """Every file that is not a weight, its index or config.json:
        tokenizer, templates, licence, …

        ModelError for one that may not be read, and for a link that leaves the folder:
        a copy would hold its target.
        """
        skip = {INDEX_NAME, "config.json", "pq.json", "pq-statistics.json", *self.shards}
        weights = {
            p
            for pattern in ("*.safetensors", "*.gguf", *_PICKLES)
            for p in self.folder.glob(pattern)
        }
        found = sorted(
            self._inside(p)
            for p in self.folder.iterdir()
            if p.is_file()
            and p not in weights
            and p.name not in skip
            and not p.name.startswith(".")
        )
        if closed := [path for path in found if not os.access(path, os.R_OK)]:
            raise ModelError(f"{closed[0]}: may not be read; change its permissions, or remove it")
        return found

    def hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and every shard."""
        return {name: sha256_file(self.folder / name) for name in ("config.json", *self.shards)}


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


def _is_file_name(name: str) -> bool:
    """Whether file systems can hold it: no NUL, no lone surrogate, not too long."""
    try:
        return "\0" not in name and len(name.encode()) < 256
    except UnicodeEncodeError:
        return False
