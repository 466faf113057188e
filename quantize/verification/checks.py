"""What a check is, and how one that cannot be finished still gives a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from safetensors import SafetensorError

from quantize.errors import PqError


class Skipped(Exception):  # noqa: N818 - an outcome, not an error
    """A check does not apply; the message says why."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check."""

    name: str
    ok: bool | None
    """None: skipped."""
    detail: str
    """What was found, for people."""
    skipped_reason: str | None = None


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run `check`, which returns what it found, raises a PqError when it fails, or Skipped.

    Whatever else broken files make it raise is a failure too, never a pass.
    """
    try:
        return Check(name, True, check())
    except Skipped as reason:
        return Check(name, None, "", str(reason))
    except PqError as err:
        return Check(name, False, " ".join(str(err).split()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError) as err:
        return Check(
            name,
            False,
            f"could not be finished ({type(err).__name__}: {' '.join(str(err).split())[:300]})",
        )


def summarize(problems: list[str]) -> str:
    """The first problem, and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
