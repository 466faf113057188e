"""Plain-torch twin of the experts kernels: slow, short, and what they are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_experts_reference(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What `quantize.kernels.experts.api.routed_experts` computes with SiLU, in float64:
    all experts for all tokens."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e, (above, below) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = (x.double() @ above.double().T).chunk(2, dim=1)
        y += weights[:, e, None].double() * (F.silu(gate) * up @ below.double().T)
    return y
