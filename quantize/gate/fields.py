"""The fields of gate files, and what each of them takes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection
from typing import Any, get_args

from quantize.evaluation.protocols import BOS, PROTOCOLS
from quantize.model.linear import Numerics


def close(word: str, options: Collection[str]) -> str:
    """Return "did you mean 'option'? " for the option nearest to `word`, else nothing."""
    found = difflib.get_close_matches(word, list(options), n=1)
    return f"did you mean '{found[0]}'? " if found else ""


Test = tuple[Callable[[Any], bool], str]
"""Whether a value is fit, and what a fit one is, in words."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(least: int) -> Test:
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"an integer >= {least}",
    )


def _choice(options: tuple[str, ...]) -> Test:
    return lambda v: v in options, " or ".join(options)


TEXT: Test = (lambda v: isinstance(v, str) and bool(v), "a text")
_TEXTS: Test = (
    lambda v: isinstance(v, list) and all(isinstance(x, str) and x for x in v),
    "a list of texts",
)
PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")
ERRORS = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?se")
"""A tolerance in standard errors."""
_PROTOCOL = re.compile(r"strided-[0-9]+(-context-[0-9]+)?(-bos)?|rolling-[0-9]+")
TOP: dict[str, Test] = {
    "model": TEXT,
    "calibration": (lambda v: isinstance(v, dict), "a mapping"),
    "evaluation": (lambda v: isinstance(v, dict), "a mapping"),
    "tasks": _TEXTS,
    "task_limit": _count(1),
    "recipes": (
        lambda v: isinstance(v, dict) and bool(v),
        "a mapping with one entry or more, 'NAME: {METRIC: ...}'",
    ),
    "checkpoints": (
        lambda v: isinstance(v, dict) and bool(v),
        "a mapping with one entry or more, 'FOLDER: {METRIC: ...}'",
    ),
    "history": (lambda v: isinstance(v, list), "a list, which pq itself appends to"),
}
"""Fields of a gate file."""
EVALUATION: dict[str, Test] = {
    "protocol": _choice(PROTOCOLS),
    "dataset": TEXT,
    "text_field": TEXT,
    "chat_template": (lambda v: isinstance(v, bool), "true or false"),
    "seqlen": _count(8),
    "max_windows": _count(1),
    "context": _count(0),
    "numerics": _choice(get_args(Numerics)),
    "bos": _choice(BOS),
    "dtype": _choice(("float32", "bfloat16", "float16")),
}
"""Fields of its `evaluation`."""
ENTRY: dict[str, Test] = {
    "recipe": TEXT,
    "set": _TEXTS,
    "protocol": (
        lambda v: isinstance(v, str) and bool(_PROTOCOL.fullmatch(v)),
        "a protocol's name such as strided-2048 or strided-2048-bos",
    ),
}
"""Fields of a recipe's entry; all others are metrics."""
CHECKPOINT: dict[str, Test] = {"folder": TEXT, "protocol": ENTRY["protocol"]}
"""Fields of a checkpoint's entry; all others are metrics."""
CHECK: dict[str, Test] = {
    "value": (_number, "a number"),
    "tolerance": (
        lambda v: (
            (_number(v) and v >= 0)
            or (isinstance(v, str) and bool(PERCENT.fullmatch(v) or ERRORS.fullmatch(v)))
        ),
        "a number >= 0, a percentage such as 30%, or standard errors such as 3 se",
    ),
    "stderr": (lambda v: _number(v) and v >= 0, "a number >= 0"),
    "recovery": (lambda v: _number(v) and 0 < v <= 1, "a number > 0 and <= 1, such as 0.95"),
}
"""Fields of a metric."""
