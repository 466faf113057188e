"""Policies by the names that people write."""

from __future__ import annotations

import json
import re
from pathlib import Path

from quantize.errors import UsageError
from quantize.serving.speculation.dsde import PAPER, PUBLISHED_CODE
from quantize.serving.speculation.fitted import Fitted
from quantize.serving.speculation.policy import AdaEdl, Confidence, Heuristic, Policy, Static

NAMED: tuple[Policy, ...] = (PAPER, PUBLISHED_CODE, AdaEdl(), Heuristic(), Confidence())
_FILE = "fitted:"
_STATIC = re.compile(r"static-([1-9]\d{0,2})")


def policy_named(name: str) -> Policy:
    """The policy of a name: `static-N` is N tokens always, `fitted:FILE` what `pq draft --save-policy`
    wrote. UsageError for another."""
    if found := _STATIC.fullmatch(name):
        return Static(int(found[1]))
    if name.startswith(_FILE):
        return _fitted(Path(name.removeprefix(_FILE)))
    for policy in NAMED:
        if policy.name == name:
            return policy
    known = ", ".join(policy.name for policy in NAMED)
    raise UsageError(f"policy {name!r}: choose static-N, fitted:FILE, {known}")


def _fitted(path: Path) -> Fitted:
    try:
        return Fitted.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as err:
        raise UsageError(
            f"policy fitted:{path}: {err}; pq draft --policies --save-policy writes one"
        ) from None
