"""What a report is made of. Everything is plain data: `as_json` of a Report is DIR.report.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from quantize.pictures import Heatmap, Picture

_UNSAFE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Headline:
    """One number at the top: `value` is ready to be read, `number` is what it was made from."""

    label: str
    value: str
    detail: str
    number: float | None


@dataclass(frozen=True)
class Group:
    """Small pictures of one kind, drawn to the same vertical scale."""

    title: str
    caption: str
    pictures: Sequence[Picture]
    folded: bool = False
    """Shown on demand."""
    kind: Literal["group"] = field(default="group", init=False)


@dataclass(frozen=True)
class Token:
    """One predicted token in its context, and what both models made of
    it. Probabilities in 0 … 1."""

    window: int | None
    position: int | None
    before: str
    token: str
    after: str
    kld: float | None
    probability: float | None
    parent_probability: float | None
    choice: str
    parent_choice: str


@dataclass(frozen=True)
class Passages:
    """Tokens in their contexts."""

    title: str
    caption: str
    tokens: Sequence[Token]
    folded: bool = False
    """Shown on demand."""
    kind: Literal["passages"] = field(default="passages", init=False)


@dataclass(frozen=True)
class Listing:
    """Text that is shown as it is, such as a recipe."""

    title: str
    caption: str
    text: str
    kind: Literal["listing"] = field(default="listing", init=False)


@dataclass(frozen=True)
class Note:
    """A sentence; where something is missing, with the command that would add it."""

    text: str
    command: str = ""
    kind: Literal["note"] = field(default="note", init=False)


Item = Picture | Group | Passages | Listing | Note


@dataclass(frozen=True)
class Section:
    """A part of the page; `lead` says what its figures are and where they come from."""

    id: str
    title: str
    lead: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Report:
    """One conversion and what was measured of it."""

    name: str
    """Folder name of the checkpoint."""
    subtitle: str
    pq: str
    """Version that converted."""
    headlines: Sequence[Headline]
    basis: str
    """Protocol, data, tokens and numerics of the headline figures."""
    warnings: Sequence[str]
    sections: Sequence[Section]
    kind: str = "Quantization report"
    """What stands above the name."""


def plainly(item: Item) -> Item:
    """The same, a heat map that has one value everywhere as a sentence: its colours tell nothing."""
    if not isinstance(item, Heatmap):
        return item
    values = {value for row in item.values for value in row}
    value = next(iter(values), None)
    cells = sum(map(len, item.values))
    if len(values) != 1 or value is None or cells < 2 or not math.isfinite(value):
        return item
    unit = "" if item.unit.lower() == item.title.lower() else item.unit
    shown = f"{value:.4g} {unit}".strip()
    across = item.columns_label or "column"
    where = f"all {len(item.rows)} rows of {len(item.columns)} {across}s"
    return Note(f"{item.title}: {shown} in {where}. {item.caption}".strip())


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON data; numbers that are not finite become None, as JSON has none."""
    plain = _finite(asdict(report))
    assert isinstance(plain, dict)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def clean(words: str) -> str:
    """Replace characters that XML and HTML have no place for, such as NUL and lone surrogates."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", words)


def number(data: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a file's JSON; None when it is absent or anything else."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def text(data: Mapping[str, Any], key: str, default: str = "") -> str:
    """Return a file's JSON value as text; numbers are written out,
    anything else gives the default."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return default
    return str(value)


def mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a file's JSON object; an empty one when it is absent or anything else."""
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def items(data: Mapping[str, Any], key: str) -> list[Any]:
    """Return a file's JSON list; an empty one when it is absent or anything else."""
    value = data.get(key)
    return value if isinstance(value, list) else []
