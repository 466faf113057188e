"""Linears whose outputs go through a norm of their own before they are added to the residual stream
(Gemma 2 and 3, OLMo 2, GLM-4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LEAST_GAIN = 0.05
"""Of the gains' root mean square: a channel that the norm nearly switches off repairs nothing."""
_SAME = 1e-3


@dataclass(frozen=True)
class PostNorm:
    """A norm y → g·y / rms(y) with gains g [N]."""

    gains: Tensor

    @classmethod
    def of(cls, norm: nn.Module, N: int) -> PostNorm | None:
        """What a module is; None where it is another function."""
        like = next(norm.parameters(), torch.empty(0))
        ones = torch.ones(1, N, dtype=like.dtype, device=like.device)
        trial = torch.linspace(-1, 2, N, dtype=like.dtype, device=like.device)[None]
        with torch.no_grad():
            gains, found = (norm(x).float()[0] for x in (ones, trial))
        wanted = gains * trial[0].float() / trial.float().square().mean().sqrt()
        if not (found - wanted).norm() <= _SAME * wanted.norm():
            return None
        return cls(gains)

    def sizes(self, outputs: Tensor) -> Tensor:
        """rms(y) of every token of y [M, N] → [M, 1]."""
        rms = outputs.square().mean(dim=1, keepdim=True).sqrt()
        finite = rms[rms.isfinite()]  # a token that overflowed leaves the others alone
        return rms.clamp_min(1e-6 * float(finite.detach().mean()) + 1e-30 if len(finite) else 1e-30)

    def before(self, missing: Tensor, sizes: Tensor) -> Tensor:
        """What must be added to outputs [M, N] of these sizes [M, 1] for `missing` [M, N] to be
        added behind the norm, were their sizes to stay."""
        least = _LEAST_GAIN * self.gains.square().mean().sqrt()
        gains = torch.copysign(self.gains.abs().clamp_min(least), self.gains)
        return missing * sizes / gains
