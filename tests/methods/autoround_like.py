"""A method from outside the checkout: sign-SGD on rounding offsets, as AutoRound does (arXiv 2309.05516)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.standin import stand_in
from quantize.block.teacher import teacher_outputs
from quantize.methods.encode import IntEncode, note_errors
from quantize.solvers.grid import Grid


class _Rounding(nn.Module):
    """Stands in for a linear; `offset` moves each weight by at most half a step before it is rounded."""

    def __init__(self, linear: nn.Linear, grid: Grid) -> None:
        super().__init__()
        self.linear, self.grid, self.weight = linear, grid, linear.weight.float()
        self.scale, _ = grid.fit_scale(self.weight)
        self.step = grid.expand(self.scale)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))

    def codes(self) -> Tensor:
        place = self.weight / self.step + self.offset
        straight_through = place + (place.round() - place).detach()
        return straight_through.clamp(self.grid.qmin, self.grid.qmax)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.codes() * self.step).to(x.dtype), self.linear.bias)


class AutoRoundLike(IntEncode):
    """Tune the rounding of all linears of a block together against the block's own outputs."""

    method: Literal["autoround-like"] = "autoround-like"
    steps: int = 100
    """Steps of sign-SGD; each offset moves by at most half a step of the grid in all of them together."""

    def fitting(self, N: int, K: int) -> int:
        return 40 * N * K

    def apply(self, block: Block) -> None:
        grid, wanted = Grid(self.bits, self.group_size), list(teacher_outputs(block))
        trials = {name: _Rounding(block.linear(name), grid) for name in self.selection(block)}
        with stand_in(block.module, trials), torch.enable_grad():
            for step in range(self.steps):
                rate = (1 - step / self.steps) / self.steps
                found = block.forward(block.module, block.inputs[step % len(wanted)])
                (found - wanted[step % len(wanted)]).float().square().mean().backward()
                for trial in trials.values():
                    trial.offset.data -= rate * trial.offset.grad.sign()
                    trial.offset.grad = None
        for name, trial in trials.items():
            block.encode(name, grid.pack(trial.codes().detach(), trial.scale), self.fp8)
            note_errors(block, name, trial.weight, trial.codes().detach() * trial.step)
