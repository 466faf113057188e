"""Patterns of linears as recipes and other tools' files write them, and what a mistyped one meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

REGEX = "re:"
"""What a pattern begins with that is a regular expression, as in compressed-tensors."""
ANY = "Linear"
"""The name by which compressed-tensors calls all linears: that of their class."""
_WORD = re.compile(r"[A-Za-z]\w{2,}")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches the full name of a linear: a shell pattern all of it, a
    regular expression after `re:` its beginning."""
    return any(_matches(name, pattern) for pattern in patterns)


def problem_of(pattern: str) -> str | None:
    """What is wrong with a pattern; None where it can be used."""
    try:
        re.compile(pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else "")
    except (re.error, OverflowError, RecursionError) as err:
        return f"pattern '{pattern}' is no regular expression: {err}"
    return None


def nearest_pattern(pattern: str, names: Collection[str]) -> str | None:
    """A pattern that matches some of the names and differs little from one that matches none."""
    below = f"{pattern}.*"
    if not pattern.startswith(REGEX) and any(fnmatchcase(name, below) for name in names):
        return below
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
    mended = pattern
    for word in _WORD.findall(pattern.removeprefix(REGEX)):
        if not any(word in part for part in parts):
            near = difflib.get_close_matches(word, sorted(parts), n=1)
            mended = mended.replace(word, near[0]) if near else mended
    options = (mended, f"*.{mended}")
    return next((one for one in options if any(_matches(name, one) for name in names)), None)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    return pattern == ANY or fnmatchcase(name, pattern)
