"""Everything that lies in and beside a converted checkpoint, as far as it
is there and can be read."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.block.statistics import STATISTICS
from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint, read_json
from quantize.files.headers import tensor_headers
from quantize.files.hub_origin import origin_in
from quantize.files.provenance import PROVENANCE, read_provenance
from quantize.formats.gguf.blocks import BLOCK, KINDS
from quantize.formats.gguf.blocks import SUFFIXES as BLOCK_SUFFIXES
from quantize.formats.registry import open_checkpoint, schemes_in
from quantize.formats.scheme import AnyScheme
from quantize.inspect.engines import Loadings, loadings
from quantize.model.arch import Architecture, Shape
from quantize.model.load import shape_of
from quantize.model.skeleton import Skeleton
from quantize.model.stored import open_stored
from quantize.pictures import fold_numbers, place_of
from quantize.report.model import items, mapping, text

_LOG_TAIL = 1 << 20  # bytes; the summary is among a log's last lines
_SUMMARY = "summary {"
_LOG_HEAD = 1 << 16  # bytes; the command is among a log's first lines
_STARTED = "started {"
_MOST = 24  # conversions beside; a picture of more names cannot be read
CODES, SCALES, UNPACKED = "codes", "scales and notes", "16 bits or more"
REST = "norms and all else"
_CODES = ("weight", "weight_packed", "weight_planes", *BLOCK_SUFFIXES)
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
    parts: Mapping[str, Mapping[str, int]]
    """Part of the model (a linear's name in its block, embedding, head, the rest) → kind of what is
    stored (codes, scales and notes, 16 bits) → bytes."""


@dataclass(frozen=True)
class Other:
    """A conversion that lies beside the one that is reported on."""

    name: str
    evaluations: Sequence[Mapping[str, Any]]


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
    started: Mapping[str, Any]
    """argv and cwd of the command that converted, from its log."""
    loads: Loadings | None
    others: Sequence[Other]
    """Conversions that lie beside, with an evaluation."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    @property
    def command_path(self) -> str:
        """The folder as a shell takes it."""
        return shlex.quote(str(self.folder))

    @property
    def new_path(self) -> str:
        """A folder beside this one as a shell takes it, for another conversion."""
        return shlex.quote(str(beside(self.folder, "-anew")))

    @property
    def parent_path(self) -> str:
        """The parent as a shell takes it: its id on the Hub, the folder that the conversion's log
        names, else a path that ends in the name that an evaluation has."""
        if origin := origin_in(self.provenance):
            return shlex.quote(f"{origin.id}@{origin.commit}")
        if found := _model_in(self.started):
            return shlex.quote(found)
        names = {text(data, "baseline") for data in self.evaluations.values()} - {""}
        return shlex.quote(f"path/to/{names.pop() if len(names) == 1 else 'parent'}")


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
        started=_started(beside(folder, ".log")),
        loads=_loads(folder, notes),
        others=_others(folder),
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
        known = {arch.embedding: "embedding", arch.head: "head"}
        parts = _parts(source, {*linears, *schemes}, schemes, known)
        count = _parameters(source, schemes)
        return Weights(arch, shape, linears, schemes, count, stored, parts)
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


def _parts(
    source: Checkpoint,
    linears: Collection[str],
    schemes: Mapping[str, AnyScheme],
    known: Mapping[str, str],
) -> dict[str, dict[str, int]]:
    """Bytes by part and kind. known: full name → what it is called."""
    out: dict[str, dict[str, int]] = {}
    for name, header in tensor_headers(source).items():
        module, _, suffix = name.rpartition(".")
        place = place_of(module)
        part = known.get(module, REST)
        if module in linears and module not in known and place is not None:
            part = fold_numbers(place[1])
        kind = UNPACKED
        if module in schemes and suffix != "bias":
            kind = CODES if suffix in _CODES else SCALES
        sizes = out.setdefault(part, {})
        sizes[kind] = sizes.get(kind, 0) + header.bytes
    return out


def _loads(folder: Path, notes: list[str]) -> Loadings | None:
    try:
        return loadings(folder)
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, OSError) as err:
        notes.append(f"Which engines load it cannot be told ({err}).")
        return None


def _others(folder: Path) -> list[Other]:
    """Conversions in the folders beside, as far as they and their evaluations can be read."""
    whole = Path(os.path.abspath(folder))
    found: list[Other] = []
    try:
        siblings = sorted(path for path in whole.parent.iterdir() if path != whole)
    except OSError:
        return []
    for path in siblings:
        if len(found) >= _MOST or not (path / PROVENANCE).is_file():
            continue
        evaluations: list[Mapping[str, Any]] = []
        for saved in sorted(beside(path, ".eval").glob("*.json")):
            data = _optional(saved, [])
            if data is not None and data.get("kind") == "perplexity":
                evaluations.append(data)
        if evaluations:
            found.append(Other(path.name, evaluations))
    return found


def _model_in(started: Mapping[str, Any]) -> str | None:
    """The model that a command of pq convert names, from whatever folder it was given; None where
    it names none."""
    argv = [word for word in items(started, "argv") if isinstance(word, str)]
    for word, value in itertools.pairwise([*argv, ""]):
        name, equals, given = word.partition("=")
        model = given if equals else value
        if name in ("--model", "-m") and model:
            there = os.path.join(text(started, "cwd", "."), os.path.expanduser(model))
            return there if os.path.isdir(there) else model
    return None


def _started(log: Path) -> Mapping[str, Any]:
    """What the first `started {…}` line of a conversion's log says; empty when there is none."""
    try:
        with log.open("rb") as file:
            lines = file.read(_LOG_HEAD).decode("utf-8", "replace").splitlines()
        line = next((line for line in lines if _STARTED in line), "")
        data = json.loads(_STARTED[-1] + line.partition(_STARTED)[2]) if line else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


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
