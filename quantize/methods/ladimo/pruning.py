"""Static structured pruning of an FFN: the baseline that a routed FFN has to beat at
equal activated parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.methods.ladimo.dense import Ffn


@dataclass(frozen=True)
class Pruned:
    """A smaller dense FFN with an output bias."""

    kept: Tensor
    """Neurons that stay, ascending."""
    bias: Tensor
    """[D]: mean output of those that went."""


def prune(ffn: Ffn, x: Tensor, keep: int) -> Pruned:
    """Keep the neurons whose output fluctuates most: FLAP's score Var(h)·‖w_d‖² and
    its bias (arXiv 2312.11983).

    x: inputs [M, D] of the FFN.
    """
    mean, variance = torch.zeros(2, ffn.neurons, dtype=torch.float64, device=x.device)
    for part in ffn.pieces(x):
        h = ffn.hidden(part).double()
        mean += h.sum(dim=0)
        variance += h.square().sum(dim=0)
    mean /= len(x)
    variance = variance / len(x) - mean.square()
    score = variance * ffn.down.double().square().sum(dim=0)
    kept = score.argsort(descending=True, stable=True)[:keep].sort().values
    gone = torch.ones_like(score, dtype=torch.bool)
    gone[kept] = False
    return Pruned(kept, (ffn.down[:, gone].double() @ mean[gone]).to(ffn.down.dtype))
