"""What safetensors headers say about tensors, without reading any of their data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Header:
    """One tensor as its shard's header describes it."""

    dtype: str
    """Name in the safetensors format: BF16, F32, I32, F8_E4M3, …"""
    shape: tuple[int, ...]
    bytes: int


def tensor_headers(source: Checkpoint) -> dict[str, Header]:
    """Header of every tensor of a checkpoint by full name; ModelError for a
    shard that cannot be read."""
    out: dict[str, Header] = {}
    for name, entry in source.entries().items():
        first, end = entry["data_offsets"]
        out[name] = Header(entry["dtype"], tuple(entry["shape"]), end - first)
    return out


def noted_shapes(source: Checkpoint, headers: Mapping[str, Header]) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears whose packed tensors alone do not tell it, by full name, from the note
    beside them: bit planes fill whole words, and so do rows of codes that share one scale."""
    unclear = [
        name.removesuffix(".weight_planes") for name in headers if name.endswith(".weight_planes")
    ]
    if _has_whole_rows(source.config.get("quantization_config")):
        modules = [
            name.removesuffix(".weight_scale")
            for name, header in headers.items()
            if name.endswith(".weight_scale") and header.shape[1:] == (1,)
        ]
        unclear += [module for module in modules if f"{module}.weight_packed" in headers]
    notes = {name: headers.get(f"{name}.weight_shape") for name in unclear}
    found = [n for n, note in notes.items() if note and (note.dtype, note.shape) == ("I64", (2,))]
    sizes = {name: source.tensor(f"{name}.weight_shape").tolist() for name in found}
    return {name: (N, K) for name, (N, K) in sizes.items()}


def _has_whole_rows(section: Any) -> bool:
    """Whether some entry of config_groups gives a whole row one scale."""
    groups = section.get("config_groups") if isinstance(section, dict) else None
    entries = groups.values() if isinstance(groups, dict) else ()
    weights = [entry.get("weights") for entry in entries if isinstance(entry, dict)]
    return any(isinstance(one, dict) and one.get("strategy") == "channel" for one in weights)
