"""What a method is: the frozen pydantic model that its recipe stage builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from quantize.block import Block
    from quantize.pictures import Picture

Kind = Literal["restructure", "smooth", "cache", "encode", "refine"]
"""Order in a recipe: restructure* smooth* cache? encode* refine*, with a cache or an encode stage."""


class Stage(BaseModel):
    """One step of a recipe. Fields are the recipe's keys; `apply` changes one block in place.

    A stage never sees the whole model: `Block` holds one decoder layer's weights, its calibration
    inputs and what earlier stages did to it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    kind: ClassVar[Kind]
    method: str

    @property
    def needs_inputs(self) -> bool:
        """Whether the stage measures calibration activations; without any such stage no text is read."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether the stage aims at the parent's own outputs, whose activations are then carried along."""
        return False

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Refuse (ModelError) shapes [N, K] of full linear names that the stage cannot handle, before any work."""

    def apply(self, block: Block) -> None:
        """Transform `block` in place."""
        raise NotImplementedError

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """What the method adds to the report, drawn from the facts noted in `apply`: full layer or edge name → facts.

        Facts of other versions may lack any key; a picture without its facts is left out.
        """
        return ()
