"""Writing a checkpoint so that it appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.errors import OutputError, UsageError, VerifyError
from quantize.files.checkpoint import INDEX_NAME, sha256_file
from quantize.files.disk import reported
from quantize.files.provenance import canonical_json

_LONGEST = 224
"""Bytes of an output's name: file systems take 255, the files beside it have longer ones."""


def require_name(output: Path) -> None:
    """OutputError unless `output` ends in a name that it and the files beside it can have, and is no link."""
    if output.name in ("", ".."):
        raise OutputError(f"--output {str(output)!r}: has no name of its own; give the path of a new folder")
    try:
        long = len(output.name.encode()) > _LONGEST
    except UnicodeEncodeError:
        raise OutputError(f"--output {str(output)!r}: its name is no UTF-8; give another one") from None
    if long:
        raise OutputError(f"--output {output.name[:40]}…: its name is too long; give one of at most {_LONGEST} bytes")
    with reported(output):
        if output.is_symlink():
            raise OutputError(f"{output}: is a link; give the folder itself as --output")


def require_free(output: Path) -> None:
    """OutputError unless `output` is absent or an empty folder whose parent can be written to."""
    require_name(output)
    with reported(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output}: exists and is not an empty folder; give another --output or remove it")
        parent = output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{output}: {parent} cannot be written to; give another --output")


def require_apart(model: Path, output: Path, work: Path | None) -> None:
    """UsageError where a conversion would write into the model that it reads, or keep its state in its output."""
    source, target = model.resolve(), output.resolve()
    for option, path in (("--output", output), ("--work", work)):
        if path is not None and path.resolve().is_relative_to(source):
            raise UsageError(f"{option} {path}: lies in the model's folder {model}; give a place outside of it")
    if work is not None and work.resolve().is_relative_to(target):
        raise UsageError(f"--work {work}: lies in --output {output}; give a place outside of it")


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all; folders are made. OutputError when it cannot be."""
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when what was written to a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Streams shards into a temporary folder beside `output`; `commit` verifies and renames it.

    Use as a context manager: leaving it without `commit`, by error or interrupt, removes everything it wrote. With
    `kept`, files are collected there instead and stay; another writer goes on from `written` of this one.
    """

    def __init__(
        self, output: Path, n_shards: int, kept: Path | None = None, written: Mapping[str, Any] | None = None
    ) -> None:
        require_free(output)
        self.output = output.absolute()
        self._n_shards = n_shards
        self._kept = kept
        self._weight_map: dict[str, str] = dict(written["weight_map"]) if written else {}
        self._hashes: dict[str, str] = dict(written["hashes"]) if written else {}
        self._total_size: int = written["total_size"] if written else 0
        self.folder = Path()

    def __enter__(self) -> CheckpointWriter:
        with reported(self._kept or self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self._kept is None:
                self.folder = self._temporary()
            else:
                self.folder = self._kept
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.iterdir():
                    if path.name not in self._hashes:  # half written when an earlier run was killed
                        path.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self.folder != self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def written(self) -> dict[str, Any]:
        """What another writer must know of the files so far to go on: plain JSON."""
        return {"weight_map": self._weight_map, "hashes": self._hashes, "total_size": self._total_size}

    @property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 of every file written so far, by name."""
        return dict(sorted(self._hashes.items()))

    @property
    def total_size(self) -> int:
        """Bytes of tensor data written so far."""
        return self._total_size

    def add_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard, read it back and compare it bit for bit while the tensors are still at hand."""
        number = len({*self._weight_map.values()}) + 1
        name = f"model-{number:05d}-of-{self._n_shards:05d}.safetensors"
        path = self.folder / name
        if doubled := sorted(set(tensors) & set(self._weight_map)):
            raise VerifyError(f"{doubled[0]} would be written twice; this is a bug in pq, please report it")
        plain = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
        with reported(path):
            save_file(plain, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())  # safetensors creates files that only their owner can read
            sync(path)
            _compare(path, plain)
            self._hashes[name] = sha256_file(path)
        self._weight_map |= dict.fromkeys(plain, name)
        self._total_size += sum(t.numel() * t.element_size() for t in plain.values())

    def copy(self, source: Path) -> None:
        """Copy a side file byte for byte."""
        target = self.folder / source.name
        with reported(target):
            shutil.copyfile(source, target)
            sync(target)
            self._hashes[source.name] = sha256_file(target)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file with stable formatting."""
        path = self.folder / name
        with reported(path):
            path.write_text(canonical_json(data), encoding="utf-8")
            sync(path)
            self._hashes[name] = sha256_file(path)

    def write_index(self) -> None:
        """Write the index of all shards; VerifyError when fewer shards were written than announced."""
        written = set(self._weight_map.values())
        if len(written) != self._n_shards:
            raise VerifyError(f"{len(written)} of {self._n_shards} shards were written; this is a bug in pq")
        weight_map = dict(sorted(self._weight_map.items()))
        self.write_json(INDEX_NAME, {"metadata": {"total_size": self._total_size}, "weight_map": weight_map})

    def commit(self) -> None:
        """Check that every file still is what was written, then let the folder appear under its final name."""
        for name, digest in self._hashes.items():
            if sha256_file(self.folder / name) != digest:
                raise VerifyError(f"{self.folder / name}: reads back differently from what was written; check the disk")
        with reported(self.output):
            sync(self.folder)
            self.folder.chmod(0o777 & ~_umask())  # mkdtemp's folder is private
            require_free(self.output)
            if self.output.exists():
                self.output.rmdir()
            try:
                self.folder.rename(self.output)
            except OSError as err:
                if err.errno != errno.EXDEV or self._kept is None:
                    raise
                self._move_between_disks()
            sync(self.output.parent)

    def _move_between_disks(self) -> None:
        copy = self._temporary()
        try:
            for name, digest in self._hashes.items():
                shutil.copy(self.folder / name, copy / name)
                sync(copy / name)
                if sha256_file(copy / name) != digest:
                    raise VerifyError(f"{copy / name}: reads back differently from what was written; check the disk")
            copy.chmod(0o777 & ~_umask())
            sync(copy)
            copy.rename(self.output)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _temporary(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=f".{self.output.name}.partial-", dir=self.output.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(tensors):
            raise VerifyError(f"{path}: holds other tensors than were written; check the disk")
        for name, tensor in tensors.items():
            back = file.get_tensor(name)
            same = back.dtype == tensor.dtype and back.shape == tensor.shape
            if not same or not torch.equal(back.view(torch.uint8), tensor.view(torch.uint8)):
                raise VerifyError(f"{path}: {name} reads back differently from what was written; check the disk")
