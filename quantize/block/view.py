"""What a stage that plans ahead sees of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantize.model.arch import Architecture, Shape
from quantize.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from quantize.block.block import Block


@dataclass(frozen=True)
class ModelView:
    """The parent, read block by block."""

    arch: Architecture
    shape: Shape
    sizes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor of the checkpoint by full name."""
    hidden: list[Tensor]
    """Hidden states [B, T, D] that enter block 0 on a sample of calibration text."""
    open: Callable[[int, MutableSequence[Tensor]], Block]
    """Loads a block with the hidden states that reach it."""
    log_probs: Callable[[Tensor], Tensor]
    """Hidden states [B, T, D] that leave the last block → log probabilities [B, T, V]."""
    progress: Callable[[str, int, int], None]
    """Called with (what is being done, blocks done, blocks in all)."""
    ranks: Ranks = ALONE
    """The processes that plan together."""
