"""Conversations as text: through the tokenizer's chat template, or plainly without one."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantize.calibration.chats import Chat
from quantize.calibration.layouts import Row
from quantize.calibration.local_files import first_line
from quantize.calibration.notes import Notes, OddRows, joined
from quantize.calibration.text_sources import Text
from quantize.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_TEMPLATE = "the tokenizer has no chat template"
_REMEDY = "use the chat model's tokenizer, or put its chat_template.jinja beside it"
_CLOCK = "strftime_now"
_DAY = {
    "%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%e": "26", "%-d": "26", "%B": "July",
    "%b": "Jul", "%A": "Friday", "%a": "Fri", "%H": "12", "%I": "12", "%M": "00", "%S": "00",
}  # fmt: skip
"""A day and an hour, as the formats of dates write them."""
_PROBE = "quince jelly"
"""Text that no template writes of its own accord."""


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
        self._template = _Template(tokenizer) if self.templated else None
        self._odd = OddRows(text.source, text.unit, "cannot be rendered by the chat template")
        self._read = self._folded = 0

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
        return facts | ({"system_turns_folded": self._folded} if self._folded else {})

    def source(self) -> str:
        """The text's name for people, with what was made of its rows."""
        if not self.changes:
            return self._text.source
        how = "chat template" if self.templated else "chats without template"
        return f"{self._text.source} ({how})"

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
        return joined(self._text.notes, how, folded, self._odd.notes(self._read))


class _Template:
    """A tokenizer's chat template and the form of messages that it takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        told = json.dumps(tokenizer.chat_template, sort_keys=True, ensure_ascii=False)
        self.sha256 = hashlib.sha256(told.encode()).hexdigest()
        """Of the template, or of all where there are several, as JSON."""
        self._in_parts = self._wants_parts()

    def render(self, chat: Chat) -> tuple[str, bool]:
        """The chat as text, and whether its system turn had to go into the first user turn. Raises
        what the template raises for the chat as it is."""
        first: Exception | None = None
        for variant in _variants(chat):
            try:
                return self._render(variant), False
            except Exception as error:
                first = first or error
        assert first is not None
        folded = filter(None, map(_folded, _variants(chat)))
        for variant in folded:
            try:
                return self._render(variant), True
            except Exception:  # the first says more of the row
                continue
        raise first

    def _render(self, chat: Chat) -> str:
        text = self._apply(chat)
        if any(message["content"] is None for message in chat.messages):
            # Some templates print null; others look for it to know a message of tool calls.
            empty = self._apply(_with_content(chat, ""))
            return empty if text.count("None") > empty.count("None") else text
        return text

    def _apply(self, chat: Chat) -> str:
        messages = copy.deepcopy(chat.messages)  # templates may write to them
        for message in messages if self._in_parts else ():
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        tokenizer = self._tokenizer
        template = tokenizer.get_chat_template(tools=chat.tools)
        if _CLOCK in template:
            template = _still(template)
        return str(
            tokenizer.apply_chat_template(
                messages, tools=chat.tools, chat_template=template, tokenize=False
            )
        )

    def _wants_parts(self) -> bool:
        """Whether the template shows text that comes as a list of parts and not text by itself."""
        probe = Chat([{"role": "user", "content": _PROBE}])
        for parts in (False, True):
            self._in_parts = parts
            try:
                if _PROBE in self._apply(probe):
                    return parts
            except Exception:  # whether rows fare better is seen with them
                continue
        return False


def _still(template: str) -> str:
    """The template with a clock that stands still: a text must not depend on the day."""
    replaced = "".join(f"|replace('{code}', '{text}')" for code, text in _DAY.items())
    return f"{{% macro {_CLOCK}(form) %}}{{{{ form{replaced} }}}}{{% endmacro %}}{template}"


def _variants(chat: Chat) -> Iterator[Chat]:
    """The chat in the forms that templates disagree about: arguments of tool calls parsed, as one
    JSON text, and with text in place of null."""
    called = any(message.get("tool_calls") for message in chat.messages)
    for variant in (_arguments(chat, parsed=True), _arguments(chat, parsed=False)):
        yield variant
        if any(message["content"] is None for message in variant.messages):
            yield _with_content(variant, "")
        if not called:
            return


def _arguments(chat: Chat, parsed: bool) -> Chat:
    messages = copy.deepcopy(chat.messages)
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            given = function.get("arguments") if isinstance(function, dict) else None
            if parsed and isinstance(given, str):
                function["arguments"] = _parsed(given)
            elif not parsed and isinstance(given, dict):
                function["arguments"] = json.dumps(given, ensure_ascii=False)
    return Chat(messages, chat.tools)


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _with_content(chat: Chat, content: str) -> Chat:
    """The chat with text where a message has null."""
    messages = [m | {"content": content} if m["content"] is None else m for m in chat.messages]
    return Chat(messages, chat.tools)


def _folded(chat: Chat) -> Chat | None:
    """The chat with its system turn's text before that of the first user turn, as models without
    system turns were shown such text; None without such turns at its start."""
    turns = chat.messages
    if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
        return None
    content = f"{turns[0]['content']}\n\n{turns[1]['content']}"
    return Chat([turns[1] | {"content": content}, *turns[2:]], chat.tools)


def _plainly(chat: Chat) -> str:
    """The chat without any template: one paragraph for each message."""
    parts = []
    for message in chat.messages:
        calls = message.get("tool_calls")
        said = [message["content"] or ""]
        said += [json.dumps(calls, ensure_ascii=False, default=str)] if calls else []
        parts.append(f"{message['role']}: {' '.join(filter(None, said))}")
    return "\n\n".join(parts)
