"""What a conversion is at inside of a block, for those who watch it."""

from __future__ import annotations

from collections.abc import Callable

from quantize.block.block import Block
from quantize.methods.encode import Encode
from quantize.recipe.recipe import Recipe

Inside = Callable[[str, float], None]
"""Called with (stage, and behind it the linear that was just encoded; share of the block's linears
that are encoded so far)."""


class Watched:
    """Tells the stages of one block, and the linears that are encoded."""

    def __init__(self, recipe: Recipe, block: Block, tell: Inside) -> None:
        self._encoders = [stage for stage in recipe.stages if isinstance(stage, Encode)]
        self._block, self._tell = block, tell
        self._stage = ""
        self._done = self._all = 0
        block.tell = self._encoded

    def stage(self, method: str) -> None:
        """Say that a stage begins."""
        if not self._done:  # the stage before may have made other linears of them
            chosen = (name for stage in self._encoders for name in stage.selection(self._block))
            self._all = len(set(chosen))
        self._stage = method
        self._tell(method, self._share)

    @property
    def _share(self) -> float:
        return self._done / self._all if self._all else 0.0

    def _encoded(self, name: str) -> None:
        self._done += 1
        self._tell(f"{self._stage} {name}", self._share)
