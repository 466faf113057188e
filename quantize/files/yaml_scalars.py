"""What an unquoted scalar means in the core schema of YAML 1.2."""

from __future__ import annotations

import math
import re
from typing import Any

_WORDS: dict[str, bool | None] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_DIGITS = 100  # of a number; Python itself reads no integer of more than 4300


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


def is_text(plain: str) -> bool:
    """Tell whether an unquoted scalar reads as text."""
    try:
        return isinstance(resolve_plain(plain), str)
    except ValueError:
        return False
