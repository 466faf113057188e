"""Conversations as text: through the tokenizer's chat template, or plainly without one."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantize.calibration.chats import Chat
from quantize.calibration.layouts import Row
from quantize.calibration.local_files import first_line
from quantize.calibration.notes import Notes, OddRows, joined
from quantize.calibration.templates import Template, function_of
from quantize.calibration.text_sources import Text
from quantize.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_TEMPLATE = "the tokenizer has no chat template"
_REMEDY = "use the chat model's tokenizer, or put its chat_template.jinja beside it"
_WORD = re.compile(r"[^\W_]{4,}")
_HOW = {True: "chat template", False: "chats without template"}
"""What was made of rows, behind the text's name: by whether a template was used."""


def rendering_of(source: str) -> str:
    """What the name of a text says was made of its rows; empty where they were read as they are."""
    return next((how for how in _HOW.values() if source.endswith(f" ({how})")), "")


class Renderer:
    """Gives the rows of one text as the model is to read them, and counts what it cannot give.

    choice: True renders all rows, plain ones as one user turn; False writes chats plainly; None
    renders chats where the tokenizer has a template. DataError for True without a template, and for
    one running text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: Text, choice: bool | None = None
    ) -> None:
        if choice and text.packing == "stream":
            raise DataError(
                f"{text.source} is one text without chat turns; turn chat_template off, or give a "
                "file of rows with one chat each"
            )
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if choice and not has_template:
            raise DataError(f"{_NO_TEMPLATE}; turn chat_template off, or {_REMEDY}")
        self.eos: int | None = tokenizer.eos_token_id
        self._text, self._chats = text, text.has_chats
        self.templated = bool(choice) or (self._chats and has_template and choice is None)
        self._plain_too = bool(choice)
        self._missing = choice is None and self._chats and not has_template
        self._template = Template(tokenizer) if self.templated else None
        self._odd = OddRows(text.source, text.unit, "cannot be rendered by the chat template")
        self._read = self._folded = 0
        self._unsaid: dict[str, int] = {}

    @property
    def changes(self) -> bool:
        """Whether the text is more than its plain rows."""
        return self.templated or self._chats

    def __call__(self, row: Row, number: int) -> str | None:
        """The row's text; None where the template refuses it. number: where the row stands.
        DataError once too many were refused for the whole set to be any use."""
        if isinstance(row, str) and not (self._plain_too and row.strip()):
            return "" if self._plain_too else row
        self._read += 1
        chat = Chat([{"role": "user", "content": row}]) if isinstance(row, str) else row
        if self._template is None:
            return _plainly(chat)
        try:
            text, folded = self._template.render(chat)
        # Templates are programs of the model's author and raise what they like (say, when roles do
        # not alternate).
        except Exception as error:
            start = str(chat.messages[0]["content"] or "")[:40]
            reason = f"the tokenizer's chat template refuses the row that starts {start!r}"
            self._odd.add(number, f"{reason}: {first_line(error)}")
            self._odd.require_few(max(self._read, len(self._text.rows)))
            return None
        self._folded += folded
        for role in _unsaid(chat, text):
            self._unsaid[role] = self._unsaid.get(role, 0) + 1
        return text

    def rendered(self, rows: list[tuple[Row, int]]) -> Iterator[str]:
        """The texts of rows and their numbers, without those that the template refuses."""
        texts = (self(row, number) for row, number in rows)
        return (text for text in texts if text is not None)

    def require_few_odd(self) -> None:
        """DataError where the template refused more than a tenth of what was read."""
        self._odd.require_few(self._read)

    def facts(self) -> dict[str, object]:
        """For provenance: how rows became text, as far as they were not text before."""
        facts: dict[str, object] = {"chat_template": self.templated}
        if self._template is not None:
            facts["chat_template_sha256"] = self._template.sha256
        facts |= {"rows_refused": len(self._odd)} if self._odd else {}
        facts |= {"system_turns_folded": self._folded} if self._folded else {}
        return facts | ({"roles_left_out": self._unsaid} if self._unsaid else {})

    def source(self) -> str:
        """The text's name for people, with what was made of its rows."""
        if not self.changes:
            return self._text.source
        return f"{self._text.source} ({_HOW[self.templated]})"

    def notes(self) -> Notes:
        """What is to be said of the text now that it was read."""
        source = self._text.source
        field = self._text.origin.get("text_field")
        how: Notes = ()
        if self.templated:
            what = f"chats ({field})" if self._chats else "each row as a user turn"
            line = f"{source}: {what}, rendered with the model's chat template"
            how = ((logging.INFO, line),)
        elif self._chats:
            why = (
                f"{_NO_TEMPLATE}; {_REMEDY}" if self._missing else "no chat template was asked for"
            )
            line = f"{source}: chats ({field}), written as 'role: content' ({why})"
            how = ((logging.WARNING if self._missing else logging.INFO, line),)
        folded: Notes = ()
        if self._folded:
            line = (
                f"{source}: the chat template refuses a system turn; in {self._folded} rows its text "
                "was put before the first user turn"
            )
            folded = ((logging.WARNING, line),)
        unsaid: Notes = tuple(
            (
                logging.WARNING,
                f"{source}: the chat template leaves out turns ({role}) in {count} of "
                f"{self._read} rows read",
            )
            for role, count in self._unsaid.items()
        )
        return joined(self._text.notes, how, folded, unsaid, self._odd.notes(self._read))


def _unsaid(chat: Chat, text: str) -> set[str]:
    """Roles of turns of which a rendered text has not a single word, templates being free to leave
    out some and to write others in another way; tool_calls for calls of which it has no name."""
    roles = set()
    for message in chat.messages:
        content = str(message["content"] or "").strip()
        words = _WORD.findall(content[:4096]) or [content]
        if not any(word in text for word in words):
            roles.add(str(message["role"]))
        named = [function_of(call).get("name") for call in message.get("tool_calls") or ()]
        if named and not any(str(name) in text for name in named):
            roles.add("tool_calls")
    return roles


def _plainly(chat: Chat) -> str:
    """The chat without any template: one paragraph for each message."""
    parts = []
    for message in chat.messages:
        calls = message.get("tool_calls")
        said = [message["content"] or ""]
        said += [json.dumps(calls, ensure_ascii=False, default=str)] if calls else []
        parts.append(f"{message['role']}: {' '.join(filter(None, said))}")
    return "\n\n".join(parts)
