"""What linears get of an integer stage whose group or activations their sizes do not allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field

from quantize.errors import ModelError
from quantize.formats.grouping import ADAPTED, FP8_TILE, WHOLE_ROW, adaptation, fitting_group
from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.model.linear import PackedLinear
from quantize.model.roles import packed_alike

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.model.arch import Architecture


Group = Annotated[int, Field(ge=16, le=1024)] | Literal[-1]
"""Inputs that a recipe asks to share a scale; `WHOLE_ROW`: all of them."""


class Asking(Protocol):
    """An integer stage, as far as sizes may not allow what it asks for."""

    @property
    def group_size(self) -> int:
        """Inputs that are to share a scale; `WHOLE_ROW`: all of them."""

    @property
    def strict(self) -> bool:
        """Whether what does not fit is refused."""

    @property
    def fp8(self) -> bool:
        """Whether it rounds activations to E4M3."""

    def schemes(
        self, arch: Architecture, linears: Mapping[str, tuple[int, int]]
    ) -> dict[str, IntScheme]:
        """How each of these linears of one block, relative name → [N, K], is packed and run."""

    def model_copy(self: S, *, update: Mapping[str, Any]) -> S:
        """The stage with other fields."""


S = TypeVar("S", bound=Asking)


def require_as_asked(stage: Asking, linears: Mapping[str, tuple[int, int]]) -> None:
    """ModelError for the first of these linears, full name → [N, K], whose sizes do not allow what
    the stage asks for, with remedies that the stage takes and kernels multiply with."""
    common = fitting_group(stage.group_size, [K for _, K in linears.values()])
    nearest = f"{WHOLE_ROW} (a whole row)" if common is None else str(common)
    changes = [f"group_size to {nearest}"] if common != stage.group_size else []
    if common is None and not stage.strict:  # a stage of its own ways takes no whole rows
        changes = []
    elif stage.fp8:  # whose only group is 128
        changes.insert(0, "activations to none")
    other = " and ".join(changes)
    lenient = "strict to false" if stage.strict else ""
    settings = " or ".join(remedy for remedy in (other, lenient) if remedy)
    remedy = f"set {settings}, or add it to ignore" if settings else "add it to ignore"
    for name, (N, K) in linears.items():
        if K % stage.group_size:
            problem = f"{K} inputs are no multiple of the group {stage.group_size}"
        elif stage.fp8 and N % FP8_TILE:
            problem = f"{N} outputs are no multiple of {FP8_TILE}, which INT4×FP8 kernels need"
        else:
            continue
        raise ModelError(f"{name}: {problem}; {remedy}")


def fitting_schemes(
    arch: Architecture,
    linears: Mapping[str, tuple[int, int]],
    bits: int,
    group_size: int,
    fp8: bool,
) -> dict[str, IntScheme]:
    """How each of these linears of one block, relative name → [N, K], is packed and run.

    All that loaders want packed alike get the largest group that suits all of them, and E4M3
    activations only where all can have them. group_size, fp8: what is asked for.
    """
    out: dict[str, IntScheme] = {}
    for names in packed_alike(arch, linears):
        shapes = [linears[name] for name in names]
        group = fitting_group(group_size, [K for _, K in shapes])
        tiles = not any(N % FP8_TILE or K % FP8_TILE for N, K in shapes)
        out |= dict.fromkeys(names, IntScheme(bits, group, fp8 and tiles))
    return out


def fitting_stages(stage: S, block: Block, names: Sequence[str]) -> dict[str, tuple[S, IntScheme]]:
    """For each of these linears of a block the stage, with the group and the activations that the
    linear can have, and the scheme that it aims at."""
    shapes = {name: _shape(block, name) for name in names}
    made: dict[tuple[int, bool], S] = {(stage.group_size, stage.fp8): stage}
    out: dict[str, tuple[S, IntScheme]] = {}
    for name, scheme in stage.schemes(block.arch, shapes).items():
        group, fp8 = scheme.group(shapes[name][1]), scheme.fp8_activations
        if (group, fp8) not in made:
            changes = {"group_size": group, "activations": "fp8" if fp8 else "none"}
            made[group, fp8] = stage.model_copy(update=changes)
        out[name] = made[group, fp8], scheme
    return out


def note_adaptation(stage: Asking, block: Block, names: Sequence[str], scheme: IntScheme) -> None:
    """Mark whole rows of linears that were just encoded as such, and note what is not as `stage`
    asks for it."""
    lost_fp8 = stage.fp8 and not scheme.fp8_activations
    for name in names:
        packed = block.packed.get(name)
        if not isinstance(packed, PackedInt):  # a trial encodes pieces alone
            continue
        if scheme.group_size is None:
            linear = block.module.get_submodule(name)
            assert isinstance(linear, PackedLinear)
            linear.packed = block.packed[name] = replace(packed, channelwise=True)
        change = adaptation(packed.shape, stage.group_size, scheme.group_size, lost_fp8)
        if change:
            block.note(name, **{ADAPTED: change})


def _shape(block: Block, name: str) -> tuple[int, int]:
    """[N, K] of a linear, which may be put away or encoded already."""
    linear: Any = block.module.get_submodule(name)
    return linear.out_features, linear.in_features
