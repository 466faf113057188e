"""An output folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from quantize.errors import OutputError, UsageError, VerifyError
from quantize.files.disk import report_errors, sync
from quantize.files.hashing import sha256_file
from quantize.files.provenance import PROVENANCE, canonical_json

_LONGEST = 224
"""Bytes of an output's name: file systems take 255, the files beside it have longer ones."""


def require_name(output: Path) -> None:
    """OutputError unless `output` ends in a name that it and the files beside it
    can have, and is no link."""
    if output.name in ("", ".."):
        raise OutputError(
            f"--output {str(output)!r}: has no name of its own; give the path of a new folder"
        )
    try:
        long = len(output.name.encode()) > _LONGEST
    except UnicodeEncodeError:
        raise OutputError(
            f"--output {str(output)!r}: its name is no UTF-8; give another one"
        ) from None
    if long:
        raise OutputError(
            f"--output {output.name[:40]}…: its name is too long; give one of at most {_LONGEST} "
            "bytes"
        )
    with report_errors(output):
        if output.is_symlink():
            raise OutputError(f"{output}: is a link; give the folder itself as --output")


def require_free(output: Path, overwrite: bool = False) -> None:
    """OutputError unless `output` is absent or an empty folder whose parent can be written to.

    overwrite: whether it may also be what pq wrote.
    """
    require_name(output)
    with report_errors(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            ours = (output / PROVENANCE).is_file()
            if overwrite and not ours:
                raise OutputError(
                    f"{output}: exists and has no {PROVENANCE}, so that --overwrite leaves it alone; give "
                    "another --output or remove it"
                )
            if not overwrite:
                also = "; --overwrite replaces what pq wrote" if ours else ""
                raise OutputError(
                    f"{output}: exists and is not an empty folder; give another --output or remove "
                    f"it{also}"
                )
        parent = output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{output}: {parent} cannot be written to; give another --output")


def require_apart(model: Path, output: Path, work: Path | None) -> None:
    """UsageError where a conversion would write into the model that it reads, or
    keep its state in its output."""
    source, target = model.resolve(), output.resolve()
    for option, path in (("--output", output), ("--work", work)):
        if path is not None and path.resolve().is_relative_to(source):
            raise UsageError(
                f"{option} {path}: lies in the model's folder {model}; give a place outside of it"
            )
    if work is not None and work.resolve().is_relative_to(target):
        raise UsageError(f"--work {work}: lies in --output {output}; give a place outside of it")


class Transaction:
    """Collects files in a temporary folder beside `output`; `commit` checks them and renames it.

    Use as a context manager: leaving it without `commit`, by error or interrupt, removes
    everything it wrote. With `overwrite`, an output of pq's
    is replaced at the end. With `kept`, files are collected there instead and stay; another
    transaction goes on from the `hashes` of this one. Raises OutputError for what the file system
    refuses.
    """

    def __init__(
        self,
        output: Path,
        kept: Path | None = None,
        hashes: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        require_free(output, overwrite)
        self._overwrite = overwrite
        self.output = output.absolute()
        self._kept = kept
        self._hashes: dict[str, str] = dict(hashes or {})
        self.folder = Path()

    def __enter__(self) -> Self:
        with report_errors(self._kept or self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if self._kept is None:
                self.folder = self._temporary()
            else:
                self.folder = self._kept
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.rglob("*"):
                    name = path.relative_to(self.folder).as_posix()
                    # half written when an earlier run was killed
                    if name not in self._hashes and not path.is_dir():
                        path.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.folder != self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 of every file written so far, by name."""
        return dict(sorted(self._hashes.items()))

    def write(
        self,
        name: str,
        save: Callable[[Path], object],
        check: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Let `save` write the file `name`; `check` reads it once it would survive a power cut."""
        path = self.folder / name
        with report_errors(path):
            if path.parent != self.folder:
                path.parent.mkdir(exist_ok=True)
            save(path)
            # safetensors creates files that only their owner can read.
            path.chmod(0o666 & ~_umask())
            sync(path)
            check(path)
            self._hashes[name] = sha256_file(path)

    def discard(self, name: str) -> None:
        """Remove a file that was needed on the way alone."""
        path = self.folder / name
        with report_errors(path):
            path.unlink()
            del self._hashes[name]

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copy a side file byte for byte. name: what it is called here, a folder within it; None:
        as it is."""
        self.write(name or source.name, lambda path: shutil.copyfile(source, path))

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file with stable formatting."""
        self.write(name, lambda path: path.write_text(canonical_json(data), encoding="utf-8"))

    def commit(self) -> None:
        """Check that every file still is what was written, then let the folder
        appear under its final name."""
        for name, digest in self._hashes.items():
            if sha256_file(self.folder / name) != digest:
                raise VerifyError(
                    f"{self.folder / name}: reads back differently from what was written; check "
                    "the disk"
                )
        with report_errors(self.output):
            for folder in self._folders():
                sync(self.folder / folder)
            sync(self.folder)
            self.folder.chmod(0o777 & ~_umask())  # mkdtemp's folder is private
            require_free(self.output, self._overwrite)
            with self._old_set_aside():
                try:
                    self.folder.rename(self.output)
                except OSError as err:
                    if err.errno != errno.EXDEV or self._kept is None:
                        raise
                    self._move_between_disks()
                sync(self.output.parent)

    @contextmanager
    def _old_set_aside(self) -> Iterator[None]:
        """Room for the output: what stood there is back where it was on any error, else gone."""
        if not self.output.exists():
            yield
            return
        old = self._temporary("old")
        self.output.rename(old)
        try:
            yield
        finally:
            if self.output.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(self.output)

    def _move_between_disks(self) -> None:
        copy = self._temporary()
        try:
            for folder in self._folders():
                (copy / folder).mkdir()
            for name, digest in self._hashes.items():
                shutil.copy(self.folder / name, copy / name)
                sync(copy / name)
                if sha256_file(copy / name) != digest:
                    raise VerifyError(
                        f"{copy / name}: reads back differently from what was written; check the "
                        "disk"
                    )
            copy.chmod(0o777 & ~_umask())
            for folder in self._folders():
                sync(copy / folder)
            sync(copy)
            copy.rename(self.output)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[str]:
        """Names of the folders within that hold files."""
        return sorted({name.rpartition("/")[0] for name in self._hashes} - {""})

    def _temporary(self, what: str = "partial") -> Path:
        return Path(tempfile.mkdtemp(prefix=f".{self.output.name}.{what}-", dir=self.output.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
