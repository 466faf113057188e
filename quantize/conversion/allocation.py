"""Mixed precision under a budget: which linears get 8 bits, by the error that
rounding each one alone causes.

Every linear is rounded alone, at each number of bits that it may get, and the error is measured
where its block ends, on the parent's hidden states. The choice with the least total error within
the budget is then written into the recipe as layer patterns, so that whatever reads a recipe
needs to know nothing of budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantize.block.walk import Route, Streams, walk
from quantize.conversion.allocation_groups import expert_patterns, place_of, tied_groups
from quantize.conversion.sensitivity import sensitivities
from quantize.errors import UsageError
from quantize.formats.packed_int import IntScheme
from quantize.methods.encode import IntEncode
from quantize.parallel.ranks import ALONE, Ranks
from quantize.recipe.recipe import Recipe
from quantize.solvers.knapsack import knapsack, total

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.model.arch import Architecture

SAMPLE_TOKENS = 4096
"""Calibration tokens that sensitivities are measured on: means over tokens
settle long before Hessians do. More would make the search slower, in proportion."""

_SMOOTHED = "smoothed"
"""The stream through the parent's blocks, after the stages that move scales."""

OpenBlock = Callable[[int, MutableSequence[Tensor]], "Block"]
"""Loads block `index` with the hidden states [B, T, D] that reach it."""


@dataclass(frozen=True)
class Allocation:
    """The choice, and the recipe that makes it."""

    recipe: Recipe
    target: float
    bits_per_weight: float
    """Mean stored bits over the linears of integer encode stages, scales
    counted; at most the target."""
    error: float
    """Sum of the measured errors at the chosen bits."""
    bits: Mapping[str, int]
    """By full name."""
    errors: Mapping[str, Mapping[int, float]]
    """Full name → bits → error at the block's output, relative to it (see `sensitivities`)."""
    promoted: tuple[str, ...]
    """Linears that got more bits than their stage's own."""

    def as_json(self) -> dict[str, Any]:
        """The provenance's `allocation`."""
        return {
            "target_bpw": self.target,
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "linears": {
                name: {"bits": bits, "errors": {str(b): e for b, e in self.errors[name].items()}}
                for name, bits in self.bits.items()
            },
        }


@dataclass(frozen=True)
class Space:
    """What may be chosen for one model under one recipe."""

    recipe: Recipe
    target: float
    shapes: Mapping[str, tuple[int, int]]
    """[N, K] of every linear that an integer encode stage takes, by full name."""
    stages: Mapping[str, int]
    """Full name → index of the stage that takes it."""
    groups: tuple[tuple[str, ...], ...]
    """Linears that must get the same bits."""
    own: Mapping[str, IntScheme]
    """Full name → what its stage makes of it."""
    candidates: tuple[int, ...] = (8,)
    """Bits that a linear may get instead of its stage's own, if more than these."""
    experts: Mapping[str, set[str]] = field(default_factory=dict)
    """Layer pattern of a block's routed experts → all linears of the model that it matches."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        arch: Architecture,
        shapes: Mapping[str, tuple[int, int]],
        target: float,
        candidates: tuple[int, ...] = (8,),
        tie_inputs: bool = True,
    ) -> Space:
        """Read the linears (full name → [N, K]) that `recipe` encodes to integers.

        tie_inputs: linears that share an input get the same bits, for kernels
        that fuse them into one matrix.
        Raises UsageError where there is nothing to choose or no choice comes
        to `target` bits per weight.
        """
        taken: dict[str, int] = {}
        for name in shapes:
            for index, stage in enumerate(recipe.stages):
                if isinstance(stage, IntEncode) and stage.selects(name):
                    taken[name] = index
                    break
        if not taken:
            raise UsageError(
                f"target_bpw {target:g}: recipe '{recipe.name}' has no integer encode stage whose "
                "bits could be chosen; add one (rtn, gptq, fireq) or leave the target out"
            )
        groups = tuple(tied_groups(arch, taken, tie_inputs))
        space = cls(
            recipe,
            target,
            {n: shapes[n] for n in taken},
            taken,
            groups,
            _own_schemes(recipe, arch, shapes, taken),
            candidates,
            expert_patterns(arch, shapes),
        )
        lowest = space.bits_per_weight([0] * len(groups))
        highest = space.bits_per_weight([-1] * len(groups))
        if not lowest <= target <= highest:
            # Rounded inwards, so that both ends can be given as they are shown.
            low = math.ceil(lowest * 1000) / 1000
            high = math.floor(highest * 1000) / 1000
            raise UsageError(
                f"target_bpw {target:g} is out of reach: recipe '{recipe.name}' on this model "
                f"takes {low:g} to {high:g} bits per weight, scales counted; give a target in "
                "this range"
            )
        return space

    @property
    def weights(self) -> int:
        """Weights that the budget counts."""
        return sum(N * K for N, K in self.shapes.values())

    def schemes(self, name: str) -> tuple[IntScheme, ...]:
        """Ways to round a linear, the stage's own first, then by bits."""
        own = self.own[name]
        more = sorted(bits for bits in set(self.candidates) if bits > own.bits)
        return own, *(IntScheme(bits, own.group_size, False) for bits in more)

    def bits_per_weight(self, picks: Sequence[int]) -> float:
        """Mean stored bits where group i gets its schemes[picks[i]]."""
        return (
            sum(costs[pick] for costs, pick in zip(self.costs(), picks, strict=True)) / self.weights
        )

    def costs(self) -> list[list[int]]:
        """Stored bits of every group under each of its schemes."""
        return [
            [sum(costs) for costs in zip(*(self._costs(name) for name in group), strict=True)]
            for group in self.groups
        ]

    def measure(
        self,
        open_block: OpenBlock,
        blocks: int,
        hidden: list[Tensor],
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        ranks: Ranks = ALONE,
    ) -> dict[str, dict[int, float]]:
        """Full name → bits → `sensitivities`, with the hidden states [B, T, D] that
        enter block 0 of the parent."""
        out: dict[str, dict[int, float]] = {}
        streams = Streams({_SMOOTHED: list(hidden)}, ranks)

        def open_next(index: int) -> Block:
            progress("measuring", index, blocks)
            return open_block(index, streams.batches[_SMOOTHED])

        def visit(block: Block) -> Mapping[str, Route[str]] | None:
            for stage in self.recipe.stages:
                # what makes linears easier to round, never the cache
                if stage.kind in ("restructure", "smooth"):
                    stage.apply(block)
            out.update(self._sensitivities(block))
            if block.index + 1 == blocks:
                return None
            return {_SMOOTHED: (_SMOOTHED, block.passes.finish)}

        walk(streams, range(blocks), open_next, visit)
        return out

    def _sensitivities(self, block: Block) -> dict[str, dict[int, float]]:
        """Full name → bits → error, of the linears of one block whose bits may be chosen."""
        names = [name for group in block.arch.calibration_order for name in group]
        schemes = {
            name: self.schemes(full)
            for name in names
            if (full := block.full_name(name)) in self.shapes
        }
        return {
            block.full_name(name): errors for name, errors in sensitivities(block, schemes).items()
        }

    def choose(self, errors: Mapping[str, Mapping[int, float]]) -> Allocation:
        """Spend the budget where it lowers the total error most.
        errors: as `measure` gives them."""
        costs = self.costs()
        by_group = [self._group_errors(group, errors) for group in self.groups]
        # A target like 4.2 has no exact float; the budget is a whole number of bits.
        picks = knapsack(costs, by_group, math.floor(self.target * self.weights + 1e-6))
        bits: dict[str, int] = {}
        for group, pick in zip(self.groups, picks, strict=True):
            bits |= {name: self.schemes(name)[pick].bits for name in group}
        stages: list[Any] = []
        for index in range(len(self.recipe.stages)):
            of_stage = {name: bits[name] for name, at in self.stages.items() if at == index}
            stages += self._split(index, of_stage)
        return Allocation(
            recipe=self.recipe.model_copy(update={"stages": tuple(stages), "target_bpw": None}),
            target=self.target,
            bits_per_weight=self.bits_per_weight(picks),
            error=total(by_group, picks),
            bits={name: bits[name] for name in self.shapes},
            errors=errors,
            promoted=tuple(name for name in self.shapes if bits[name] != self._stage(name).bits),
        )

    def _group_errors(
        self, group: Sequence[str], errors: Mapping[str, Mapping[int, float]]
    ) -> list[float]:
        """Error of a group under each of its schemes: the sum over its linears."""
        out = []
        for row in zip(*(self.schemes(name) for name in group), strict=True):
            pairs = zip(group, row, strict=True)
            out.append(math.fsum(errors[name][scheme.bits] for name, scheme in pairs))
        return out

    def _stage(self, name: str) -> IntEncode:
        stage = self.recipe.stages[self.stages[name]]
        assert isinstance(stage, IntEncode)
        return stage

    def _costs(self, name: str) -> list[int]:
        N, K = self.shapes[name]
        return [round(scheme.stored_bits(N, K) * N * K) for scheme in self.schemes(name)]

    def _split(self, index: int, bits: Mapping[str, int]) -> Iterator[Any]:
        """A stage as it is for the linears that keep its bits, then a copy for each
        number of bits that others got.

        The copies come last: hardly anything changes for the linears before them,
        and they repair their errors.
        """
        stage = self.recipe.stages[index]
        moved = [name for name in bits if bits[name] != self._stage(name).bits]
        if not moved:
            yield stage
            return
        if len(moved) < len(bits):
            yield _replace(stage, ignore=(*self._stage(moved[0]).ignore, *self._patterns(moved)))
        for more in sorted({bits[name] for name in moved}):
            names = self._patterns([name for name in moved if bits[name] == more])
            # INT8 weights have kernels for 16-bit activations only.
            yield _replace(stage, bits=more, activations="none", layers=names, ignore=())

    def _patterns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names, but one pattern for all experts of a block where all are among
        them: a model has thousands."""
        whole = {
            name: pattern
            for pattern, inside in self.experts.items()
            if inside <= set(names)
            for name in inside
        }
        return tuple(dict.fromkeys(whole.get(name, name) for name in names))


def _own_schemes(
    recipe: Recipe,
    arch: Architecture,
    shapes: Mapping[str, tuple[int, int]],
    taken: Mapping[str, int],
) -> dict[str, IntScheme]:
    """Full name → how its stage packs it. taken: full name → index of the stage."""
    blocks: dict[tuple[int, str], dict[str, str]] = {}
    for name, index in taken.items():
        block, inside = place_of(arch, name)
        blocks.setdefault((index, block), {})[inside] = name
    out: dict[str, IntScheme] = {}
    for (index, _), names in blocks.items():
        stage: Any = recipe.stages[index]
        linears = {inside: shapes[name] for inside, name in names.items()}
        found = stage.schemes(arch, linears)
        out |= {names[inside]: scheme for inside, scheme in found.items()}
    return out


def _replace(stage: Any, **fields: Any) -> Any:
    """A stage with other fields, which are checked as those of a recipe are."""
    return type(stage).model_validate(
        {key: getattr(stage, key) for key in type(stage).model_fields} | fields
    )
