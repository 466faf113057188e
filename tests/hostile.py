"""Models that somebody broke, and a run of `pq` that must say so in one line and leave nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[..., tuple[int, str, str]]


def header(entries: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, or with these bytes as one."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_header(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the header's text; the data stays."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(header(change(raw[8:end]), raw[end:]))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns)
        for path, stat in found.items()
    }


def refused(pq: Call, code: int, says: str, model: Path, output: Path, *more: object) -> None:
    """`pq convert` ends with the code and one line that holds the words; nothing is new, the model is as it was.

    The output must lie in a folder of its own.
    """
    before = files_below(model)
    found, out, err = pq("convert", "--model", model, "--output", output, "--device", "cpu", *more)
    assert (found, out) == (code, ""), err
    assert says in err
    assert err.startswith("pq: error: ")
    assert err.count("\n") == 1, err
    assert files_below(model) == before
    assert not output.parent.exists() or not list(output.parent.iterdir())
