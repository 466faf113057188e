"""A tokenizer's chat template, and the forms of a chat that templates disagree about."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantize.calibration.chats import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"
_DAY = {
    "%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%e": "26", "%-d": "26", "%B": "July",
    "%b": "Jul", "%A": "Friday", "%a": "Fri", "%H": "12", "%I": "12", "%M": "00", "%S": "00",
}  # fmt: skip
"""A day and an hour, as the formats of dates write them."""
_PROBE = "quince jelly"
"""Text that no template writes of its own accord."""


class Template:
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
        reason: Exception | None = None
        for variant in _variants(chat):
            try:
                return self._render(variant), False
            except Exception as error:  # the last form is the one that templates mind least
                reason = error
        assert reason is not None
        folded = filter(None, map(_folded, _variants(chat)))
        for variant in folded:
            try:
                return self._render(variant), True
            except Exception:  # the row as it is says more
                continue
        raise reason

    def _render(self, chat: Chat) -> str:
        text = self._apply(chat)
        # Some templates print null; others look for it to know a message of tool calls.
        if "None" in text and any(message["content"] is None for message in chat.messages):
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
            function = function_of(call)
            given = function.get("arguments")
            if parsed and isinstance(given, str):
                function["arguments"] = _parsed(given)
            elif not parsed and isinstance(given, dict):
                function["arguments"] = json.dumps(given, ensure_ascii=False)
    return Chat(messages, chat.tools)


def function_of(call: Any) -> dict[str, Any]:
    """What a call of a tool calls: the part that has name and arguments."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function if isinstance(function, dict) else {}


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
