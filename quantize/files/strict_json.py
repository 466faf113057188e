"""JSON without its traps: a key that stands twice is refused, since readers differ in
which of the two they take."""

from __future__ import annotations

import json
import math
from typing import Any


def parse(text: str) -> Any:
    """Parse JSON; ValueError for what is no JSON or no UTF-8, and for a
    key that an object has twice.

    RecursionError for what is nested too deeply.
    """
    data = json.loads(text, object_pairs_hook=_unique)
    if "\\ud" in text.lower():  # an escape may be half of a surrogate pair, which no UTF-8 can hold
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"key {next(key for key in keys if keys.count(key) > 1)!r:.80} stands twice in an "
            "object"
        )
    return out


def not_finite(data: Any, path: str = "") -> str | None:
    """Where the first NaN or infinity of parsed JSON stands, as in
    `rope_parameters.factor`; None without one."""
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return next(
            (found for key, value in items if (found := not_finite(value, f"{path}.{key}"))), None
        )
    return path.removeprefix(".") if isinstance(data, float) and not math.isfinite(data) else None
