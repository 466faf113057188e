"""A checkpoint that speaks in the names of the model's modules, each expert by itself.

Names and forms on disk are not those in memory: experts come one by one or stacked, in the words of
whoever published them, with and without prefixes. `StoredCheckpoint` follows transformers' own
conversion without reading, and then reads what is asked for and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.model.build import meta_model
from quantize.model.conversion import (
    Homes,
    loaded,
    owner_of,
    parts_of,
    published,
    published_names,
    split,
)
from quantize.model.experts import expert_layouts
from quantize.model.lazy import lazy, where
from quantize.model.leftovers import Leftovers, Place, leftovers_of
from quantize.model.output_names import OutputNames
from quantize.model.transformers_decoder import parts_of as decoder_parts
from quantize.model.transformers_names import Conversion
from quantize.model.transposed import transposed_weights
from quantize.model.where import Part, Where, fetch, names_in, whole

__all__ = ["StoredCheckpoint", "holds_block", "open_stored"]

_TORCH: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors names of dtypes → torch's."""


def open_stored(source: Checkpoint, dtype: torch.dtype) -> tuple[StoredCheckpoint, Any]:
    """A checkpoint by the names of its model's modules, and the model without weights that its
    config.json describes, experts stacked. ModelError as `meta_model` and `StoredCheckpoint`."""
    model = meta_model(source.folder, dtype)
    return StoredCheckpoint(source, model), model


def holds_block(source: Checkpoint, blocks: str, index: int) -> bool:
    """Whether a checkpoint has any tensor of a block, whatever prefixes its names have.

    blocks: name of the list of blocks, such as `model.layers`.
    """
    inside = f".{blocks.rpartition('.')[2]}.{index}."
    return any(inside in f".{name}" for name in source.shapes)


class StoredCheckpoint(Checkpoint):
    """A checkpoint by the names of a model's modules: `model.layers.0.mlp.experts.3.gate_proj`.

    source: what is on the disk. model: what config.json describes as transformers builds it, on the
    meta device, its experts stacked; it is not kept. Hashes, shards and side files are the source's.
    Stored tensors that the model has no place for are its `leftovers`; those of a packed model that
    do not go with it keep their names, so that checks see them.

    ModelError for experts that cannot be told apart, and for parts of a converted tensor that are
    missing or do not fit each other.
    """

    def __init__(self, source: Checkpoint, model: nn.Module) -> None:
        self.stored = source
        self.folder, self.config, self.shards = source.folder, source.config, source.shards
        self.dequantized, self.problems = source.dequantized, source.problems
        self.passed_over = source.passed_over
        self._layouts = layouts = expert_layouts(model)
        self._conversion = conversion = Conversion(model)
        self._transposed = transposed_weights(model)
        given = {
            name: lazy(name, shape, _TORCH.get(source.dtypes[name], torch.uint8))
            for name, shape in source.shapes.items()
        }
        try:
            tensors, unplaced = loaded(conversion, given)
            for name in self._transposed & set(tensors):
                tensors[name] = tensors[name].T
            held = {name: where(tensor) for name, tensor in tensors.items()}
            parts = split(held, layouts)
        except ModelError as err:
            raise ModelError(f"{source.folder}: {err}") from None
        self._expected = expected = parts_of(conversion, layouts)
        beside: dict[str, tuple[str, bool]] = {}
        if unplaced:
            homes = Homes(conversion, published_names(expected, self._form), expected)
            beside = {key: homes.name(key) for key in unplaced}
            if layouts and not all(is_part for _, is_part in beside.values()):
                beside |= self._as_written(parts, beside)
        self.leftovers = self._sort_out(model, beside)
        for key in (*self.leftovers.carried_names, *self.leftovers.ignored):
            beside.pop(key, None)
        self.notes = (
            *source.notes,
            *(f"{self.folder}: {line}" for line in self.leftovers.lines()),
        )
        self._places: dict[str, Where] = dict(parts)
        for key, (name, _) in beside.items():
            free = name if name not in self._places else key
            self._places[free] = whole(key, source.shapes[key])
        tied = conversion.tied
        self._name_embedding(model, tied)
        self.missing = tuple(
            name
            for name in expected
            if name not in self._places
            and not any(other in self._places for other in tied.get(name, ()))
        )
        """Tensors of the model that the checkpoint lacks, one that is tied to another apart; of
        a packed linear it lacks the weight."""
        self.surplus = tuple(key for key, (_, is_part) in beside.items() if not is_part)
        """Stored tensors that the model has no place for, by their names on the disk. Those of an
        INT4 cache are among them."""
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.dtypes = {name: self._dtype(place) for name, place in self._places.items()}
        places = self._places.items()
        self._where = {name: source._where[names_in(place)[0]] for name, place in places}

    def _as_written(
        self, parts: Mapping[str, Where], beside: Mapping[str, tuple[str, bool]]
    ) -> dict[str, tuple[str, bool]]:
        """Of tensors that belong nowhere those that bear the names under which experts are written,
        where nothing that is stored shows these (Step 3.7). parts: what has its place."""
        output = self._names_of(parts)
        written = {
            owner_of(output.name(name)): owner_of(name)
            for name in self._expected
            if any(name.startswith(f"{module}.") for module in self._layouts)
        }
        found = {}
        for key in (key for key, (_, is_part) in beside.items() if not is_part):
            owner, _, part = key.rpartition(".")
            if owner in written:
                found[key] = (f"{written[owner]}.{part}", True)
        return found

    def _name_embedding(self, model: nn.Module, tied: Mapping[str, Sequence[str]]) -> None:
        """Call a tensor that a tied model has stored for its head alone by the embedding's name, as
        transformers takes it for both."""
        parts = decoder_parts(model)
        head, embedding = f"{parts.head}.weight", f"{parts.embedding}.weight"
        is_tied = head in tied.get(embedding, ())
        if is_tied and embedding not in self._places and head in self._places:
            self._places[embedding] = self._places.pop(head)

    def _sort_out(self, model: nn.Module, beside: Mapping[str, tuple[str, bool]]) -> Leftovers:
        """What of the unplaced goes with the model or is ignored; of a packed model nothing is, as
        it must fit its config.json to the last tensor.

        beside: as `Homes.name` has them.
        """
        parts = decoder_parts(model)
        n_blocks = sum(1 for _ in model.get_submodule(parts.blocks).children())
        place = Place(parts.blocks, n_blocks, self._conversion.prefix, self._conversion.modules)
        found = leftovers_of({key: name for key, (name, _) in beside.items()}, place, self.config)
        plain = self.config.get("quantization_config") is None
        left = found.ignored if plain else ()
        return Leftovers(found.carried, tuple(sorted((*left, *self.passed_over))))

    def misfit(self) -> str | None:
        """What the model lacks here and what it has no place for, in one line; None where nothing.

        Tensors of the model have its names, stored ones those on the disk.
        """
        lines = [
            f"{said} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for said, names in (
                ("lacks", self.missing),
                ("has no place in the model for", self.surplus),
            )
            if names
        ]
        return f"{self.folder}: the checkpoint {' and '.join(lines)}" if lines else None

    def _dtype(self, place: Where) -> str:
        kinds = dict.fromkeys(self.stored.dtypes[name] for name in names_in(place))
        if len(kinds) > 1:
            raise ModelError(
                f"{self.folder}: {', '.join(names_in(place)[:2])} are of different dtypes "
                f"({', '.join(kinds)}), but are parts of one matrix"
            )
        return next(iter(kinds))

    def bytes_of(self, name: str) -> float:
        """As `Checkpoint.bytes_of`; of a part of a stored tensor, its share."""
        stored = names_in(self._places[name])
        held = sum(math.prod(self.stored.shapes[one]) for one in stored)
        share = min(1.0, math.prod(self.shapes[name]) / held) if held else 1.0
        return share * sum(map(self.stored.bytes_of, stored))

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """As `Checkpoint.rows`; of a stored tensor, whole entries of its first dimension are
        read."""
        self._place(name)
        place = self._places[name]
        if not place.shape or not 0 <= first < end <= place.shape[0]:
            raise ModelError(
                f"{self.folder}: {name} is {list(place.shape)} and has no entries {first} to {end}"
            )
        return fetch(place.sliced(0, first, end - first, 1), self._rows)

    def _rows(self, name: str, first: int | None, end: int | None) -> Tensor:
        if first is None or end is None:
            return self.stored.tensor(name)
        return self.stored.rows(name, first, end)

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            self._place(name)
            yield name, fetch(self._places[name], self._rows)

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """As `Checkpoint.as_stored`, where the tensor is stored as it stands."""
        place = self._places[name]
        return self.stored.as_stored(names_in(place)[0], tensor) if _is_stored(place) else tensor

    def entries(self) -> dict[str, dict[str, Any]]:
        """As `Checkpoint.entries`; data_offsets of what is a part of a stored tensor tell its
        size alone."""
        stored = self.stored.entries()
        out: dict[str, dict[str, Any]] = {}
        for name, place in self._places.items():
            known = stored.get(names_in(place)[0]) if _is_stored(place) else None
            size = math.prod(place.shape) * _TORCH.get(self.dtypes[name], torch.uint8).itemsize
            computed = {"dtype": self.dtypes[name], "shape": place.shape, "data_offsets": (0, size)}
            out[name] = known or computed
        return out

    def kept_names(self, modules: Sequence[str]) -> dict[str, str]:
        """Names on the disk of all that modules, and tensors, are stored as → under which names the
        same is written, in order; with what is carried over. What is stored as the model has it
        takes the names of the output, what transformers converts when it loads stays as it is."""
        out: dict[str, str] = {}
        for name in sorted(self._places):
            if any(name == module or name.startswith(f"{module}.") for module in modules):
                place = self._places[name]
                alike = _is_stored(place)
                out |= {n: self.output.name(name) if alike else n for n in names_in(place)}
        return out | {name: name for name in self.leftovers.carried_names}

    @property
    def carried_linears(self) -> tuple[str, ...]:
        """Stored names of what may be linears in modules that are carried over."""
        shapes = self.stored.shapes
        names = [n for n in self.leftovers.carried_names if n.endswith(".weight")]
        return tuple(owner_of(name) for name in names if len(shapes[name]) == 2)

    @cached_property
    def output(self) -> OutputNames:
        """Under which names a model made of this one is written."""
        return self._names_of(self._places)

    def _names_of(self, places: Mapping[str, Where]) -> OutputNames:
        stored = {n: names_in(place)[0] for n, place in places.items() if _is_stored(place)}
        # A tensor under the name of another is written by its own.
        stored = {n: s for n, s in stored.items() if s == n or s not in self._expected}
        parts, form = self._expected, self._form
        return OutputNames(
            self._conversion,
            self._layouts,
            parts,
            form,
            stored,
            self.stored.shapes,
            self._transposed,
        )

    @cached_property
    def _form(self) -> dict[str, Where]:
        return published(self._conversion)


def _is_stored(place: Where) -> bool:
    """Whether a tensor is stored as it stands."""
    return isinstance(place, Part) and isinstance(place.source, str) and place.is_whole
