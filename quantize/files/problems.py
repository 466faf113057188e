"""What is wrong with a file that people write: places, values and lines for messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from quantize.errors import RecipeError

MAX_PROBLEMS = 20
"""A broken file reports this many lines, then a count."""

Place = tuple[str | int, ...]
"""Keys and list indices from the root: `("stages", 0, "bits")`."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a file; `line` and `column` count from 1."""

    line: int
    column: int
    path: str
    text: str


def show_path(path: Place) -> str:
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
