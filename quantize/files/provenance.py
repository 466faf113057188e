"""pq.json: what a conversion says about itself, and how a change of that file is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantize.errors import ModelError, VerifyError
from quantize.files.checkpoint import read_json

PROVENANCE = "pq.json"
DIGEST = "sha256"
"""Key of the digest of all other keys: a file cannot hold its own hash."""


def canonical_json(data: Mapping[str, Any]) -> str:
    """The one text that pq writes for `data`; key order counts."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def provenance_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical text of `data` without its own digest."""
    rest = {key: value for key, value in data.items() if key != DIGEST}
    return hashlib.sha256(canonical_json(rest).encode("utf-8")).hexdigest()


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """pq.json of a checkpoint, None where there is none.

    ModelError when it is no JSON object or a part that other code relies on
    is missing or of another type.
    """
    path = folder / PROVENANCE
    if not path.exists():
        return None
    data = read_json(path)
    for key, fits in _PARTS.items():
        if key not in data:
            raise ModelError(f"{path}: '{key}' is missing")
        if not fits(data[key]):
            raise ModelError(f"{path}: '{key}' is not what pq writes")
    if "origin" in data and not _origin(data["origin"]):
        raise ModelError(f"{path}: 'origin' is not what pq writes")
    return data


def require_unchanged(folder: Path, data: Mapping[str, Any]) -> None:
    """VerifyError unless pq.json is byte for byte what pq wrote; `data` is its content."""
    path = folder / PROVENANCE
    if DIGEST not in data:
        raise VerifyError(f"{path}: has no '{DIGEST}', the digest of its own content")
    if provenance_digest(data) != data[DIGEST]:
        raise VerifyError(f"{path}: its content is not what its own '{DIGEST}' was taken of")
    if path.read_bytes() != canonical_json(data).encode("utf-8"):
        raise VerifyError(f"{path}: is formatted otherwise than pq writes it")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _origin(value: Any) -> bool:
    return value is None or (_texts(value) and {"id", "commit"} <= set(value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "pq": _text,
    "versions": _texts,
    "machine": _texts,
    "recipe": lambda value: _texts(value) and {"name", "resolved"} <= set(value),
    "source": _texts,
    "calibration": lambda value: value is None or isinstance(value, dict),
    "bits_per_weight": _number,
    "dropped_sequences": _number,
    "layers": lambda value: (
        isinstance(value, dict) and all(isinstance(facts, dict) for facts in value.values())
    ),
    "files": _texts,
}
