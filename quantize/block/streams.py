"""Hidden states of the calibration text on their way through the blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.errors import ModelError

log = logging.getLogger(__name__)


@dataclass
class Streams:
    """What enters the current block, batch by batch [B, T, D], in lists or in what `files.offload` has for them.

    `quantized` went through the already quantized blocks; `reference`, where a stage needs it, through the parent's.
    """

    quantized: MutableSequence[Tensor]
    reference: MutableSequence[Tensor] | None
    dropped: int = 0
    """Sequences left out so far because their hidden states were no longer finite."""

    def advance(self, block: Block) -> None:
        """Replace every batch by the block's outputs; a sequence with NaN or Inf leaves the calibration.

        ModelError when no sequence is left.
        """
        dropped_before = self.dropped
        quantized, reference = self.quantized, self.reference
        teacher = block.parent or block.reference or block.module
        for batch, outputs in enumerate(self._outputs(block, teacher)):
            finite = torch.stack([torch.isfinite(out).flatten(1).all(dim=1) for out in outputs]).all(dim=0)
            if not finite.all():
                self.dropped += int((~finite).sum())
                outputs = [out[finite] for out in outputs]
            quantized[batch] = outputs[0]
            if reference is not None:
                reference[batch] = outputs[1]
        for batch in reversed(range(len(quantized))):
            if not len(quantized[batch]):
                del quantized[batch]
                if reference is not None:
                    del reference[batch]
        if self.dropped > dropped_before:
            log.warning("block %d: %d sequences became non-finite", block.index, self.dropped - dropped_before)
        if not quantized:
            raise ModelError(f"block {block.index}: its outputs are not finite for any sequence; try --dtype float32")

    def _outputs(self, block: Block, teacher: nn.Module) -> Iterator[list[Tensor]]:
        """The outputs of both streams, batch by batch; every rank computes some and receives the others."""
        ranks, first = block.ranks, 0
        for own, present in ranks.rounds(len(self.quantized)):
            outputs = [block.forward(block.module, self.quantized[own])]
            if self.reference is not None:
                outputs.append(block.forward(teacher, self.reference[own]))
            for source in range(present):
                hidden, mine = self.quantized[first + source], source == ranks.rank
                yield [ranks.copied(out if mine else torch.empty_like(hidden), source) for out in outputs]
            first += present
