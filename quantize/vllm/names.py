"""Names of linears in config.json, and what vLLM's model calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLASS = "Linear"
"""A target that is no name: all linears."""


def renamed(name: str, mapper: Any) -> str:
    """What a model of vLLM calls `name`; itself where its mapper drops it."""
    found: str | None = None if name == _CLASS else mapper.map_name(name)
    return name if found is None else found


def renamed_groups(section: Mapping[str, Any], mapper: Any) -> dict[str, Any]:
    """A quantization_config whose groups and exceptions have vLLM's names."""
    groups = {
        key: {**group, "targets": [renamed(target, mapper) for target in group["targets"]]}
        for key, group in section["config_groups"].items()
    }
    ignored = [renamed(name, mapper) for name in section.get("ignore", ())]
    return {**section, "config_groups": groups, "ignore": ignored}


def parts_of(prefix: str, packed: Mapping[str, list[str]]) -> list[str]:
    """Full names of the linears of the checkpoint that the linear `prefix` of vLLM is made of."""
    place, _, last = prefix.rpartition(".")
    stem = f"{place}." if place else ""
    return [f"{stem}{part}" for part in packed.get(last, [last])]
