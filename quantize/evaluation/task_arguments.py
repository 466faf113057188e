"""Model arguments of tasks, `k=v`: those of lm-eval's HFLM that mean something here."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from quantize.errors import UsageError


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _positive(text: str) -> int:
    value = _whole(text)
    if not value:
        raise ValueError
    return value


def _truth(text: str) -> bool:
    return {"true": True, "false": False, "1": True, "0": False}[text.lower()]


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_ARGUMENTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "max_length": ("a positive whole number", _positive),
    "add_bos_token": ("true or false", _truth),
    "prefix_token_id": ("a token id", _whole),
    "truncation": ("true or false", _truth),
    "logits_cache": ("true or false", _truth),
    "think_end_token": ("a token", str),
    "enable_thinking": ("true or false", _truth),
    "chat_template_args": ("a JSON object", _mapping),
}
"""Arguments of HFLM that mean something for a model that is already loaded."""


def model_options(arguments: Mapping[str, str], others: Sequence[str] = ()) -> dict[str, Any]:
    """Turn `k=v` model arguments into HFLM's keyword arguments.

    others: further keys, for the message alone. UsageError for a key that this
    lm-eval lacks and for a bad value.
    """
    accepted = set(inspect.signature(HFLM.__init__).parameters)
    known = [key for key in _ARGUMENTS if key in accepted]
    options: dict[str, Any] = {}
    for key, text in arguments.items():
        if key not in known:
            raise UsageError(
                f"model argument {key}={text}: unknown; choose among {', '.join([*others, *known])}"
            )
        says, parse = _ARGUMENTS[key]
        try:
            options[key] = parse(text)
        except (ValueError, KeyError):
            raise UsageError(f"model argument {key}={text}: give {says}") from None
    return options
