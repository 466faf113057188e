"""Where pq keeps results between commands, how large that may grow, and how it is emptied.

Entries are files of one folder. They are only ever what a command could compute anew, so that
removing them at any time costs nothing but time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import OutputError
from quantize.files.disk import report_errors

FOLDER = "PQ_CACHE"
"""Environment variable that names the folder."""
LIMIT_BYTES = 16 << 30
"""Of all entries of one cache: the hidden states of 64 windows of 2048 tokens of some thirty models
with 4096 channels in float32, on a disk that holds models anyway."""


@dataclass(frozen=True)
class CacheSize:
    """How much there is."""

    folder: str
    entries: int
    bytes: int


def cache_folder(name: str) -> Path:
    """Folder of one cache: NAME in $PQ_CACHE, else in pq/ of $XDG_CACHE_HOME, else of ~/.cache."""
    if told := os.environ.get(FOLDER):
        return Path(told).expanduser() / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pq" / name


def size_of(folder: Path) -> CacheSize:
    """Count the entries of a cache; a folder that is not there has none."""
    sizes = [size for _, size, _ in _entries(folder)]
    return CacheSize(str(folder), len(sizes), sum(sizes))


def clear(folder: Path) -> CacheSize:
    """Remove all entries; returns what there was. OutputError where one cannot be removed."""
    before = size_of(folder)
    for path, _, _ in _entries(folder):
        with report_errors(path):
            path.unlink(missing_ok=True)
    return before


def shrink(folder: Path, limit: int = LIMIT_BYTES) -> int:
    """Remove the entries that were not used for longest until all take at most `limit` bytes;
    returns how many went. One that another process removes meanwhile is gone as well."""
    entries = sorted(_entries(folder), key=lambda entry: entry[2])
    total = sum(size for _, size, _ in entries)
    gone = 0
    for path, size, _ in entries:
        if total <= limit:
            break
        with report_errors(path):
            path.unlink(missing_ok=True)
        total -= size
        gone += 1
    return gone


def touch(path: Path) -> None:
    """Note that an entry was used now; a disk that may not be written keeps its old time."""
    try:
        os.utime(path)
    except OSError:
        return


def _entries(folder: Path) -> list[tuple[Path, int, float]]:
    """(path, bytes, time of the last use) of every entry, those half-written by a dead process
    included."""
    found = []
    try:
        names = list(os.scandir(folder)) if folder.is_dir() else []
    except OSError as err:
        raise OutputError(f"{folder}: cannot be read ({err.strerror}); see {FOLDER}") from None
    for entry in names:
        try:
            if entry.is_file(follow_symlinks=False) and entry.name.endswith(_ENDINGS):
                facts = entry.stat(follow_symlinks=False)
                found.append((Path(entry.path), facts.st_size, facts.st_mtime))
        except OSError:
            continue  # removed since
    return found


_ENDINGS = (".safetensors", ".part")
"""Of what pq itself writes there; whatever else lies in the folder is not pq's to remove."""
