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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml import events as ev

from quantize.errors import RecipeError
from quantize.files.problems import Place, Problem, show_path, show_value
from quantize.files.yaml_scalars import is_text, resolve_plain

MAX_BYTES = 1 << 20
"""Two thousand times the longest shipped recipe: what is larger was named by mistake."""
MAX_DEPTH = 20
"""Recipes and gate files need five; the parser's recursion is safe far beyond."""
_SYNTAX_HINTS = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "put a value that contains ': ' in quotes",
    "expected <block end>": "align this line with the keys or list items above it",
    "while scanning a quoted scalar": "close the quote",
    "while parsing a flow": "close the bracket",
}


@dataclass(frozen=True)
class Document:
    """Plain data of one file, where each value (for a mapping entry: its key) stands,
    and what is wrong with it."""

    source: str
    data: Any
    marks: dict[Place, tuple[int, int]]
    spans: dict[Place, tuple[int, int]]
    """First character of each scalar value in the decoded text (0 is the first after a byte order
    mark), and one past its last."""
    problems: list[Problem]
    spoiled: set[Place]
    """Paths whose value is refused, so that no further complaint about it helps."""

    def problem(self, path: Place, text: str) -> Problem:
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


def dump(data: dict[str, Any]) -> str:
    """Write plain data in its own order, so that `load` reads it back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


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
        self.marks: dict[Place, tuple[int, int]] = {}
        self.spans: dict[Place, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self.spoiled: set[Place] = set()
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

    def _node(self, event: ev.Event, path: Place) -> Any:
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

    def _scalar(self, event: ev.ScalarEvent, path: Place) -> Any:
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

    def _sequence(self, path: Place) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), ev.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: Place) -> dict[str, Any]:
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

    def _key(self, event: ev.Event, path: Place, entries: dict[str, Any]) -> str | None:
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

    def _skip(self, event: ev.Event, path: Place) -> None:
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

    def _spoil(self, event: ev.Event, path: Place, text: str) -> None:
        """Note a problem and mark the value at `path` as unusable."""
        self.spoiled.add(path)
        self._note(event, path, text)

    def _note(self, event: ev.Event, path: Place, text: str) -> None:
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
