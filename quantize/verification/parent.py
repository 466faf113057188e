"""Comparing a conversion with the checkpoint it was made from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.conversion.conversion import Conversion
from quantize.conversion.plan import Decisions, Plan
from quantize.conversion.request import Request
from quantize.errors import VerifyError
from quantize.files.checkpoint import Checkpoint
from quantize.files.hub_origin import HubOrigin, hub_origin
from quantize.formats.kv4 import KV_TENSORS
from quantize.methods.basis import Basis
from quantize.model.arch import Architecture, Shape
from quantize.model.dequantized import open_source, require_source
from quantize.model.load import require_layers, shape_of
from quantize.model.skeleton import Skeleton
from quantize.model.stored import StoredCheckpoint, open_stored
from quantize.model.tied import settle_tie
from quantize.recipe.recipe import Recipe
from quantize.verification.checks import Skipped, summarize
from quantize.verification.layout import Layout

Tick = Callable[[int, int], None]
"""Called with (units done, units in all)."""


@dataclass(frozen=True)
class Parent:
    """An unquantized checkpoint that fits the architecture table."""

    source: StoredCheckpoint
    skeleton: Skeleton
    shape: Shape

    @property
    def arch(self) -> Architecture:
        """Its first block."""
        return self.skeleton.arch


def open_parent(folder: Path) -> Parent:
    """Open the checkpoint given as parent; ModelError when it cannot be one."""
    source = open_source(folder)
    require_source(source)
    shape = shape_of(source)
    require_layers(source, shape)
    stored, model = open_stored(source, torch.float32)
    skeleton = Skeleton(folder, torch.device("cpu"), torch.float32, model=model)
    return Parent(stored, skeleton, settle_tie(stored, skeleton.arch, shape))


def check_source(
    parent: Parent, recorded: Mapping[str, str], tick: Tick, origin: HubOrigin | None = None
) -> str:
    """pq.json's hashes of the source (file name → SHA-256) are those of the parent;
    VerifyError names what differs, and the parent on the Hub that pq.json names."""
    tick(0, 1)
    hashes = parent.source.hashes()
    changed = sorted(
        name for name in {*hashes, *recorded} if hashes.get(name) != recorded.get(name)
    )
    if changed:
        named = f" (it was made from {origin.id}@{origin.commit})" if origin else ""
        files, source = ", ".join(changed), parent.source.folder
        raise VerifyError(f"differ from those of {hub_origin(source) or source}: {files}{named}")
    return f"{len(hashes)} files of the parent are those that were converted"


def is_restructured(recipe: Recipe | None) -> bool:
    """Whether a recipe gives blocks another structure than the parent's."""
    return recipe is not None and any(stage.kind == "restructure" for stage in recipe.stages)


def implied_config(parent: Parent, recipe: Recipe | None) -> dict[str, Any]:
    """config.json that a recipe makes of the parent's, how it is packed left out."""
    stages = recipe.stages if recipe else ()
    config = Basis(stages).config(parent.source.config, parent.shape)
    for stage in stages:
        config = stage.config(config)
    return config


def check_untouched(layout: Layout, parent: Parent, recipe: Recipe | None, tick: Tick) -> str:
    """config.json and every tensor that no stage may change equal the parent's;
    VerifyError names what differs."""
    ours = {k: v for k, v in layout.source.config.items() if k != "quantization_config"}
    theirs = implied_config(parent, recipe)
    problems = [
        f"config.json: '{key}' is {ours.get(key)!r}, the parent implies {theirs.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    names = [name for name in layout.headers if not _may_change(name, layout, recipe)]
    for done, name in enumerate(names):
        tick(done, len(names))
        if name not in parent.source:
            # A container may have biases where its source has none.
            if not (
                name.endswith(".bias")
                and is_restructured(recipe)
                and not layout.source.tensor(name).any()
            ):
                problems.append(f"{name} is not in the parent")
        elif not same_bytes(
            layout.source.tensor(name), layout.source.as_stored(name, parent.source.tensor(name))
        ):
            problems.append(f"{name} differs from the parent's")
    problems += _carried_otherwise(layout.source, parent.source)
    if problems:
        raise VerifyError(summarize(problems))
    leftovers = parent.source.leftovers
    same = len(names) + len(leftovers.carried_names)
    return "; ".join([f"config.json and {same} tensors equal the parent's", *leftovers.lines()])


def _carried_otherwise(ours: StoredCheckpoint, theirs: StoredCheckpoint) -> list[str]:
    """What of the modules beside the model is not as in the parent, a line each."""
    mine, given = set(ours.leftovers.carried_names), set(theirs.leftovers.carried_names)
    lines = [f"{name} is not in the parent" for name in sorted(mine - given)]
    lines += [f"{name} of the parent is missing" for name in sorted(given - mine)]
    return lines + [
        f"{name} differs from the parent's"
        for name in sorted(mine & given)
        if not same_bytes(ours.stored.tensor(name), theirs.stored.tensor(name))
    ]


def _may_change(name: str, layout: Layout, recipe: Recipe | None) -> bool:
    """Whether a stage may have changed the tensor `name`: packed, or at a scale edge
    that smoothing moves over."""
    prefix = f"{layout.arch.blocks}."
    if name.rpartition(".")[0] in layout.schemes and not name.endswith(".bias"):
        return True
    turned = recipe is not None and Basis(recipe.stages).is_changed
    if not name.startswith(prefix):
        return turned
    index, _, local = name.removeprefix(prefix).partition(".")
    if recipe is not None and any(stage.rewrites(int(index), local) for stage in recipe.stages):
        return True
    if recipe is not None and all(
        stage.kind in ("restructure", "encode") for stage in recipe.stages
    ):
        return False
    arch = layout.skeleton.block_arch(int(index))
    scaled = {f"{edge.source}.{part}" for edge in arch.edges for part in ("weight", "bias")}
    if recipe is None or any(stage.kind == "cache" for stage in recipe.stages):
        # The pre-RoPE scale, and what the parent does not have: S, shifts and rotations.
        rotated = filter(None, (arch.find_role("q"), arch.find_role("k"), *(arch.qk_norm or ())))
        scaled |= {f"{name}.{part}" for name in rotated for part in ("weight", "bias")}
        scaled |= {f"{arch.attention}.{name}" for name in KV_TENSORS}
    if turned:
        scaled |= {f"{writer}.bias" for writer in arch.writers}
    return local in scaled | {f"{sink}.weight" for edge in arch.edges for sink in edge.sinks}


def check_recomputed(
    layout: Layout,
    parent: Parent,
    recipe: Recipe,
    provenance: Mapping[str, Any],
    blocks: Sequence[int],
    tick: Tick,
) -> str:
    """What needs no text, converted again from the parent, is bit for bit what is stored.

    That are blocks of a data-free recipe, and tensors outside the blocks that stages change.
    VerifyError names the tensors that differ. Skipped where there is neither, and where tensors
    differ but were converted with another torch or device, whose sums may round otherwise.
    """
    reads_text = any(stage.needs_inputs for stage in recipe.stages)
    turned = Basis(recipe.stages).is_changed
    if reads_text and not turned:
        raise Skipped(
            f"recipe {recipe.name} reads calibration text; only data-free recipes are computed "
            "again"
        )
    device = layout.skeleton.device
    dtype = getattr(torch, str(provenance["machine"].get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise VerifyError(
            f"pq.json's machine.dtype is {provenance['machine'].get('dtype')!r}, no dtype"
        )
    request = Request(parent.source.folder, recipe, layout.source.folder, device, dtype)
    skeleton = Skeleton(parent.source.folder, device, dtype)
    plan = Plan(request, parent.source, parent.arch, parent.shape, skeleton, Decisions(recipe))
    conversion = Conversion(plan)
    outside = _outside(conversion) if turned else []
    parts = [
        *outside,
        *(_Part.block(conversion, index) for index in ([] if reads_text else blocks)),
    ]
    problems = []
    for done, part in enumerate(parts):
        tick(done, len(parts))
        if wrong := part.different(layout.source):
            problems.append(f"{part.name} converted again differs in {summarize(wrong)}")
    if problems and (elsewhere := _elsewhere(provenance, device)):
        raise Skipped(
            f"{summarize(problems)}, but it was converted {elsewhere}, which may round otherwise"
        )
    if problems:
        raise VerifyError("; ".join(problems))
    return f"{', '.join(part.name for part in parts)} converted again from the parent: equal bit for bit"


@dataclass(frozen=True)
class _Part:
    """Tensors that are converted again together."""

    name: str
    prefixes: tuple[str, ...]
    """Of the names of its tensors."""
    convert: Callable[[], Mapping[str, Tensor]]

    @classmethod
    def block(cls, conversion: Conversion, index: int) -> _Part:
        prefix = f"{conversion.plan.arch.blocks}.{index}."
        return cls(f"block {index}", (prefix,), lambda: conversion.block(index, None))

    def different(self, stored: Checkpoint) -> list[str]:
        """Names of tensors that are not stored as they come out now, sorted."""
        again = self.convert()
        names = {name for prefix in self.prefixes for name in stored.names(prefix)} | set(again)
        return sorted(
            name
            for name in names
            if name not in again
            or name not in stored
            or not same_bytes(stored.tensor(name), stored.as_stored(name, again[name].cpu()))
        )


def _outside(conversion: Conversion) -> list[_Part]:
    arch = conversion.plan.arch
    groups = (arch.before, arch.after)
    return [
        _Part(
            names[-1],
            tuple(f"{name}." for name in names),
            partial(conversion.tensors_outside, *names),
        )
        for names in groups
    ]


def _elsewhere(provenance: Mapping[str, Any], device: torch.device) -> str:
    versions, machine = provenance["versions"], provenance["machine"]
    torch_then, device_then = versions.get("torch"), machine.get("device")
    here = (importlib.metadata.version("torch"), device.type)
    return "" if here == (torch_then, device_then) else f"with torch {torch_then} on {device_then}"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
