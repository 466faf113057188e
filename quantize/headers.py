"""What safetensors headers say about tensors, without reading any of their data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checkpoint import Checkpoint
from quantize.errors import ModelError


@dataclass(frozen=True)
class Header:
    """One tensor as its shard's header describes it."""

    dtype: str
    """Name in the safetensors format: BF16, F32, I32, F8_E4M3, …"""
    shape: tuple[int, ...]
    bytes: int


def tensor_headers(source: Checkpoint) -> dict[str, Header]:
    """Header of every tensor of a checkpoint by full name; ModelError for a shard that cannot be read."""
    out: dict[str, Header] = {}
    for shard in source.shards:
        for name, entry in _entries(source.folder / shard).items():
            if name in source:
                first, end = entry["data_offsets"]
                out[name] = Header(entry["dtype"], tuple(entry["shape"]), end - first)
    return out


def noted_shapes(source: Checkpoint, headers: Mapping[str, Header]) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears whose planes alone do not tell it, by full name, from the note beside them."""
    planes = [name.removesuffix(".weight_planes") for name in headers if name.endswith(".weight_planes")]
    notes = {name: headers.get(f"{name}.weight_shape") for name in planes}
    found = [n for n, note in notes.items() if note and (note.dtype, note.shape) == ("I64", (2,))]
    sizes = {name: source.tensor(f"{name}.weight_shape").tolist() for name in found}
    return {name: (N, K) for name, (N, K) in sizes.items()}


def _entries(path: Path) -> dict[str, Any]:
    # `Checkpoint` had the safetensors library check every header; the library does not tell byte ranges.
    try:
        with path.open("rb") as file:
            entries: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError) as err:
        raise ModelError(f"{path}: cannot be read ({err}); download it again") from None
    return entries
