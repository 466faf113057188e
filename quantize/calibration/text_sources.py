"""Where calibration and evaluation text comes from: the built-in set, local files,
named Hub sets, any Hub name."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from quantize.calibration.hub_commit import commit_of
from quantize.errors import DataError
from quantize.files import strict_yaml
from quantize.files.resources import data_dir

Purpose = Literal["calibration", "evaluation"]
Row = str | list[dict[str, str]]
"""Plain text, or the messages of one chat as {"role": ..., "content": ...}."""

BUILTIN = "builtin"
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_FORMATS = "a .txt, .jsonl or .parquet file"
# A missing file with one of these endings is reported as a missing file and not sought on the Hub.
_FILE_LIKE = (*_FILE_SUFFIXES, ".json", ".csv", ".md", ".text", ".gz", ".zst", ".zip")
_HUB_NAME = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:]+))?"
    r"(:(?P<config>[^:/]*))?(:(?P<split>[^:/]+))?"
)


@dataclass(frozen=True)
class Text:
    """Rows of one data set and what they are."""

    rows: list[Row]
    packing: Literal["stream", "packed"]
    """`stream`: the rows, joined by `joiner`, are one text in order. `packed`:
    they are separate documents."""
    source: str
    """For people: which text this is."""
    origin: dict[str, object]
    """For provenance: data set, split, licence, text_sha256 (of the file's bytes, else
    of the rows joined by NUL)."""
    joiner: str = "\n\n"


class HubSet(BaseModel):
    """One text set on the Hub, as calib_data/*.yaml describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    hub_id: str
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    config: str | None = None
    calibration_split: str | None = "train"
    evaluation_split: str | None = "test"
    text_field: str = "text"
    licence: str | None = None
    url: str | None = None
    data_files: dict[str, str] | None = None
    """Split to file: only this file of a large set is asked for."""
    join: str | None = None
    """Set when rows are consecutive pieces of one text: what stood between them."""
    streaming: bool = True


def named_sets() -> dict[str, HubSet]:
    """Return the sets of calib_data/*.yaml by name."""
    files = sorted(data_dir("calib_data").glob("*.yaml"))
    documents = [strict_yaml.load(file.read_bytes(), file.name) for file in files]
    sets = [HubSet.model_validate(document.data) for document in documents]
    return {entry.name: entry for entry in sets}


def name_of(dataset: str) -> str:
    """What a data set is called in what pq writes: a file by its name, wherever it lies."""
    is_file = dataset.lower().endswith(_FILE_SUFFIXES)
    return os.path.basename(dataset) if is_file else dataset


def load(
    dataset: str,
    purpose: Purpose,
    text_field: str | None,
    min_characters: int | None,
) -> Text:
    """Return the text that `dataset` names.

    dataset: "builtin", a name of calib_data/, a local file, or
    org/name[@revision][:config[:split]] on the Hub.
    text_field: the column of a .jsonl, .parquet or Hub set; `text` when
    None, or what calib_data/ says.
    min_characters: a large Hub set is read, in order, until it has given so many characters; None
    asks for all of a set, which only sets that are not streamed can give.
    Raises DataError when the name is unknown, the file unreadable or the Hub out of reach.
    """
    if dataset == BUILTIN:
        return _builtin(purpose)
    sets = named_sets()
    if dataset in sets:
        return _from_hub(sets[dataset], purpose, text_field, min_characters)
    # os.path, since pathlib raises on names that no file can have.
    path = os.path.expanduser(dataset)
    if os.path.exists(path):
        return _from_file(Path(path), text_field or "text")
    if dataset.lower().endswith(_FILE_LIKE) or dataset.startswith(("/", ".", "~")):
        raise DataError(f"{dataset}: no such file; give {_FORMATS}")
    match = _HUB_NAME.fullmatch(dataset)
    if match is None:
        raise _unknown_set(dataset, [BUILTIN, *sets])
    wanted = HubSet(
        name=dataset,
        hub_id=match["id"],
        revision=match["revision"],
        config=match["config"] or None,
    )
    if match["split"]:
        wanted = wanted.model_copy(
            update={"calibration_split": match["split"], "evaluation_split": match["split"]},
        )
    return _from_hub(wanted, purpose, text_field, min_characters)


def _unknown_set(dataset: str, names: list[str]) -> DataError:
    close = difflib.get_close_matches(dataset.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return DataError(
        f"unknown data set {dataset!r}; {hint}Known names: {', '.join(names)}; also {_FORMATS}, "
        "or org/name[@revision][:config[:split]] on the Hugging Face Hub"
    )


def _builtin(purpose: Purpose) -> Text:
    from quantize.calibration import pydocs

    split: Literal["train", "heldout"] = "train" if purpose == "calibration" else "heldout"
    text = pydocs.text(split)
    origin: dict[str, object] = {
        "dataset": BUILTIN,
        "split": split,
        "licence": "PSF-2.0",
        "python": platform.python_version(),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Text([text], "stream", f"built-in Python documentation, {split} part", origin)


# ---- local files ----


def _from_file(path: Path, field: str) -> Text:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path} is a folder; give {_FORMATS}")
    if suffix not in _FILE_SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of text file {suffix or '(no ending)'!r}; give {_FORMATS}",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not data:
        raise DataError(f"{path} is empty; give a file with text")
    origin: dict[str, object] = {
        "dataset": name_of(str(path)),
        "split": None,
        "licence": None,
        "text_sha256": hashlib.sha256(data).hexdigest(),
    }
    if suffix == ".txt":
        return Text([_utf8(path, data)], "stream", path.name, origin)
    rows = list(
        _jsonl_rows(path, data, field) if suffix == ".jsonl" else _parquet_rows(path, data, field),
    )
    if not rows:
        raise DataError(f"{path} has no rows; give a file with text")
    return Text(rows, "packed", path.name, origin | {"text_field": field, "rows": len(rows)})


def _utf8(path: Path, data: bytes) -> str:
    """Decode without changing line ends; a byte order mark is no part of the text."""
    if b"\0" in data:
        raise DataError(f"{path} holds NUL bytes and looks binary; give {_FORMATS} of UTF-8 text")
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


def _jsonl_rows(path: Path, data: bytes, field: str) -> Iterator[Row]:
    for number, line in enumerate(_utf8(path, data).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not JSON ({error}); each line holds one JSON object",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: {type(row).__name__} instead of a JSON object with the field {field!r}",
            )
        yield _check(_field(row, field, where), f"{where}, field {field!r}")


def _parquet_rows(path: Path, data: bytes, field: str) -> Iterator[Row]:
    # importlib, since pyarrow's types are not checked; lazily, since it is slow to import.
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(pyarrow.BufferReader(data)) as file:
            _field(dict.fromkeys(file.schema_arrow.names), field, str(path))
            values = file.read(columns=[field]).column(field).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a readable parquet file: {first_line(error)}") from error
    for number, value in enumerate(values, start=1):
        yield _check(value, f"{path} row {number}, field {field!r}")


def _field(row: dict[str, Any], field: str, where: str) -> object:
    if field not in row:
        names = ", ".join(row) or "none"
        raise DataError(f"{where} has no field {field!r}; choose a text field among: {names}")
    return row[field]


def _check(value: object, where: str) -> Row:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: half of a surrogate pair is no text; repair the row",
            ) from error
        return value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: {type(value).__name__} instead of text or a list of chat messages",
        )
    if not all(map(_is_message, value)):
        raise DataError(f"{where}: each chat message needs a role and a content, both strings")
    return value


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


# ---- Hugging Face Hub ----


def _from_hub(
    wanted: HubSet,
    purpose: Purpose,
    text_field: str | None,
    min_characters: int | None,
) -> Text:
    split = wanted.calibration_split if purpose == "calibration" else wanted.evaluation_split
    if split is None:
        raise DataError(
            f"{wanted.name} has no split for {purpose}; use another set, for example {BUILTIN!r}",
        )
    if wanted.streaming and min_characters is None:
        raise DataError(
            f"{wanted.name} may be too large to read whole; limit the number of windows",
        )
    field = text_field or wanted.text_field
    commit = commit_of(wanted.hub_id, wanted.revision)
    rows: list[Row] = []
    for number, row in enumerate(_hub_rows(wanted, commit, split, field, min_characters), start=1):
        where = f"{wanted.hub_id} split {split} row {number}"
        rows.append(_check(_field(row, field, where), f"{where}, field {field!r}"))
    if not rows:
        raise DataError(f"{wanted.name} split {split} has no rows; use another split or set")
    origin: dict[str, object] = {
        "dataset": wanted.name,
        "hub_id": wanted.hub_id,
        "commit": commit,
        "config": wanted.config,
        "data_file": (wanted.data_files or {}).get(split),
        "split": split,
        "licence": wanted.licence,
        "url": wanted.url or f"https://huggingface.co/datasets/{wanted.hub_id}",
        "text_field": field,
        "rows": len(rows),
        "text_sha256": _rows_sha256(rows),
    }
    at = f"@{commit[:7]}" if commit else ""
    source = f"{wanted.hub_id}{at}{f' {wanted.config}' if wanted.config else ''}, {split} split"
    if wanted.join is None:
        return Text(rows, "packed", source, origin)
    return Text(rows, "stream", source, origin, wanted.join)


def _hub_rows(
    wanted: HubSet,
    commit: str | None,
    split: str,
    field: str,
    min_characters: int | None,
) -> Iterable[dict[str, Any]]:
    """Return rows in order; of a streamed set only until they hold `min_characters`."""
    file = (wanted.data_files or {}).get(split)
    files = None if file is None else {split: file}
    rows: list[dict[str, Any]] = []
    characters = 0
    try:
        import datasets

        loaded = datasets.load_dataset(
            wanted.hub_id,
            wanted.config,
            split=split,
            data_files=files,
            revision=commit or wanted.revision,
            streaming=wanted.streaming,
        )
        for row in loaded:
            rows.append(row)
            characters += len(str(row.get(field, "")))
            if wanted.streaming and min_characters is not None and characters >= min_characters:
                break
    # The Hub client raises classes of several HTTP libraries, at the first request
    # or in the midst of a stream.
    except Exception as error:
        raise DataError(
            f"{wanted.name} cannot be loaded from the Hugging Face Hub: {first_line(error)}. "
            f"Check the network, the name, its config and split {split!r}, "
            f"or give a local file ({', '.join(_FILE_SUFFIXES)})"
        ) from error
    return rows


def _rows_sha256(rows: list[Row]) -> str:
    sha = hashlib.sha256()
    for position, row in enumerate(rows):
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, sort_keys=True)
        sha.update((b"\0" if position else b"") + text.encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of what the error says, or the name of its class."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")[:300]
