"""Which columns of a data set hold its text, and how a row is read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.calibration.chats import (
    Chat,
    UnusableRowError,
    are_messages,
    chat_of,
    require_unicode,
)

Row = str | Chat
"""Plain text, or one conversation."""

HEAD = 100
"""Rows that a layout is recognized by: the first few may be odd ones."""
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_ASKED = ("instruction", "prompt", "question", "query", "problem", "input")
_ANSWERS = ("output", "response", "completion", "solution", "answer", "chosen")
_MORE = {"instruction": ("input", "context"), "question": ("context",)}
"""What is asked → columns that go on with it where they are there."""
_SYSTEM = ("system", "system_prompt")
_TOOLS = "tools"


@dataclass(frozen=True)
class Column:
    """One column: text, or a list of messages."""

    field: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row is read from, as far as it has them."""
        return (self.field, *_SYSTEM, _TOOLS)

    @property
    def name(self) -> str:
        """For people and provenance."""
        return self.field

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has what is read."""
        value = row.get(self.field)
        return isinstance(value, str) or are_messages(value)

    def read(self, row: Mapping[str, Any]) -> Row | None:
        """The text or chat; None for null. UnusableRowError for anything else."""
        if self.field not in row:
            raise UnusableRowError(f"has no field {self.field!r}")
        value = row[self.field]
        if value is None or value == []:
            return None
        if isinstance(value, str):
            return require_unicode(value)
        return chat_of(value, _system(row), row.get(_TOOLS))


@dataclass(frozen=True)
class Chats(Column):
    """One column that is known to hold messages."""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has messages there."""
        return are_messages(row.get(self.field))


@dataclass(frozen=True)
class Pair:
    """What is asked and what is answered, in two columns, each text or messages."""

    asked: str
    answer: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row is read from, as far as it has them."""
        return (self.asked, *_MORE.get(self.asked, ()), self.answer, *_SYSTEM, _TOOLS)

    @property
    def name(self) -> str:
        """For people and provenance."""
        return f"{self.asked}, {self.answer}"

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has both."""
        values = (row.get(self.asked), row.get(self.answer))
        return all(isinstance(value, str) or are_messages(value) for value in values)

    def read(self, row: Mapping[str, Any]) -> Row | None:
        """The chat; None where either is null. UnusableRowError for anything but text and messages."""
        asked, answer = row.get(self.asked), row.get(self.answer)
        if asked is None or answer is None:
            return None
        if isinstance(asked, str):
            more = [row.get(name) for name in _MORE.get(self.asked, ())]
            texts = (asked, *(text for text in more if isinstance(text, str) and text.strip()))
            asked = [{"role": "user", "content": "\n\n".join(texts)}]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        for value in (asked, answer):
            if not are_messages(value):
                raise UnusableRowError(f"{type(value).__name__} instead of text in {self.name}")
        told = chat_of(answer)
        # Sets of preferences repeat the question in the answer's messages.
        whole = told is not None and told.messages[0]["role"] != "assistant"
        return chat_of(answer if whole else [*asked, *answer], _system(row), row.get(_TOOLS))


Layout = Column | Pair

_KNOWN: tuple[Layout, ...] = (
    Column("text"),
    *map(Chats, _CHATS),
    *(Pair(asked, answer) for asked in _ASKED for answer in _ANSWERS),
)
"""In the order in which they are preferred."""
KNOWN = (
    "text, messages, conversations, instruction and output, prompt and completion, "
    "question and answer and their like"
)


def recognize(
    head: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
) -> Layout | None:
    """The layout that fits most of the first rows, the preferred one of equals; where none fits any,
    the column `text` if there is one, else None.

    names: of all columns, where rows leave some out.
    """
    counts = [sum(map(layout.fits, head)) for layout in _KNOWN]
    most = max(counts)
    if most:
        return _KNOWN[counts.index(most)]
    plain = _KNOWN[0]
    named = names if names is not None else [name for row in head for name in row]
    return plain if plain.columns[0] in named else None


def _system(row: Mapping[str, Any]) -> object:
    return next((row[name] for name in _SYSTEM if isinstance(row.get(name), str)), None)
