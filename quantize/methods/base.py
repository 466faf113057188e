"""What a method is: the frozen pydantic model that its recipe stage builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.block.block import Block
    from quantize.block.view import ModelView
    from quantize.cost.footprint import BlockSizes
    from quantize.model.arch import Architecture, Shape
    from quantize.pictures import Picture

Kind = Literal["restructure", "smooth", "cache", "encode"]
"""Order in a recipe: restructure* smooth* cache? encode*, with a restructure, a
cache or an encode stage."""


class Stage(BaseModel):
    """One step of a recipe. Fields are the recipe's keys; `apply` changes one block in place.

    A stage never sees the whole model: `Block` holds one decoder layer's weights, its calibration
    inputs and what earlier stages did to it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    kind: ClassVar[Kind]
    once: ClassVar[bool] = False
    """Whether a recipe may have the stage only once."""
    method: str

    @property
    def needs_plan(self) -> bool:
        """Whether `plan` must be called before the first block is transformed."""
        return False

    @property
    def needs_inputs(self) -> bool:
        """Whether the stage measures calibration activations; without any
        such stage no text is read."""
        return True

    @property
    def needs_parent(self) -> bool:
        """Whether the stage aims at the parent's own outputs, whose
        activations are then carried along."""
        return False

    @property
    def native_field(self) -> str | None:
        """The field that asks for what only `format: pq` can hold; None
        where every format will do."""
        return None

    @property
    def blocks_field(self) -> str | None:
        """The field that asks for llama.cpp's blocks, which only `format: gguf` can hold; None
        where it asks for none."""
        return None

    def needs_native(self, parent: Mapping[str, Any]) -> str | None:
        """Why only `format: pq` can hold what the stage makes of a model with this config.json, in
        a line with the remedy; None where every format will do."""
        return None

    @property
    def changes_basis(self) -> bool:
        """Whether the residual stream leaves the parent's basis: then a head cannot
        share the embedding's weight."""
        return False

    def to_basis(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] of the residual stream → the same in the basis in
        which the stage leaves it."""
        return hidden

    def from_basis(self, hidden: Tensor) -> Tensor:
        """Undo `to_basis`."""
        return hidden

    def outside(self, tensors: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
        """Tensors outside the blocks, by full name, as the stage leaves them; may work in place.

        The embedding comes alone, the final norm and the head (its own,
        where it was tied) together.
        """
        return tensors

    def plan(self, view: ModelView) -> tuple[Stage, dict[str, Any]]:
        """The stage with all settled that depends on the whole model, and facts
        about that for the provenance."""
        return self, {}

    def config(self, parent: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the output, given that of the model that the stage gets;
        ModelError where there is none."""
        return dict(parent)

    def rewrites(self, index: int, name: str) -> bool:
        """Whether the tensor `name` of block `index` is new, or other than a change
        of basis or scale makes it."""
        return False

    def linears(self, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Linears of the blocks after the stage: full name → [N, K], given those before it."""
        return dict(linears)

    def check_model(
        self, arch: Architecture, shape: Shape, linears: Mapping[str, tuple[int, int]]
    ) -> None:
        """Refuse (ModelError) a model that the stage cannot handle, before any
        work; linears as for `check`."""

    def check(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Refuse (ModelError) shapes [N, K] of full linear names that the stage
        cannot handle, before any work."""

    def apply(self, block: Block) -> None:
        """Transform `block` in place."""
        raise NotImplementedError

    def room(self, sizes: BlockSizes) -> int:
        """Bytes that `apply` takes at most, beside the block, its copies and the hidden states."""
        return sizes.forward()

    @property
    def tokens_read(self) -> int | None:
        """Calibration tokens that `apply` reads at most; None: all there are."""
        return None

    def for_trial(self, tokens: int) -> Stage:
        """The stage as a trial with only so many tokens runs it, whose time grows
        with the tokens as its own does.

        Nothing is searched in it that would need the whole model.
        """
        return self

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """What the method adds to the report, drawn from the facts noted in `apply`:
        full layer or edge name → facts.

        Facts of other versions may lack any key; a picture without its facts is left out.
        """
        return ()
