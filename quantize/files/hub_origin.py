"""What a model is called: by its name on the Hub where its folder lies in the Hub's cache.

The cache keeps each commit of `org/name` in a folder `models--org--name/snapshots/COMMIT`. So a
model is known by id and commit however it was named, and wherever the cache lies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"models--([\w.-]+)")
_COMMIT = re.compile("[0-9a-f]{40}")
_SHORT = 7
"""Digits of a commit that people read, as many as the Hub's own pages show."""


@dataclass(frozen=True)
class HubOrigin:
    """One commit of a model on the Hub; field names are keys of pq.json."""

    id: str
    """org/name, or one word for the oldest models."""
    commit: str
    """All 40 digits."""

    def __str__(self) -> str:
        return f"{self.id}@{self.commit[:_SHORT]}"

    def as_json(self) -> dict[str, str]:
        """For pq.json."""
        return asdict(self)


def hub_origin(folder: Path) -> HubOrigin | None:
    """What a folder of the Hub's cache holds; None for any other folder."""
    try:
        repository, kind, commit = folder.resolve().parts[-3:]
    except (OSError, RuntimeError, ValueError):  # a link to itself, or too short a path
        return None
    found = _REPOSITORY.fullmatch(repository)
    # an id has no "--" of its own
    if found is None or kind != "snapshots" or not _COMMIT.fullmatch(commit):
        return None
    name = found[1].replace("--", "/")
    return HubOrigin(name, commit) if name.count("/") <= 1 else None


def called(folder: Path) -> str:
    """A model's name for people: org/name@COMMIT in short for the Hub's, else the folder's."""
    # `.` and `..` have no name of their own
    return str(hub_origin(folder) or os.path.basename(os.path.abspath(folder)))


def origin_in(provenance: Mapping[str, Any]) -> HubOrigin | None:
    """The parent that pq.json names; None for a local one, and before pq named any."""
    found = provenance.get("origin")
    return HubOrigin(found["id"], found["commit"]) if isinstance(found, dict) else None


def commit_of(folder: Path | None) -> str | None:
    """The commit of a model on the Hub; None for any other folder, and for none."""
    origin = None if folder is None else hub_origin(folder)
    return None if origin is None else origin.commit
