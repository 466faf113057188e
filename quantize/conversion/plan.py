"""What a conversion goes by: all that is settled before the first block is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from quantize.conversion.allocation import Allocation
from quantize.conversion.request import Request
from quantize.formats.kv4 import KvNumerics
from quantize.formats.output import OutputFormat
from quantize.formats.registry import FORMATS
from quantize.methods.basis import Basis
from quantize.methods.fireq.attention import FireqAttention
from quantize.model.arch import Architecture, Shape
from quantize.model.skeleton import Skeleton
from quantize.model.stored import StoredCheckpoint
from quantize.recipe.recipe import Recipe


@dataclass(frozen=True)
class Decisions:
    """What planning decided on. Plain data: a run that is taken up need not decide again."""

    recipe: Recipe
    """The request's, with all filled in that depends on the whole model."""
    allocation: Allocation | None = None
    """How a budget of bits is spent; None without one."""
    findings: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Method → what its planning measured, for the provenance."""


@dataclass(frozen=True)
class Plan:
    """One conversion: what is asked for, the model, and what was decided on."""

    request: Request
    source: StoredCheckpoint
    arch: Architecture
    shape: Shape
    skeleton: Skeleton
    decisions: Decisions

    @property
    def recipe(self) -> Recipe:
        """What becomes of the model."""
        return self.decisions.recipe

    @property
    def format(self) -> OutputFormat:
        """How the output is written."""
        return FORMATS[self.recipe.format]

    @cached_property
    def basis(self) -> Basis:
        """The basis that the recipe leaves the residual stream in."""
        return Basis(self.recipe.stages)

    @property
    def needs_decisions(self) -> bool:
        """Whether any stage must `plan` before the first block."""
        return any(stage.needs_plan for stage in self.recipe.stages)

    @property
    def attention(self) -> dict[str, Any] | None:
        """How attention works on its cache; None where it is left alone."""
        return next(
            (
                stage.as_json(self.format.keeps_post_scales)
                for stage in self.recipe.stages
                if isinstance(stage, FireqAttention)
            ),
            None,
        )

    def cache_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what the output holds of a block's INT4 cache, all float32, by name relative to the
        block; none where attention has no such cache or nothing of it is stored."""
        arch = self.skeleton.block_arch(index)
        rounding = self.attention if self.format.keeps_post_scales else None
        if rounding is None or arch.no_cache or arch.heads is None:
            return {}
        shape = self.skeleton.block_shape(index, self.shape)
        sizes = KvNumerics.from_json(rounding).tensors(shape.n_kv_heads, shape.head_dim)
        return {f"{arch.attention}.{name}": size for name, size in sizes.items()}

    def decide(self, **changes: Any) -> Plan:
        """The same plan with other decisions: fields of `Decisions`."""
        return replace(self, decisions=replace(self.decisions, **changes))
