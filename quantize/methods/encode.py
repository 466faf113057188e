"""Fields and checks that encode stages share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from quantize.block.exchange import keep_order, share_out
from quantize.block.measure import waits_for_experts
from quantize.block.moments import Moments, too_few
from quantize.block.teacher import freeze_layer
from quantize.cost.footprint import BlockSizes
from quantize.cost.peak import give_back
from quantize.errors import ModelError
from quantize.formats.grouping import FP8_TILE, WHOLE_ROW, fitting_group, shard_counts
from quantize.formats.packed_int import IntScheme, stored_bits
from quantize.formats.patterns import matches, problem_of
from quantize.methods.adaptation import (
    Group,
    fitting_schemes,
    fitting_stages,
    note_adaptation,
    require_as_asked,
)
from quantize.methods.base import Kind, Stage
from quantize.model.roles import splits_inputs
from quantize.solvers.feedback import Damped, damp, feedback_order
from quantize.solvers.grid import Grid
from quantize.solvers.products import quadratic
from quantize.solvers.target import LeftOut, corrected_target

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.model.arch import Architecture


class Encode(Stage):
    """Weights of the linears that patterns select, to a packed layout."""

    kind: ClassVar[Kind] = "encode"

    layers: tuple[str, ...] = ("*",)
    """Shell patterns of the linears to encode, matched against full names such as
    model.layers.0.mlp.down_proj; a regular expression after `re:`, matched from the name's
    beginning."""
    ignore: tuple[str, ...] = ()
    """Patterns of linears that stay 16-bit although `layers` matches them. Modules that no stage
    encodes (lm_head, routers) may be named and change nothing."""

    @field_validator("layers", "ignore")
    @classmethod
    def _can_be_used(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if problem := problem_of(pattern):
                raise ValueError(problem)
        return patterns

    def selects(self, name: str) -> bool:
        """Whether the stage encodes the linear with this full name."""
        return matches(name, self.layers) and not matches(name, self.ignore)

    def selection(self, block: Block) -> list[str]:
        """Linears of the block that the stage encodes, in the order in
        which the block computes them."""
        names = [name for group in block.arch.calibration_order for name in group]
        return [name for name in names if self.selects(block.full_name(name))]

    def apply(self, block: Block) -> None:
        """Encode the selected linears in the order in which the block computes them."""
        if self.needs_parent:
            freeze_layer(block)
        encoders = self.encoders(block)

        def encode(block: Block, names: Sequence[str], moments: Moments | None) -> None:
            stage, scheme = encoders[names[0]]
            stage.encode_group(block, names, moments)
            if scheme is not None:
                self.declare(block, names, scheme)

        order, noted = self.selection(block), list(block.report)
        for groups in self._waves(block):
            measured = [
                (names, encoders[names[0]].stage.measure(block, names[0])) for names in groups
            ]
            share_out(block, measured, encode)
            del measured
            give_back()
        keep_order(block, order, noted)

    def encoders(self, block: Block) -> Mapping[str, Encoder]:
        """What encodes every selected linear of a block; the same for all that share an input."""
        return dict.fromkeys(self.selection(block), Encoder(self, None))

    def declare(self, block: Block, names: Sequence[str], scheme: IntScheme) -> None:
        """Let linears that were just encoded say in which scheme they are."""

    def room(self, sizes: BlockSizes) -> int:
        """The largest linear's moments and fit."""
        taken, beside = [0], sizes.beside() if self.needs_parent else 0
        for group in sizes.groups:
            held = sizes.moment_bytes(group[0], self.needs_parent) if self.needs_inputs else 0
            if self.needs_inputs:
                measuring = sizes.measuring(group[0], self.needs_parent, self.rounds_inputs)
                taken.append(measuring + (sizes.weighing() if self.weighs_tokens else 0))
            if self.needs_parent and group[0] not in sizes.routed:
                taken.append(held + beside + sizes.correcting(group))
            taken += [held + beside + self.fitting(*sizes.linears[name]) for name in group]
        return max(taken)

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count by the attention that they receive."""
        return self.needs_inputs and getattr(self, "token_weights", "equal") != "equal"

    @property
    def rounds_inputs(self) -> bool:
        """Whether the layers will round their inputs to E4M3, and so
        must those that are measured."""
        return False

    @abstractmethod
    def fitting(self, N: int, K: int) -> int:
        """Bytes that one linear's fit takes at most beside its weight and
        the moments of its inputs."""

    @abstractmethod
    def stored_bits(self, N: int, K: int) -> float:
        """Bits of a weight in the checkpoint, all that belongs to it counted."""

    def schemes(
        self, arch: Architecture, linears: Mapping[str, tuple[int, int]]
    ) -> dict[str, IntScheme]:
        """How each of these linears of one block, relative name → [N, K], is packed and run, where
        shapes alone decide that; empty for other layouts."""
        return {}

    def _waves(self, block: Block) -> Iterator[list[list[str]]]:
        """Groups of linears that share an input, in the order in which the block computes them.

        Where several ranks work, as many routed experts come together: none
        changes what another one sees. Where passes wait for each expert, it comes with all its
        linears before the next one does.
        """
        wave: list[list[str]] = []
        for group in (
            block.arch.run_order if waits_for_experts(block) else block.arch.calibration_order
        ):
            names = [name for name in group if self.selects(block.full_name(name))]
            if not names:
                continue
            if wave and (len(wave) == block.ranks.size or not _alike(block, wave[-1][0], names[0])):
                yield wave
                wave = []
            wave.append(names)
        if wave:
            yield wave

    def measure(self, block: Block, name: str) -> Moments | None:
        """What must be known about the input of `name`; None where that is nothing.
        All ranks measure together."""
        return None

    def encode_group(self, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        """Encode linears that share one input: some of them, where other ranks encode the others.

        A stage that encodes the linears of a block together has an `apply` of its own instead.
        """
        raise NotImplementedError


class IntEncode(Encode):
    """Weights to grouped symmetric integers (`pack-quantized` layout)."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits of a weight code."""
    group_size: Group = 128
    """Consecutive inputs of one output row that share a scale; -1: the whole row."""
    activations: Literal["none", "fp8"] = "none"
    """`fp8`: dynamic per-token E4M3 activations (W4A8-FP8); `none`: 16-bit activations (W4A16)."""
    tensor_parallel: tuple[Literal[1, 2, 4, 8, 16], ...] = (1, 2, 4, 8)
    """Numbers of GPUs that may share a layer of `activations: fp8` and multiply the same weights:
    engines derive the factor of a row from the group scales that each GPU holds. 1 is always among
    them; those that would leave a GPU less than two whole groups of a row are left out."""
    strict: bool = False
    """Whether a linear that does not divide into groups, or into the tiles of `activations: fp8`,
    is refused. Else its group is the largest of 128, 64 and 32 below `group_size` that divides its
    inputs, or a whole row, and its activations stay 16-bit; the summary says so."""

    @model_validator(mode="after")
    def _kernel_exists(self) -> Self:
        if self.activations == "fp8" and (self.bits, self.group_size) != (4, FP8_TILE):
            raise ValueError(
                "activations: fp8 needs bits: 4 and group_size: 128, the only INT4×FP8 kernels "
                "there are"
            )
        return self

    @property
    def fp8(self) -> bool:
        """Whether activations are rounded to E4M3."""
        return self.activations == "fp8"

    @property
    def rounds_inputs(self) -> bool:
        """As `fp8`."""
        return self.fp8

    def grid(self, block: Block, name: str, **changes: bool) -> Grid:
        """The code book of a linear, its FP8 scales such as engines find again. changes: further
        fields of it."""
        group, K = self.group_size, block.linear(name).weight.shape[1]
        cut = splits_inputs(block.full_name(name)) and self.fp8
        shards = shard_counts(K // group, self.tensor_parallel) if cut else ()
        return Grid(self.bits, group, **{"fp8_scales": self.fp8, **changes}, shards=shards)

    def stored_bits(self, N: int, K: int) -> float:
        """Codes, and a 16-bit scale for each group."""
        return stored_bits(self.bits, fitting_group(self.group_size, [K]), K)

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """ModelError where the stage is strict or has an `apply` of its own, which takes what was
        asked for, for linears that cannot have it."""
        takes_groups = type(self).apply is Encode.apply
        if self.group_size == WHOLE_ROW and not takes_groups:
            raise ModelError(f"stage {self.method} takes no whole rows; set group_size to 128")
        if self.strict or not takes_groups:
            require_as_asked(self, {n: size for n, size in linears.items() if self.selects(n)})

    def schemes(
        self, arch: Architecture, linears: Mapping[str, tuple[int, int]]
    ) -> dict[str, IntScheme]:
        """As `fitting_schemes`."""
        return fitting_schemes(arch, linears, self.bits, self.group_size, self.fp8)

    def encoders(self, block: Block) -> Mapping[str, Encoder]:
        """The stage with the group and the activations that each linear can have."""
        found = fitting_stages(self, block, self.selection(block))
        return {name: Encoder(stage, scheme) for name, (stage, scheme) in found.items()}

    def declare(self, block: Block, names: Sequence[str], scheme: IntScheme) -> None:
        """Mark whole rows as such, and note what is not as this stage asks for it."""
        note_adaptation(self, block, names, scheme)


class Encoder(NamedTuple):
    """What encodes a linear: the stage, but for what the linear cannot have as it was asked for."""

    stage: Encode
    scheme: IntScheme | None
    """What the stage aims at; None where that follows from its own fields."""


def _alike(block: Block, name: str, other: str) -> bool:
    """Whether two linears are the same one of two routed experts."""
    routed = block.arch.is_routed(name) and block.arch.is_routed(other)
    return routed and block.arch.dense_name(name) == block.arch.dense_name(other)


def relative_error(
    original: Tensor,
    quantized: Tensor,
    hessian: Tensor | None = None,
    lost: float | None = None,
) -> float:
    """Squared error of a quantized weight [N, K] relative to the weight, in the
    Hessian's metric if one is given; lost: the squared error in that metric, where it is known.

    With H = E[x xᵀ] this is the mean squared output error of the layer
    over its mean squared output.
    """
    tiny = torch.finfo(torch.float32).tiny
    delta = quantized - original
    if hessian is None:
        return float(delta.square().sum() / original.square().sum().clamp_min(tiny))
    if lost is None:
        lost = float(quadratic(delta, hessian).sum())
    return lost / max(float(quadratic(original, hessian).sum()), tiny)


def take_targets(
    block: Block, names: Sequence[str], moments: Moments, usable: Damped
) -> dict[str, Tensor]:
    """What the fits of linears that share an input aim at, name → [N, K]: their weights themselves, or
    where the parent is known what repairs the drift from it, as far as tokens confirm it that it was
    not fitted to.

    Takes what `moments` has of the parent, of which a large layer has gigabytes.
    """
    windows = moments.windows
    left_out = None if windows is None else LeftOut.of(windows, moments.tokens, usable)
    known = moments.hessian, moments.cross, moments.wanted, usable, left_out
    corrects = moments.cross is not None or moments.wanted is not None
    targets = {}
    for name in names:
        weight = block.linear(name).weight.float()
        if not corrects:
            targets[name] = weight
            continue
        targets[name], share = corrected_target(weight, *known)
        if left_out is not None:
            block.note(name, confirmed_correction=share)
    moments.forget_parent()
    return targets


def note_errors(
    block: Block,
    name: str,
    original: Tensor,
    quantized: Tensor,
    hessian: Tensor | None = None,
    lost: float | None = None,
) -> None:
    """Record the weight error, and the output error where the inputs are known (`relative_error`)."""
    block.note(name, weight_error=relative_error(original, quantized))
    if hessian is not None:
        block.note(name, output_error=relative_error(original, quantized, hessian, lost))


def factor_hessian(
    block: Block,
    name: str,
    moments: Moments,
    damping: float,
    order: Literal["natural", "activation"] = "activation",
) -> Damped | str:
    """The Hessian of `name`, safe to factor, or why the linear cannot be fitted to its inputs."""
    if too_little := too_few(block.arch, name, moments):
        return too_little
    usable = damp(moments.hessian, damping, feedback_order(moments.hessian, order))
    return "Hessian is not finite or stays singular" if usable is None else usable


def fall_back(block: Block, name: str, grid: Grid, fp8: bool, reason: str) -> None:
    """Round a linear that cannot be fitted to its inputs, and say so in the report."""
    weight = block.linear(name).weight.float()
    quantized = encode_nearest(block, name, grid, True, fp8)
    block.note(name, fallback=f"{reason}: rounded to nearest")
    note_errors(block, name, weight, quantized)


def encode_nearest(block: Block, name: str, grid: Grid, clip: bool, fp8: bool) -> Tensor:
    """Round one linear to the nearest codes; returns the quantized weight [N, K]."""
    weight = block.linear(name).weight.float()
    scale, factor = grid.fit_scale(weight) if clip else grid.absmax_scale(weight)
    codes, quantized = grid.round(weight, scale, factor)
    block.encode(name, grid.held(codes, scale), fp8)
    return quantized
