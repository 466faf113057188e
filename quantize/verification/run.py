"""The checks of a checkpoint in order; one that fails stops only those that build on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantize.errors import ModelError, RecipeError, VerifyError
from quantize.files.hashing import sha256_file
from quantize.files.hub_origin import origin_in
from quantize.files.provenance import PROVENANCE, read_provenance, require_unchanged
from quantize.files.side_files import is_recorded_name, names_in
from quantize.model.skeleton import Skeleton
from quantize.recipe.recipe import Recipe, parse_recipe
from quantize.verification.checks import Check, Skipped, run_check, summarize
from quantize.verification.kernels import check_kernels
from quantize.verification.layout import Layout, describe, read_layout
from quantize.verification.outputs import check_outputs
from quantize.verification.parent import (
    Parent,
    Tick,
    check_recomputed,
    check_source,
    check_untouched,
    implied_config,
    is_restructured,
    open_parent,
)
from quantize.verification.values import check_packing, check_values

Progress = Callable[[str, int, int], None]
"""Called with (what is being checked, units done, units in all)."""

_COPY = "copy the folder again, or convert again"
_CONVERT = "convert again from this parent"
REMEDIES: Mapping[str, str] = {
    "provenance": f"restore {PROVENANCE} from a copy, or convert again",
    "files": _COPY,
    "layout": _COPY,
    "values": _COPY,
    "packing": _COPY,
    "kernels": "run the kernels' tests on this machine (CONTRIBUTING.md), and report what fails",
    "source": "give the very model that was converted as --parent",
    "untouched": _CONVERT,
    "recomputed": _CONVERT,
    "outputs": f"{_CONVERT}; should that give the same, the recipe has too few bits",
}
"""What to do when the check of this name fails."""


@dataclass(frozen=True)
class Verification:
    """Outcome of all checks; field names are the keys of `pq verify --json`."""

    folder: str
    parent: str | None
    ok: bool
    """No check failed; skipped ones count for nothing."""
    checks: list[Check]

    @property
    def first_failure(self) -> str | None:
        """The first check that failed, what it found and the remedy, in one
        line; None when none did."""
        failed = next((check for check in self.checks if check.ok is False), None)
        return (
            None
            if failed is None
            else f"{self.folder}: {failed.name}: {failed.detail}; {REMEDIES[failed.name]}"
        )


def verify(
    folder: Path,
    parent: Path | None = None,
    blocks: int = 2,
    seed: int = 0,
    device: torch.device | None = None,
    kernels: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Verification:
    """Check a checkpoint's files, layout and numbers, and with `parent`
    that it stands for the parent.

    blocks: how many, drawn by `seed`, are computed again or run beside the parent's
    (at least 1). Memory holds one
    tensor, or one block of each. kernels: also run Triton's kernels on its tensors, on
    `device`. A checkpoint that pq did not write is checked as far as its config.json and
    tensors allow. Damage gives a failed check; ModelError only for a `folder` that is none, or
    a `parent` that cannot be one.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a folder that holds a converted model")
    run = _Run(
        folder,
        None if parent is None else open_parent(parent),
        blocks,
        seed,
        device or torch.device("cpu"),
        kernels,
    )
    checks: list[Check] = []
    for name, check in run.checks().items():
        tick: Tick = lambda done, total, name=name: progress(name, done, total)  # type: ignore[misc]  # noqa: E731
        checks.append(run_check(name, lambda check=check, tick=tick: check(tick)))  # type: ignore[misc]
    ok = all(check.ok is not False for check in checks)
    return Verification(str(folder), None if parent is None else str(parent), ok, checks)


class _Run:
    """What earlier checks found out for later ones."""

    def __init__(
        self,
        folder: Path,
        parent: Parent | None,
        blocks: int,
        seed: int,
        device: torch.device,
        kernels: bool,
    ) -> None:
        self.folder, self.parent, self.blocks, self.seed, self.device = (
            folder,
            parent,
            max(1, blocks),
            seed,
            device,
        )
        self.kernels = kernels
        self.by_pq = (folder / PROVENANCE).exists()
        self.provenance: dict[str, Any] | None = None
        self.recipe: Recipe | None = None
        self.layout: Layout | None = None

    def checks(self) -> dict[str, Callable[[Tick], str]]:
        """Checks by name, in order."""
        own: dict[str, Callable[[Tick], str]] = {
            "provenance": lambda tick: self._provenance(),
            "files": self._files,
            "layout": lambda tick: self._layout(),
            "values": lambda tick: check_values(self._fitting(), self.recipe, tick),
            "packing": lambda tick: check_packing(self._fitting(), tick),
        }
        if self.kernels:
            own["kernels"] = self._kernels
        if self.parent is None:
            return own
        return own | {
            "source": self._source,
            "untouched": lambda tick: check_untouched(
                self._fitting(), self._parent(), self.recipe, tick
            ),
            "recomputed": self._recompute,
            "outputs": self._outputs,
        }

    def _provenance(self) -> str:
        if not self.by_pq:
            raise Skipped(f"there is no {PROVENANCE}: pq did not write this model")
        self.provenance = read_provenance(self.folder)
        assert self.provenance is not None
        made_by = self.provenance["recipe"]
        require_unchanged(self.folder, self.provenance)
        try:
            self.recipe = parse_recipe(made_by["resolved"], f"{made_by['name']}.yaml")
        except RecipeError as err:
            raise VerifyError(
                f"{self.folder / PROVENANCE}: its recipe cannot be read ({err})"
            ) from None
        return f"{PROVENANCE} is as pq {self.provenance['pq']} wrote it, recipe {made_by['name']}"

    def _record(self) -> dict[str, Any]:
        if self.provenance is None:
            raise Skipped(f"{PROVENANCE} {'cannot be used' if self.by_pq else 'is absent'}")
        return self.provenance

    def _files(self, tick: Tick) -> str:
        recorded = self._record()["files"]
        problems, size = [], 0
        for done, (name, digest) in enumerate(sorted(recorded.items())):
            tick(done, len(recorded))
            path = self.folder / name
            if not is_recorded_name(name):
                problems.append(f"{PROVENANCE} names {name!r}, which is no plain file name")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif sha256_file(path) != digest:
                problems.append(f"{name} is not the file that was written")
            else:
                size += path.stat().st_size
        # Hidden files are what file managers and download tools leave; no loader reads them.
        there = names_in(self.folder)
        problems += [
            f"{name} does not belong here" for name in sorted(there - {PROVENANCE, *recorded})
        ]
        if problems:
            raise VerifyError(summarize(problems))
        return f"{len(recorded)} files, {size / 1e6:.1f} MB, are those that were written"

    def _layout(self) -> str:
        self.layout = read_layout(self.folder, self.by_pq, self.device)
        return describe(self.layout)

    def _fitting(self) -> Layout:
        if self.layout is None:
            raise Skipped(
                "config.json and tensors do not fit each other, or are of a kind that pq does not "
                "know"
            )
        return self.layout

    def _parent(self) -> Parent:
        """The parent, whose tensors must fit the child's architecture, or one that
        the recipe makes that of."""
        assert self.parent is not None
        parent = self.parent
        layout = self._fitting()
        skeleton = skeleton_of_child = layout.skeleton
        shape = replace(parent.shape, tied=layout.shape.tied)  # a stage may untie the head
        known = parent.skeleton.outer
        same = parent.arch == layout.arch
        if is_restructured(self.recipe):
            known = replace(known, model_type=implied_config(parent, self.recipe)["model_type"])
            same = True  # its blocks are others
            skeleton = Skeleton(parent.source.folder, skeleton.device, skeleton.dtype)
        if not same or (known, shape) != (skeleton_of_child.outer, layout.shape):
            raise VerifyError(f"{parent.source.folder} is a model of another architecture or size")
        skeleton.check(parent.source.shapes, parent.shape.tied)
        return parent

    def _source(self, tick: Tick) -> str:
        assert self.parent is not None
        record = self._record()
        return check_source(self.parent, record["source"], tick, origin_in(record))

    def _recompute(self, tick: Tick) -> str:
        layout, recorded = self._fitting(), self._record()
        if self.recipe is None:
            raise Skipped(f"the recipe in {PROVENANCE} cannot be used")
        return check_recomputed(
            layout, self._parent(), self.recipe, recorded, self._sample(layout), tick
        )

    def _outputs(self, tick: Tick) -> str:
        layout = self._fitting()
        layers = None if self.provenance is None else self.provenance["layers"]
        return check_outputs(
            layout, self._parent(), self.recipe, layers, self._sample(layout), self.seed, tick
        )

    def _kernels(self, tick: Tick) -> str:
        layout = self._fitting()
        return check_kernels(layout, self._sample(layout), self.seed, self.device, tick)

    def _sample(self, layout: Layout) -> list[int]:
        n = layout.shape.n_blocks
        return sorted(random.Random(self.seed).sample(range(n), min(self.blocks, n)))
