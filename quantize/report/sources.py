"""Everything that lies in and beside a converted checkpoint, as far as it
is there and can be read."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.block.statistics import STATISTICS
from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint, read_json
from quantize.files.provenance import PROVENANCE, read_provenance
from quantize.formats.gguf.blocks import BLOCK, KINDS
from quantize.formats.gguf.blocks import SUFFIXES as BLOCK_SUFFIXES
from quantize.formats.registry import open_checkpoint, schemes_in
from quantize.formats.scheme import AnyScheme
from quantize.model.arch import Architecture, Shape
from quantize.model.load import shape_of
from quantize.model.skeleton import Skeleton
from quantize.model.stored import open_stored
from quantize.report.model import mapping

_LOG_TAIL = 1 << 20  # bytes; the summary is among a log's last lines
_SUMMARY = "summary {"
_PACKED = ".weight_shape"
_BLOCKS = tuple(f".{suffix}" for suffix in BLOCK_SUFFIXES)


@dataclass(frozen=True)
class Weights:
    """What config.json and the headers of the checkpoint say."""

    arch: Architecture
    shape: Shape
    linears: Sequence[str]
    """Full names of all linears of the blocks."""
    schemes: Mapping[str, AnyScheme]
    """Of every quantized linear, by full name."""
    parameters: int
    stored_bytes: int


@dataclass(frozen=True)
class Sources:
    """Parsed files; what is absent is empty or None."""

    folder: Path
    provenance: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]
    statistics: Mapping[str, Any] | None
    evaluations: Mapping[str, Mapping[str, Any]]
    """Perplexity evaluations by file name without its ending."""
    tasks: Mapping[str, Mapping[str, Any]]
    weights: Weights | None
    summary: Mapping[str, Any]
    """The conversion's own summary, from its log."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def command_path(self) -> str:
        """The folder as a shell takes it."""
        return shlex.quote(str(self.folder))


def beside(folder: Path, ending: str) -> Path:
    """Sibling of a checkpoint: DIR.eval, DIR.log, DIR.report.html."""
    # `.` and `..` have no name of their own; links keep theirs
    whole = Path(os.path.abspath(folder))
    return whole.with_name(whole.name + ending)


def read(folder: Path) -> Sources:
    """Read all there is. ModelError for a folder that pq did not write,
    or whose pq.json is broken."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give the output folder of pq convert")
    provenance = read_provenance(folder)
    if provenance is None:
        reason = f"has no {PROVENANCE}, so pq did not write it"
        raise ModelError(f"{folder}: {reason}; give the output folder of pq convert")
    notes: list[str] = []
    statistics = _optional(folder / STATISTICS, notes)
    saved: dict[str, dict[str, dict[str, Any]]] = {"perplexity": {}, "tasks": {}}
    for path in sorted(beside(folder, ".eval").glob("*.json")):
        if (data := _optional(path, notes)) is None:
            continue
        if data.get("kind") in ("perplexity", "tasks"):
            saved[data["kind"]][path.stem] = data
        else:
            notes.append(f"{path.name}: holds no evaluation")
    return Sources(
        folder=folder,
        provenance=provenance,
        layers=provenance["layers"],
        statistics=statistics,
        evaluations=saved["perplexity"],
        tasks=saved["tasks"],
        weights=_weights(folder, notes),
        summary=_summary(beside(folder, ".log")),
        notes=notes,
    )


def _optional(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except (ModelError, ValueError) as err:  # ValueError: an integer of thousands of digits
        notes.append(f"{path.name}: left out, it cannot be read ({err})")
        return None


def _weights(folder: Path, notes: list[str]) -> Weights | None:
    try:
        on_disk = open_checkpoint(folder)
        shape = shape_of(on_disk)
        source, model = open_stored(on_disk, torch.float32)
        skeleton = Skeleton(folder, torch.device("cpu"), torch.float32, model=model)
        arch = skeleton.arch
        packed = [
            name.rpartition(".")[0] for name in source.shapes if name.endswith((_PACKED, *_BLOCKS))
        ]
        schemes = schemes_in(mapping(source.config, "quantization_config"), packed)
        stored = sum((folder / shard).stat().st_size for shard in source.shards)
        rows = [skeleton.block_arch(index) for index in range(shape.n_blocks)]
        linears = [
            f"{arch.blocks}.{index}.{name}"
            for index, row in enumerate(rows)  # experts give each block its own
            for name in row.roles
        ]
        return Weights(arch, shape, linears, schemes, _parameters(source, schemes), stored)
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, OSError) as err:
        notes.append(
            f"The checkpoint itself cannot be read, its sizes and bits are left out ({err}).",
        )
        return None


def _parameters(source: Checkpoint, schemes: Mapping[str, AnyScheme]) -> int:
    """Number of weights; a packed linear says itself how many it has."""
    total = 0
    for name, shape in source.shapes.items():
        linear, _, suffix = name.rpartition(".")
        if linear not in schemes or suffix == "bias":
            total += math.prod(shape)
        elif suffix == _PACKED.removeprefix("."):
            total += math.prod(source.tensor(name).tolist())
        elif suffix in BLOCK_SUFFIXES:
            total += math.prod(shape) // KINDS[suffix.removeprefix("weight_")].bytes * BLOCK
    return total


def _summary(log: Path) -> Mapping[str, Any]:
    """The last `summary {…}` line of a conversion's log; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
        summaries = [line.partition(_SUMMARY)[2] for line in lines if _SUMMARY in line]
        data = json.loads(_SUMMARY[-1] + summaries[-1]) if summaries else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
