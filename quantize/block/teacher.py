"""The layer that a block learns from: the parent's own, kept from before the block is changed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from quantize.block.block import Block
from quantize.files.offload import shared_copy


def freeze_layer(block: Block) -> None:
    """Keep a copy of the layer as it is now (smoothed, not quantized): the function that encode
    stages aim at.

    Only where the parent's hidden states are carried along; the first copy stays.
    """
    if block.frozen is None and block.parent_inputs is not None:
        block.frozen = shared_copy(block.module)
        attention = block.frozen.get_submodule(block.arch.attention)
        if hasattr(attention, "kv"):
            del attention.kv  # the parent's cache is not rounded


def keep_parent(block: Block) -> None:
    """Keep a copy of the layer as it came from the source, before it is restructured."""
    if block.parent is None and block.parent_inputs is not None:
        block.parent, block.parent_arch = shared_copy(block.module), block.arch


def teacher_of(block: Block) -> nn.Module:
    """The layer that the parent's stream goes on through: the oldest copy there is, else the
    block's own."""
    return block.parent or block.frozen or block.module


def teacher_outputs(block: Block) -> Iterator[Tensor]:
    """What the teacher makes of the hidden states that reach it, batch by batch [B, T, D].

    The parent's where they are carried along, else the block's own.
    """
    teacher = teacher_of(block)
    for hidden in block.parent_stream:
        yield block.forward(teacher, hidden)


def parent_outputs(block: Block, batch: int) -> Tensor:
    """The parent layer's outputs [B·T, D] for its own hidden states, in float32 (after
    `keep_parent`)."""
    assert block.parent is not None
    assert block.parent_inputs is not None
    return block.forward(block.parent, block.parent_inputs[batch]).flatten(0, -2).float()
