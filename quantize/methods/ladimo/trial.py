"""A block's FFN converted without training: what the search for layers tries, and
what training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.routing import Budget, fit_router
from quantize.methods.ladimo.split import Construction, Layout, Split, split
from quantize.methods.ladimo.student import Student

if TYPE_CHECKING:
    from quantize.block.block import Block

# Tokens that neurons are grouped on: contributions [16384, F] are held at once, in float32.
_SAMPLE = 16384


def dense_ffn(block: Block) -> Ffn:
    """The weights of a block's dense FFN, in float32."""
    gate, up, down = (
        block.linear(block.arch.of_role(role)).weight.float() for role in ("gate", "up", "down")
    )
    return Ffn(gate, up, down, block.module.get_submodule("mlp").get_submodule("act_fn"))


@dataclass(frozen=True)
class Start:
    """A dense FFN, its split, and what each expert contributes to the outputs for some inputs."""

    ffn: Ffn
    split: Split
    x: Tensor
    """[M, D]"""
    energies: Tensor
    """‖E_e(x)‖² [M, N]."""

    @classmethod
    def of(
        cls, ffn: Ffn, x: Tensor, layout: Layout, construction: Construction, seed: int
    ) -> Start:
        """Split an FFN, by the activations for inputs x [M, D] where the
        construction looks at any."""
        step = -(-len(x) // _SAMPLE)
        found = split(construction, layout, lambda: ffn.contributions(x[::step]), seed)
        return cls(ffn, found, x, _energies(ffn, found, x))

    def router(self, budget: Budget, seed: int) -> Tensor:
        """Router [N, D] fitted to the oracle of this budget."""
        return fit_router(self.x, self.energies, budget, seed)

    def student(self, budget: Budget, router: Tensor) -> Student:
        """The untrained FFN. Shares the dense FFN's memory."""
        return Student(self.ffn, self.split, router, budget.policy(self.x @ router.T))


def _energies(ffn: Ffn, found: Split, x: Tensor) -> Tensor:
    parts = [found.of_expert(index).to(x.device) for index in range(found.layout.n)]
    rows = []
    for inputs in Ffn.pieces(x):
        h = ffn.hidden(inputs)
        rows.append(
            torch.stack(
                [(h[:, part] @ ffn.down[:, part].T).square().sum(dim=1) for part in parts], dim=1
            )
        )
    return torch.cat(rows)


class Trial(nn.Module):
    """A student in the place of a block's FFN."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D] in x's dtype."""
        y: Tensor = self.student(x.reshape(-1, x.shape[-1]).float())
        return y.to(x.dtype).view(x.shape)
