"""Policies by the names that people write."""

from __future__ import annotations

import re

from quantize.errors import UsageError
from quantize.serving.speculation.dsde import PAPER, PUBLISHED_CODE
from quantize.serving.speculation.policy import AdaEdl, Confidence, Heuristic, Policy, Static

NAMED: tuple[Policy, ...] = (PAPER, PUBLISHED_CODE, AdaEdl(), Heuristic(), Confidence())
_STATIC = re.compile(r"static-([1-9]\d{0,2})")


def policy_named(name: str) -> Policy:
    """The policy of a name, `static-N` being N tokens always; UsageError for another."""
    if found := _STATIC.fullmatch(name):
        return Static(int(found[1]))
    for policy in NAMED:
        if policy.name == name:
            return policy
    known = ", ".join(policy.name for policy in NAMED)
    raise UsageError(f"policy {name!r}: choose static-N, {known}")
