"""The layer that a block learns from: the parent's own, kept from before the block is changed."""

from __future__ import annotations

from torch import nn

from quantize.block.block import Block


def teacher_of(block: Block) -> nn.Module:
    """The layer that the parent's stream goes on through: the oldest copy there is, else the block's own."""
    return block.parent or block.reference or block.module
