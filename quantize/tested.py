"""Dependencies outside the releases that pq was tested with: one line, once in a process.

`tested.json` holds the lowest (the bound of pyproject.toml) and the highest release (that of the
lock files) for each; `make lock` writes it. Versions are read from the metadata of what is
installed: nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import warnings
from pathlib import Path

SILENCE = "PQ_NO_VERSION_NOTICE"
"""An environment variable: set to 1, nothing is said."""

_told: list[str] = []


def version_notice() -> str | None:
    """One line that names what is installed outside the tested range; None where
    nothing is, or it was said before.

    Only the first two numbers of a version count: a patch release is not another release to test.
    None as well on all processes of a launch but the first, and where `SILENCE` is set.
    """
    quiet = os.environ.get(SILENCE, "0") not in ("", "0")
    if _told or quiet or os.environ.get("RANK", "0") != "0":
        return None
    outside = _outside()
    _told.append("")  # the versions do not change while we run: one look is enough
    if not outside:
        return None
    return (
        f"not tested with {', '.join(outside)}; if something fails, install a tested release "
        f"({SILENCE}=1 hides this line)"
    )


def warn_untested() -> None:
    """Issue `version_notice` as a UserWarning, unless it was said before in this process."""
    if line := version_notice():
        warnings.warn(f"pq: {line}", stacklevel=2)


def _outside() -> list[str]:
    file = Path(__file__).with_name("tested.json")
    ranges: dict[str, tuple[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    installed = {name: _installed_version(name) for name in ranges}
    return [
        f"{name} {installed[name]} (tested: {low} to {high})"
        for name, (low, high) in ranges.items()
        if not _release(low) <= _release(installed[name] or low) <= _release(high)
    ]


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # triton, on machines that have none


def _release(version: str) -> tuple[int, ...]:
    """Its first two numbers, whatever else a version says (2.13.0+cpu, 5.25.0.dev0)."""
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return tuple(numbers + [0] * (2 - len(numbers)))
