"""The basis that a recipe leaves the residual stream in, and what follows for
tensors outside the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantize.methods.base import Stage
from quantize.model.arch import Architecture, Shape
from quantize.model.tied import untied


@dataclass(frozen=True)
class Basis:
    """What the stages of a recipe do to the residual stream together."""

    stages: Sequence[Stage]

    @property
    def is_changed(self) -> bool:
        """Whether it is not the parent's."""
        return any(stage.changes_basis for stage in self.stages)

    def enter(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] of the parent → the same in this basis."""
        for stage in self.stages:
            hidden = stage.to_basis(hidden)
        return hidden

    def leave(self, hidden: Tensor) -> Tensor:
        """Undo `enter`."""
        for stage in reversed(self.stages):
            hidden = stage.from_basis(hidden)
        return hidden

    def outside(self, tensors: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
        """Tensors outside the blocks after all stages (see `Stage.outside`)."""
        for stage in self.stages:
            tensors = stage.outside(tensors, arch)
        return tensors

    def unties(self, shape: Shape) -> bool:
        """Whether a head that shares the parent's embedding gets a weight of its own."""
        return shape.tied and self.is_changed

    def config(self, parent: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
        """config.json of the parent as it has to read for the output."""
        if not self.unties(shape):
            return dict(parent)
        return untied(parent)
