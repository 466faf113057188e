"""Rows of local files: .txt, .json, .jsonl and .parquet, the first three also packed by gzip."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.calibration.chats import are_messages
from quantize.calibration.layouts import HEAD, Layout, recognize
from quantize.errors import DataError

_PACKED = ".gz"
_PLAIN = (".txt", ".json", ".jsonl")
SUFFIXES = (*_PLAIN, ".parquet", *(f"{suffix}{_PACKED}" for suffix in _PLAIN))
FORMATS = "a .txt, .json, .jsonl (also .gz) or .parquet file"


@dataclass(frozen=True)
class Table:
    """Rows of a file or set, and where they stand in it."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    """Of each row, counted from 1: its line in a .jsonl file."""
    unit: str
    """What is counted: line or row."""
    layout: Layout | None
    """None where none was recognized."""
    names: tuple[str, ...]
    """Of all columns."""


def kind_of(name: str) -> str | None:
    """The ending that says what a file is, without .gz; None for one that is not known."""
    lower = name.lower()
    found = [suffix for suffix in SUFFIXES if lower.endswith(suffix)]
    return max(found, key=len).removesuffix(_PACKED) if found else None


def read_bytes(path: Path) -> bytes:
    """What the file holds, unpacked; DataError when it cannot be read, is empty or of no known kind."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; give {FORMATS}")
    if kind_of(path.name) is None:
        suffix = path.suffix.lower() or "(no ending)"
        raise DataError(f"{path}: unknown kind of text file {suffix!r}; give {FORMATS}")
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(_PACKED):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {first_line(error)}; fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not data:
        raise DataError(f"{path} is empty; give a file with text")
    return data


def sha256_of(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def utf8(path: Path, data: bytes) -> str:
    """Decode without changing line ends; a byte order mark is no part of the text."""
    if b"\0" in data:
        raise DataError(f"{path} holds NUL bytes and looks binary; give {FORMATS} of UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8",
        ) from error
    if not text.strip():
        raise DataError(f"{path} holds only white space; give a file with text")
    return text


def read_table(path: Path, data: bytes, layout: Layout | None) -> Table:
    """The rows of a file that is no .txt. layout: the one asked for, else it is recognized.
    Raises DataError."""
    kind = kind_of(path.name)
    if kind == ".parquet":
        return _parquet(path, data, layout)
    text = utf8(path, data)
    whole = None if kind == ".jsonl" else _whole(path, text)
    if whole is None:
        rows, numbers, unit = *_lines(path, text), "line"
    else:
        rows, unit = [_row(row, f"{path} row {n}") for n, row in enumerate(whole, 1)], "row"
        numbers = list(range(1, len(rows) + 1))
    return Table(rows, numbers, unit, layout or recognize(rows[:HEAD]), names_of(rows))


def _whole(path: Path, text: str) -> list[Any] | None:
    """The rows of a .json file: an array, or an object around one; None where each line is a row."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Many a .json file holds one object a line.
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return None
        raise DataError(
            f"{path}: not JSON ({error}); give an array of rows, or one JSON object a line"
        ) from error
    if isinstance(value, dict):
        arrays = [part for part in value.values() if isinstance(part, list) and part]
        tables = [part for part in arrays if isinstance(part[0], dict) and not are_messages(part)]
        return tables[0] if len(tables) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: {type(value).__name__} instead of an array of rows")
    return [value] if are_messages(value) else value


def _lines(path: Path, text: str) -> tuple[list[dict[str, Any]], list[int]]:
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not JSON ({error}); each line holds one JSON object",
            ) from error
        if isinstance(row, str):
            raise DataError(f"{where}: str instead of a JSON object; give {{'text': ...}}")
        rows.append(_row(row, where))
        numbers.append(number)
    return rows, numbers


def _row(value: Any, where: str) -> dict[str, Any]:
    """A row as a mapping; a bare text or a bare conversation gets the usual column's name."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if are_messages(value):
        return {"messages": value}
    raise DataError(f"{where}: {type(value).__name__} instead of a JSON object with named fields")


def _parquet(path: Path, data: bytes, layout: Layout | None) -> Table:
    # importlib, since pyarrow's types are not checked; lazily, since it is slow to import.
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(pyarrow.BufferReader(data)) as file:
            if layout is None:
                head = next(iter(file.iter_batches(batch_size=HEAD)), None)
                rows = [] if head is None else [*map(without_null, head.to_pylist())]
                layout = recognize(rows, file.schema_arrow.names)
            names = file.schema_arrow.names
            wanted = [name for name in names if layout and name in layout.columns]
            rows = file.read(columns=wanted).to_pylist() if layout else []
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from error
    rows = [without_null(row) for row in rows]
    return Table(rows, list(range(1, len(rows) + 1)), "row", layout, tuple(names))


def names_of(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Columns of the first rows, in order."""
    return tuple(dict.fromkeys(name for row in rows[:HEAD] for name in row))


def without_null(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table of fixed columns without what its structs were filled up with: a struct has
    every key that any has, null where this one had none."""
    return {name: _without_null(value) for name, value in row.items()}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(part) for name, part in value.items() if part is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_without_null(part) for part in value]
    return value


def first_line(error: Exception) -> str:
    """Return the first line of what the error says, or the name of its class."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")[:300]
