"""Conversations as people store them, turned into messages that chat templates take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_ROLES = {
    # ShareGPT and its kin
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""What data sets call the speakers → what templates call them."""
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")


class UnusableRowError(ValueError):
    """Says why one row of a data set cannot be read."""


@dataclass(frozen=True)
class Chat:
    """One conversation."""

    messages: list[dict[str, Any]]
    """{"role": text, "content": text or None, ...}: None where a message consists of tool calls."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that were offered."""


def are_messages(value: object) -> bool:
    """Whether a value is a list of messages with a speaker each, under either pair of keys."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in _ROLE_KEYS)


def chat_of(value: object, system: object = None, tools: object = None) -> Chat | None:
    """A conversation from the list that a row holds; None where no message says anything.

    system: text that goes before it, where the row has it in a column of its own.
    tools: a list of JSON schemas, also as one JSON text; anything else is left out.
    Raises UnusableRowError.
    """
    if not are_messages(value):
        kind = type(value).__name__
        raise UnusableRowError(
            f"{kind} instead of text or a list of chat messages with a role each"
        )
    assert isinstance(value, list)
    messages = [_message(message) for message in value]
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        return None
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    chat = Chat(messages, _tools(tools))
    require_unicode(json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str))
    return chat


def require_unicode(text: str) -> str:
    """The text; UnusableRowError where it holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRowError("half of a surrogate pair is no text; repair the row") from None
    return text


def _message(given: dict[str, Any]) -> dict[str, Any]:
    role = next(given[key] for key in _ROLE_KEYS if isinstance(given.get(key), str))
    key = next((key for key in _CONTENT_KEYS if given.get(key) is not None), None)
    content = None if key is None else _content(given[key])
    # Tables fill the keys that a message has not with null, and templates ask whether a key is there.
    rest = {
        name: value
        for name, value in given.items()
        if value is not None and name not in (*_ROLE_KEYS, *_CONTENT_KEYS)
    }
    if content is None and not rest.get("tool_calls"):
        content = ""
    return {"role": _ROLES.get(role.lower(), role), "content": content, **rest}


def _content(value: object) -> str:
    """The text of a message; parts are joined by line feeds."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UnusableRowError(f"a message's content is {type(value).__name__} instead of text")
    parts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UnusableRowError(f"a message has a part of type {kind!r}; only text can be read")
        parts.append(text)
    return "\n".join(parts)


def _tools(value: object) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(tool, dict) for tool in value):
        return value
    return None
