"""A dense gated FFN as plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = 8192
"""Tokens worked on at once: bounds the memory of their hidden activations [8192, F]."""


@dataclass(frozen=True)
class Ffn:
    """y = (act(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ."""

    gate: Tensor
    """[F, D]"""
    up: Tensor
    """[F, D]"""
    down: Tensor
    """[D, F]"""
    act: Callable[[Tensor], Tensor]

    @property
    def neurons(self) -> int:
        """Hidden neurons F."""
        return len(self.gate)

    def hidden(self, x: Tensor) -> Tensor:
        """Inputs [..., D] → hidden activations [..., F]."""
        return self.act(x @ self.gate.T) * (x @ self.up.T)

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [M, D] → outputs [M, D], in pieces."""
        return torch.cat([self.hidden(part) @ self.down.T for part in self.pieces(x)])

    def contributions(self, x: Tensor) -> Tensor:
        """Size |h|·‖w_d‖ [M, F] of what each neuron adds to the output of each token x [M, D]."""
        return self.hidden(x).abs_().mul_(self.down.norm(dim=0))

    @staticmethod
    def pieces(x: Tensor) -> tuple[Tensor, ...]:
        """Rows of x [M, D], so many at once that hidden activations stay small."""
        return torch.split(x, TOKENS)
