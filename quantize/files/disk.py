"""Small steps on a disk, and what a file system refuses, said in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from quantize.errors import OutputError


@contextmanager
def report_errors(path: Path) -> Iterator[None]:
    """Turn what a file system can refuse into one line about `path`."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: no space left on the disk; free some or give another --output"
            ) from None
        raise OutputError(f"{path}: cannot be written ({err.strerror or err})") from None
    except SafetensorError as err:
        full = "No space left" in str(err)
        reason = (
            "no space left on the disk; free some or give another --output"
            if full
            else f"not written ({err})"
        )
        raise OutputError(f"{path}: {reason}") from None


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all; folders are made.
    OutputError when it cannot be."""
    with report_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk of a place that may not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def sync(path: Path) -> None:
    """Return when what was written to a file, or the names in a folder,
    would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
