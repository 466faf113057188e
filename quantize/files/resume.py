"""What a conversion keeps on the disk from block to block, so that a stopped or
killed one goes on where it was.

A folder holds the finished shards, files of tensors and one JSON file that names all of them with
their hashes. The JSON file is replaced last, in one step, so that whatever the moment of a kill, it
speaks of files that are whole.

No random state is among it: every draw in a conversion comes from a generator
that is seeded where it is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantize.errors import UsageError
from quantize.files.disk import report_errors, sync
from quantize.files.hashing import sha256_file
from quantize.files.lock import lock_folder
from quantize.files.provenance import DIGEST, PROVENANCE, canonical_json, provenance_digest
from quantize.files.tensor_files import TensorFiles, portions

log = logging.getLogger(__name__)

Resume = Literal["auto", "required", "never"]
"""`auto`: go on where the state fits, else start anew; `required`: refuse to start anew; `never`:
start anew, keep no state and remove that of an earlier run."""

_LOCK = "lock"
_STATE = "state.json"
_PARTIAL = "partial"
_TENSORS = "state-*.safetensors"


@dataclass(frozen=True)
class Kept:
    """The state after a number of blocks."""

    blocks: int
    facts: dict[str, Any]
    tensors: Mapping[str, Tensor]
    """Read when they are asked for."""
    written: dict[str, Any]
    """What the writer knew of its files."""


class _DamagedError(Exception):
    """The state cannot be read, or files are not those that it speaks of."""


class StateFolder:
    """The state of one conversion. As a context manager it keeps other processes out.

    Without a folder or a mode it does nothing, and leaves alone what others keep.
    Raises OutputError where another process is at work in the folder, UsageError where
    state is required and there is none.
    """

    def __init__(self, folder: Path | None, mode: Resume | None) -> None:
        if mode == "required" and (folder is None or not (folder / _STATE).exists()):
            where = (
                f"no state is kept in {folder}"
                if folder
                else "without a work folder no state is kept"
            )
            raise UsageError(f"--resume required: {where}; --resume auto starts anew")
        self.folder = folder if mode else None
        self.mode = mode
        self._handle: int | None = None

    @property
    def keeps(self) -> bool:
        """Whether `commit` does anything."""
        return self.folder is not None and self.mode != "never"

    @property
    def partial(self) -> Path | None:
        """Where the finished files of the output are collected; None where no state is kept."""
        return self.folder / _PARTIAL if self.folder and self.keeps else None

    def __enter__(self) -> StateFolder:
        if self.folder is not None:
            with report_errors(self.folder):
                try:
                    self._handle = lock_folder(self.folder, _LOCK)
                except OSError:
                    _remove_if_empty(self.folder)
                    raise
            if self.mode == "never":
                self.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.folder is None or self._handle is None:
            return
        if not (self.folder / _STATE).exists():
            self.clear()
        (self.folder / _LOCK).unlink(missing_ok=True)
        os.close(self._handle)
        _remove_if_empty(self.folder)

    def take_up(self, fingerprint: Mapping[str, Any]) -> Kept | None:
        """The state of an earlier run that `fingerprint` (JSON data) fits; None
        where the conversion starts anew.

        UsageError names what does not fit where state is required.
        """
        if self.folder is None or not (self.folder / _STATE).exists():
            self.clear()
            return None
        try:
            record = _record(self.folder)
            problem = difference(record["fingerprint"], json.loads(json.dumps(fingerprint)))
            if problem is None:
                kept = _read_state(self.folder, record)
                log.info("goes on after block %d, from what %s keeps", kept.blocks, self.folder)
                return kept
        except _DamagedError as err:
            problem = f"the state is damaged: {err}"
        if self.mode == "required":
            raise UsageError(f"--resume required: {self.folder}: {problem}")
        log.warning("%s: %s; starts anew", self.folder, problem)
        self.clear()
        return None

    def commit(
        self,
        fingerprint: Mapping[str, Any],
        blocks: int,
        facts: Mapping[str, Any],
        tensors: Iterable[tuple[str, Tensor]],
        written: Mapping[str, Any],
    ) -> None:
        """Replace the state by that after `blocks` blocks, in one step;
        OutputError where the disk refuses.

        tensors: taken and written a few at a time.
        """
        if not self.keeps or self.folder is None:
            return
        files = {}
        for number, some in enumerate(portions(tensors)):
            path = self.folder / _TENSORS.replace("*", f"{blocks:05d}-{number:05d}")
            with report_errors(path):
                save_file(some, path)
                sync(path)
                files[path.name] = sha256_file(path)
        if (self.folder / _PARTIAL).exists():
            with report_errors(self.folder / _PARTIAL):
                sync(self.folder / _PARTIAL)
        record = {
            "fingerprint": fingerprint,
            "blocks": blocks,
            "facts": facts,
            "written": written,
            "tensors": files,
        }
        with report_errors(self.folder / _STATE):
            part = self.folder / f"{_STATE}.part"
            part.write_text(
                canonical_json(record | {DIGEST: provenance_digest(record)}), encoding="utf-8"
            )
            sync(part)
            part.replace(self.folder / _STATE)
            sync(self.folder)
        for old in self.folder.glob(_TENSORS):
            if old.name not in files:
                old.unlink()

    def clear(self) -> None:
        """Remove the state; what else lies in the folder stays."""
        if self.folder is None:
            return
        shutil.rmtree(self.folder / _PARTIAL, ignore_errors=True)
        # The JSON file last: `forget_finished` looks for it.
        for path in (
            *self.folder.glob(_TENSORS),
            self.folder / f"{_STATE}.part",
            self.folder / _STATE,
        ):
            path.unlink(missing_ok=True)


def in_use(folder: Path) -> bool:
    """Whether a run is at work in the folder, or one was stopped and may go on."""
    return (folder / _LOCK).exists() or (folder / _STATE).exists()


def count_kept_blocks(folder: Path) -> int | None:
    """Blocks that the state in the folder is after; None where there is none to be read."""
    try:
        return int(_record(folder)["blocks"])
    except (_DamagedError, OSError):
        return None


def forget_finished(folder: Path, output: Path, own: bool) -> None:
    """Remove what a run left that was killed after its output had appeared: its state
    speaks of shards that have moved.

    own: whether the folder belongs to this output alone, and goes as a whole. OutputError where
    another process is at work in it.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return
    if in_use(folder) and not (folder / _PARTIAL).exists() and count_kept_blocks(folder) != 0:
        with StateFolder(folder, "never"):
            log.info("%s: cleared, %s is complete", folder, output)
    if own and not in_use(folder) and (output / PROVENANCE).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder unless something is in it."""
    try:
        folder.rmdir()
    except OSError:
        return


def difference(kept: Any, now: Any, path: str = "") -> str | None:
    """What differs first between two pieces of JSON data, by name and with both
    values; None where nothing does."""
    if isinstance(kept, dict) and isinstance(now, dict):
        names = dict.fromkeys([*now, *kept])
        pairs = [
            (f"{path}.{name}" if path else name, kept.get(name), now.get(name)) for name in names
        ]
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(kept, now, strict=True))]
    else:
        return None if kept == now else f"{path} is {_show(now)}, the state is of {_show(kept)}"
    return next((found for name, one, two in pairs if (found := difference(one, two, name))), None)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise _DamagedError(f"{_STATE} cannot be read ({err})") from None
    if not isinstance(record, dict) or record.get(DIGEST) != provenance_digest(record):
        raise _DamagedError(f"{_STATE} is not what was written")
    return record


def _read_state(folder: Path, record: Mapping[str, Any]) -> Kept:
    """The state, after all files were compared with their hashes."""
    files = {folder / name: digest for name, digest in record["tensors"].items()}
    files |= {
        folder / _PARTIAL / name: digest
        for name, digest in record["written"].get("hashes", {}).items()
    }
    try:
        for path, digest in files.items():
            if sha256_file(path) != digest:
                raise _DamagedError(f"{path.name} is not what was written")
        tensors = TensorFiles(folder / name for name in record["tensors"])
    except (OSError, SafetensorError) as err:
        raise _DamagedError(str(err)) from None
    return Kept(record["blocks"], record["facts"], tensors, record["written"])
