"""A block's FFN converted without training: what the search for layers tries, and
what training starts from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.lesson import Lesson
from quantize.methods.ladimo.routing import Budget, fit_router
from quantize.methods.ladimo.split import Construction, Layout, Split, split
from quantize.methods.ladimo.student import Student
from quantize.model.dense_ffn import DenseParts, dense_ffn_of, require_unbiased

if TYPE_CHECKING:
    from quantize.block.block import Block

# Tokens that neurons are grouped on: contributions [16384, F] are held at once, in float32.
_SAMPLE = 16384


# Relative error of float32 sums in another order; an FFN that does anything else is far beyond.
_SAME = 1e-4


@torch.no_grad()
def dense_ffn(block: Block) -> Ffn:
    """The weights of a block's dense FFN, in float32, proved to be all that it does; ModelError
    for one that does something else."""
    place = dense_ffn_of(block.arch)
    name, module = block.full_name(place), block.module.get_submodule(place)
    parts = DenseParts.of(name, module)
    gate, up, down = (
        block.linear(f"{place}.{part}").weight.float()
        for part in (parts.gate, parts.up, parts.down)
    )
    if any(module.get_parameter(f"{part}.bias").any() for part in parts.biased):
        require_unbiased(name, parts)
    # A fused linear has the gate first as far as anybody knows; here it is seen.
    orders = [(gate, up)]
    if parts.is_fused:
        one, other = gate.chunk(2)
        orders = [(one, other), (other, one)]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, parts.hidden, generator=draw).to(down.device)
    wanted = copy.deepcopy(module).float()(x)
    for gate, up in orders:
        found = Ffn(gate, up, down, parts.act)
        if (found(x) - wanted).norm() <= _SAME * wanted.norm():
            return found
    raise ModelError(
        f"{name}: {type(module).__name__} computes something else than (act(x G) * x U) D, which is "
        "what ladimo makes experts of"
    )


@dataclass(frozen=True)
class Start:
    """A dense FFN, its split, and what each expert contributes to the outputs for some inputs."""

    ffn: Ffn
    split: Split
    x: Tensor
    """[M, D]"""
    energies: Tensor
    """‖E_e(x)‖² [M, N], as they count in the residual stream."""

    @classmethod
    def of(
        cls, ffn: Ffn, lesson: Lesson, layout: Layout, construction: Construction, seed: int
    ) -> Start:
        """Split an FFN, by the activations for a lesson's inputs where the construction looks at
        any."""
        x, importance, seen = lesson.x, lesson.importance(), lesson.seen(ffn)
        step = -(-len(x) // _SAMPLE)

        def contributions() -> Tensor:
            found = seen.contributions(x[::step])
            return found if importance is None else found * importance[::step, None].sqrt()

        found = split(construction, layout, contributions, seed)
        energies = _energies(seen, found, x)
        if importance is not None:
            energies *= importance[:, None]
        return cls(ffn, found, x, energies)

    def router(self, budget: Budget, seed: int) -> Tensor:
        """Router [N, D] fitted to the oracle of this budget."""
        return fit_router(self.x, self.energies, budget, seed)

    def student(self, budget: Budget, router: Tensor) -> Student:
        """The untrained FFN. Shares the dense FFN's memory."""
        return untrained(self.ffn, self.split, router, budget, self.x)


def untrained(ffn: Ffn, split: Split, router: Tensor, budget: Budget, x: Tensor) -> Student:
    """A dense FFN in experts, ranked by a router [N, D], with the policy that meets a budget on
    inputs x [M, D]. Shares the dense FFN's memory."""
    return Student(ffn, split, router, budget.policy(x @ router.T))


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
