"""Where calibration and evaluation text comes from: the built-in set, local files,
named Hub sets, any Hub name."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from quantize.calibration import local_files
from quantize.calibration.chats import Chat
from quantize.calibration.hub_commit import commit_of
from quantize.calibration.layouts import HEAD, Column, Layout, Row, recognize
from quantize.calibration.local_files import (
    FORMATS,
    SUFFIXES,
    Table,
    first_line,
    names_of,
    without_null,
)
from quantize.calibration.notes import Notes
from quantize.calibration.usable import Rows, usable_rows
from quantize.errors import DataError
from quantize.files import strict_yaml
from quantize.files.resources import data_dir

Purpose = Literal["calibration", "evaluation"]
Packing = Literal["stream", "packed"]

BUILTIN = "builtin"
# A missing file with one of these endings is reported as a missing file and not sought on the Hub.
_FILE_LIKE = (*SUFFIXES, ".csv", ".md", ".text", ".gz", ".zst", ".zip")
_HUB_NAME = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:]+))?"
    r"(:(?P<config>[^:/]*))?(:(?P<split>[^:/]+))?"
)


@dataclass(frozen=True)
class Text:
    """Rows of one data set and what they are."""

    rows: list[Row]
    packing: Packing
    """`stream`: the rows, joined by `joiner`, are one text in order. `packed`:
    they are separate documents."""
    source: str
    """For people: which text this is."""
    origin: dict[str, object]
    """For provenance: data set, split, licence, text_sha256 (of the file's bytes, else
    of the rows joined by NUL)."""
    joiner: str = "\n\n"
    numbers: list[int] = dataclasses.field(default_factory=list)
    """Of each row where it was read, counted from 1; empty for text that has no rows."""
    unit: str = "row"
    """What `numbers` counts."""
    notes: Notes = ()

    @property
    def has_chats(self) -> bool:
        """Whether any row is a conversation."""
        return any(isinstance(row, Chat) for row in self.rows)


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
    text_field: str | None = "text"
    """None: recognized."""
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
    is_file = dataset.lower().endswith(SUFFIXES)
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
    text_field: the column of a file of rows or of a Hub set; None: what calib_data/ says, else the
    columns that are recognized.
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
        return _from_file(Path(path), text_field)
    if dataset.lower().endswith(_FILE_LIKE) or dataset.startswith(("/", ".", "~")):
        raise DataError(f"{dataset}: no such file; give {FORMATS}")
    match = _HUB_NAME.fullmatch(dataset)
    if match is None:
        raise _unknown_set(dataset, [BUILTIN, *sets])
    wanted = HubSet(
        name=dataset,
        hub_id=match["id"],
        revision=match["revision"],
        config=match["config"] or None,
        text_field=None,
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
        f"unknown data set {dataset!r}; {hint}Known names: {', '.join(names)}; also {FORMATS}, "
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


def _from_file(path: Path, field: str | None) -> Text:
    data = local_files.read_bytes(path)
    origin: dict[str, object] = {
        "dataset": name_of(str(path)),
        "split": None,
        "licence": None,
        "text_sha256": local_files.sha256_of(data),
    }
    if local_files.kind_of(path.name) == ".txt":
        return Text([local_files.utf8(path, data)], "stream", path.name, origin)
    table = local_files.read_table(path, data, Column(field) if field else None)
    if not table.rows and not table.names:
        raise DataError(f"{path} has no rows; give a file with text")
    rows = usable_rows(table, str(path), path.name, field)
    return _text(rows, "packed", path.name, origin)


def _text(rows: Rows, packing: Packing, source: str, origin: dict[str, object]) -> Text:
    more = {"text_field": rows.name, "rows": len(rows.rows), "rows_left_out": rows.left_out}
    if not rows.left_out:
        del more["rows_left_out"]
    return Text(
        rows.rows,
        packing,
        source,
        origin | more,
        numbers=rows.numbers,
        unit=rows.unit,
        notes=rows.notes,
    )


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
    found = _hub_rows(wanted, commit, split, Column(field) if field else None, min_characters)
    if not found:
        raise DataError(f"{wanted.name} split {split} has no rows; use another split or set")
    layout = Column(field) if field else recognize(found[:HEAD])
    table = Table(found, list(range(1, len(found) + 1)), "row", layout, names_of(found))
    rows = usable_rows(table, f"{wanted.hub_id} split {split}", wanted.name, field)
    origin: dict[str, object] = {
        "dataset": wanted.name,
        "hub_id": wanted.hub_id,
        "commit": commit,
        "config": wanted.config,
        "data_file": (wanted.data_files or {}).get(split),
        "split": split,
        "licence": wanted.licence,
        "url": wanted.url or f"https://huggingface.co/datasets/{wanted.hub_id}",
        "text_sha256": _rows_sha256(rows.rows),
    }
    at = f"@{commit[:7]}" if commit else ""
    source = f"{wanted.hub_id}{at}{f' {wanted.config}' if wanted.config else ''}, {split} split"
    if wanted.join is None or any(isinstance(row, Chat) for row in rows.rows):
        return _text(rows, "packed", source, origin)
    return dataclasses.replace(_text(rows, "stream", source, origin), joiner=wanted.join)


def _hub_rows(
    wanted: HubSet,
    commit: str | None,
    split: str,
    layout: Layout | None,
    min_characters: int | None,
) -> list[dict[str, Any]]:
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
            rows.append(without_null(row))
            layout = layout or recognize(rows[-1:])
            names = layout.columns if layout else ()
            characters += sum(len(str(row[name])) for name in names if row.get(name) is not None)
            if wanted.streaming and min_characters is not None and characters >= min_characters:
                break
    # The Hub client raises classes of several HTTP libraries, at the first request
    # or in the midst of a stream.
    except Exception as error:
        raise DataError(
            f"{wanted.name} cannot be loaded from the Hugging Face Hub: {first_line(error)}. "
            f"Check the network, the name, its config and split {split!r}, "
            f"or give a local file ({', '.join(SUFFIXES)})"
        ) from error
    return rows


def _rows_sha256(rows: list[Row]) -> str:
    sha = hashlib.sha256()
    for position, row in enumerate(rows):
        sha.update((b"\0" if position else b"") + _as_text(row).encode())
    return sha.hexdigest()


def _as_text(row: Row) -> str:
    if isinstance(row, str):
        return row
    told = row.messages if row.tools is None else [row.messages, row.tools]
    return json.dumps(told, ensure_ascii=False, sort_keys=True, default=str)
