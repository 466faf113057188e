"""YAML for people: the YAML 1.2 core schema without the parts that surprise,
and the place of every value.

PyYAML follows YAML 1.1, where `1e-3` is text, `off` is false and `012` is ten; here scalars are
resolved by our own table. Aliases, anchors and tags are refused, so a small file cannot unfold into
a large one or name Python objects.

Built on events, not on a loader: loaders (ruamel.yaml's with line marks, too) stop at the first
doubled key, pass anchors and tags by, and have no bound on depth. Files are edited by the spans of
their scalars, not by a round trip, which would set spaces anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml import events as ev

from quantize.errors import RecipeError

MAX_BYTES = 1 << 20
"""Two thousand times the longest shipped recipe: what is larger was named by mistake."""
MAX_DEPTH = 20
"""Recipes and gate files need five; the parser's recursion is safe far beyond."""
MAX_PROBLEMS = 20
"""A broken file reports this many lines, then a count."""

Path = tuple[str | int, ...]
"""Keys and list indices from the root: `("stages", 0, "bits")`."""

_WORDS: dict[str, bool | None] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_DIGITS = 100  # of a number; Python itself reads no integer of more than 4300
_SYNTAX_HINTS = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "put a value that contains ': ' in quotes",
    "expected <block end>": "align this line with the keys or list items above it",
    "while scanning a quoted scalar": "close the quote",
    "while parsing a flow": "close the bracket",
}


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a file; `line` and `column` count from 1."""

    line: int
    column: int
    path: str
    text: str


@dataclass(frozen=True)
class Document:
    """Plain data of one file, where each value (for a mapping entry: its key) stands,
    and what is wrong with it."""

    source: str
    data: Any
    marks: dict[Path, tuple[int, int]]
    spans: dict[Path, tuple[int, int]]
    """First character of each scalar value in the decoded text (0 is the first after a byte order
    mark), and one past its last."""
    problems: list[Problem]
    spoiled: set[Path]
    """Paths whose value is refused, so that no further complaint about it helps."""

    def problem(self, path: Path, text: str) -> Problem:
        """Return a Problem at `path`, or at its innermost enclosing value that the file has."""
        known = path
        while known and known not in self.marks:
            known = known[:-1]
        line, column = self.marks.get(known, (1, 1))
        return Problem(line, column, show_path(path), text)


def load(raw: str | bytes, source: str) -> Document:
    """Parse one YAML document; `source` is the file name for messages.

    Duplicate and non-string keys, aliases, anchors, tags and numbers that are not finite
    are collected in `Document.problems` (their value reads None). Anything that stops
    the parser raises RecipeError.
    """
    return _Builder(_text(raw, source), source).document()


def resolve_plain(text: str) -> Any:
    """Return what an unquoted scalar means in the core schema: None, bool, int,
    float, else the text itself.

    Raises ValueError for numbers that are not finite or absurdly long.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number; write one, or put the text in quotes")
    if not (_INT.fullmatch(text) or _FLOAT.fullmatch(text)):
        return text
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"number of {len(text)} characters; at most {_MAX_DIGITS} are read")
    if _INT.fullmatch(text):
        # a leading 0 alone does not mean octal
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a float; write a smaller number")
    return value


def dump(data: dict[str, Any]) -> str:
    """Write plain data in its own order, so that `load` reads it back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def is_text(plain: str) -> bool:
    """Tell whether an unquoted scalar reads as text."""
    try:
        return isinstance(resolve_plain(plain), str)
    except ValueError:
        return False


def show_path(path: Path) -> str:
    """Write `("stages", 0, "bits")` as `stages[0].bits`; keys that are
    no plain words are quoted."""
    parts = [f"[{p}]" if isinstance(p, int) else f".{show_key(p)}" for p in path]
    return "".join(parts).removeprefix(".")


def show_key(key: str) -> str:
    """Return a short plain key as it is, any other one quoted and shortened."""
    return key if re.fullmatch(r"[\w-]{1,60}", key) else show_value(key)


def show_value(value: Any) -> str:
    """Write a parsed value on one line of at most 60 characters, without control characters."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def no_mapping(data: Any, remedy: str) -> str:
    """Say that a file's `data` is not the mapping that it should be."""
    if data is None:
        return f"the file is empty; {remedy}"
    return f"must be a mapping (value {show_value(data)}); {remedy}"


def error_of(source: str, problems: list[Problem]) -> RecipeError:
    """Build one RecipeError with a line `source:line: path: text` for
    each problem, in file order."""
    ordered = sorted(set(problems))
    lines = []
    for problem in ordered[:MAX_PROBLEMS]:
        where = f"{problem.path}: " if problem.path else ""
        lines.append(f"{source}:{problem.line}: {where}{problem.text}")
    if len(ordered) > MAX_PROBLEMS:
        lines.append(f"{source}: and {len(ordered) - MAX_PROBLEMS} more problems; mend these first")
    return RecipeError("\n".join(lines))


def _text(raw: str | bytes, source: str) -> str:
    data = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"{source}: larger than {MAX_BYTES >> 20} MiB; a recipe is a few lines of YAML",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise RecipeError(
            f"{source}:{line}: byte 0x{data[err.start]:02x} is not UTF-8; save it as UTF-8",
        ) from None


class _Dumper(yaml.SafeDumper):
    """Quotes what `load` would take for a number, a boolean or null, and
    escapes what cannot be seen."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = is_text(text) and text.replace("\n", "").isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


class _Builder:
    """Turns PyYAML's event stream into data; recursion is bounded by MAX_DEPTH."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        self.marks: dict[Path, tuple[int, int]] = {}
        self.spans: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self.spoiled: set[Path] = set()
        # reads on demand
        self.events: Iterator[ev.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self) -> Document:
        try:
            data = self._only_document()
        except yaml.YAMLError as err:
            raise self._syntax_error(err) from None
        except (
            ValueError,
            OverflowError,
        ) as err:  # PyYAML passes \UFFFFFFFF and long directives to chr() and int()
            raise RecipeError(
                f"{self.source}: not YAML: {err}; mend the escape sequence or directive",
            ) from None
        return Document(self.source, data, self.marks, self.spans, self.problems, self.spoiled)

    def _only_document(self) -> Any:
        next(self.events)  # StreamStart
        if isinstance(next(self.events), ev.StreamEndEvent):
            return None
        data = self._node(next(self.events), ())
        next(self.events)  # DocumentEnd
        event = next(self.events)
        if not isinstance(event, ev.StreamEndEvent):
            self._stop(
                event,
                "a second document begins; keep one recipe in a file and remove '---'",
            )
        return data

    def _node(self, event: ev.Event, path: Path) -> Any:
        self.marks.setdefault(path, _mark(event))
        self._limit_depth(event, len(path))
        if isinstance(event, ev.AliasEvent):
            self._spoil(event, path, f"alias '*{event.anchor}' is refused; write the value out")
            return None
        if anchor := getattr(event, "anchor", None):
            self._spoil(event, path, f"anchor '&{anchor}' is refused; remove it")
        if tag := getattr(event, "tag", None):
            self._spoil(
                event,
                path,
                f"tag {tag.replace('tag:yaml.org,2002:', '!!')!r} is refused; remove it",
            )
        if isinstance(event, ev.ScalarEvent):
            return self._scalar(event, path)
        if isinstance(event, ev.SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _scalar(self, event: ev.ScalarEvent, path: Path) -> Any:
        assert event.start_mark is not None
        assert event.end_mark is not None
        self.spans[path] = event.start_mark.index, event.end_mark.index
        try:
            if any("\ud800" <= c <= "\udfff" for c in event.value):
                raise ValueError("half of a surrogate pair; write the character itself")
            return resolve_plain(event.value) if event.implicit[0] else event.value
        except ValueError as err:
            self._spoil(event, path, str(err))
            return None

    def _sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), ev.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not isinstance(event := next(self.events), ev.MappingEndEvent):
            key = self._key(event, path, entries)
            value = next(self.events)
            if key is None:
                self._skip(value, path)
            else:
                self.marks[(*path, key)] = _mark(event)
                entries[key] = self._node(value, (*path, key))
        return entries

    def _key(self, event: ev.Event, path: Path, entries: dict[str, Any]) -> str | None:
        """Return the key at `event`, or None with a note when it cannot be used."""
        if not isinstance(event, ev.ScalarEvent) or (event.anchor, event.tag) != (None, None):
            self._skip(event, path)
            self._note(
                event,
                path,
                "a key is not plain text; write 'field: value' without '&', '*', '!' or '?'",
            )
            return None
        key: str = event.value
        if (event.implicit[0] and not is_text(key)) or not key.isprintable():
            self._note(
                event,
                path,
                f"key {show_value(key or None)} is not a plain string; use a field name",
            )
            return None
        if key in entries:
            first = self.marks[(*path, key)][0]
            self._note(
                event,
                (*path, key),
                f"duplicate key, first on line {first}; remove one of them",
            )
            return None
        return key

    def _skip(self, event: ev.Event, path: Path) -> None:
        """Consume the rest of the node that begins with `event`: what a refused
        entry holds does not matter."""
        depth = 0
        while True:
            depth += isinstance(event, ev.CollectionStartEvent) - isinstance(
                event,
                ev.CollectionEndEvent,
            )
            if depth == 0:
                return
            self._limit_depth(event, len(path) + depth)
            event = next(self.events)

    def _spoil(self, event: ev.Event, path: Path, text: str) -> None:
        """Note a problem and mark the value at `path` as unusable."""
        self.spoiled.add(path)
        self._note(event, path, text)

    def _note(self, event: ev.Event, path: Path, text: str) -> None:
        line, column = _mark(event)
        self.problems.append(Problem(line, column, show_path(path), text))

    def _limit_depth(self, event: ev.Event, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._stop(event, f"nested deeper than {MAX_DEPTH} levels; a recipe needs four")

    def _stop(self, event: ev.Event, text: str) -> None:
        line, column = _mark(event)
        raise RecipeError(f"{self.source}:{line}:{column}: {text}")

    def _syntax_error(self, err: yaml.YAMLError) -> RecipeError:
        if isinstance(err, yaml.reader.ReaderError):
            index, reason = (
                err.position,
                f"character U+{ord(self.text[err.position]):04X} is not allowed",
            )
        else:
            assert isinstance(err, yaml.MarkedYAMLError)
            index = err.problem_mark.index if err.problem_mark else len(self.text)
            reason = ": ".join(part for part in (err.context, err.problem) if part)
        start = self.text.rfind("\n", 0, index) + 1
        line, column = self.text.count("\n", 0, index) + 1, index - start + 1
        shown = show_value(self.text[start:].split("\n", 1)[0].strip())
        hint = next(
            (hint for sign, hint in _SYNTAX_HINTS.items() if sign in reason),
            "mend the YAML syntax",
        )
        return RecipeError(f"{self.source}:{line}:{column}: {reason}: {shown}; {hint}")


def _mark(event: ev.Event) -> tuple[int, int]:
    assert event.start_mark is not None
    return event.start_mark.line + 1, event.start_mark.column + 1
