"""Weights against their code points, in units of their group's step."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.scheme import Packed

BINS = 96
"""Bins in all. With 4 bits nearly five of them lie between two codes, which shows how weights sit
around the codes; with 8 bits one holds several codes and only the outline is left."""
SPAN = 1.25
"""A histogram covers ± this times the most negative code: beyond it stand the few weights that a
group clips."""


def code_histogram(weight: Tensor, packed: Packed) -> Tensor:
    """Counts [96] of weight / mean step between codes, over ±1.25·2^(bits−1); what lies beyond is
    counted at the ends.

    weight: [N, K] as it was before rounding.
    """
    edge = SPAN * 2 ** (packed.bits - 1)
    step = packed.unit()
    # A group whose step is zero holds zeros.
    step = torch.where(step == 0, 1, step).repeat_interleave(packed.group_size, dim=1)[
        :, : weight.shape[1]
    ]
    position = weight.float() / step
    return torch.histc(position.clamp_(-edge, edge), bins=BINS, min=-edge, max=edge).long().cpu()
