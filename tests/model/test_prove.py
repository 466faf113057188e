"""A proof holds what moves and drops what does not, on blocks made to tempt it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import BlockMaker
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.model.arch import Architecture, Edge
from quantize.model.edges import norm_offset
from quantize.model.prove import prove
from quantize.model.stream import Stream

WIDTH, INNER = 16, 24


class Norm(nn.Module):
    """RMSNorm that multiplies by offset + weight."""

    def __init__(self, offset: float = 0.0, squared: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.offset, self.squared = offset, squared

    def forward(self, x: Tensor) -> Tensor:
        gain = self.offset + self.weight
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * (gain**2 if self.squared else gain)


class Ffn(nn.Module):
    """A block that is one gated FFN, with what a test wants otherwise."""

    def __init__(
        self, offset: float = 0.0, clamp: float | None = None, peeks: bool = False
    ) -> None:
        super().__init__()
        self.norm = Norm(offset)
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=True)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=True)
        self.down_proj = nn.Linear(INNER, WIDTH)
        self.clamp, self.peeks = clamp, peeks

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        up = self.up_proj(x)
        if self.clamp is not None:
            up = up.clamp(-self.clamp, self.clamp)
        out: Tensor = hidden + self.down_proj(nn.functional.gelu(self.gate_proj(x)) * up)
        return out + 0.1 * x if self.peeks else out


def arch_of(offset: float = 0.0, *edges: Edge) -> Architecture:
    sinks = ("gate_proj", "up_proj")
    found = edges or (
        Edge("mlp_norm", "norm", sinks, "norm", offset=offset),
        Edge("up_down", "up_proj", ("down_proj",), "linear"),
    )
    roles = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return Architecture("ffn", roles, (sinks, ("down_proj",)), found, {})  # type: ignore[arg-type]


def dropped(module: nn.Module, arch: Architecture) -> set[str]:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    proof = prove(arch, module, lambda layer, hidden: layer(hidden), Stream.plain(WIDTH))
    after = module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {edge.name for edge in proof.arch.edges} == {e.name for e in arch.edges} - set(
        proof.dropped
    )
    return set(proof.dropped)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_gated_ffn_holds_whatever_its_activation_and_biases(offset: float):
    torch.manual_seed(0)
    assert dropped(Ffn(offset), arch_of(offset)) == set()


def test_a_norm_of_another_form_is_seen():
    torch.manual_seed(0)
    assert dropped(Ffn(offset=1.0), arch_of(offset=0.0)) == {"mlp_norm"}


def test_a_norm_that_others_read_does_not_move():
    torch.manual_seed(0)
    assert dropped(Ffn(peeks=True), arch_of()) == {"mlp_norm"}


@pytest.mark.parametrize("clamp", [3.0, 7.0, 20.0])
def test_a_clamp_that_usual_inputs_do_not_reach_is_seen(clamp: float):
    torch.manual_seed(0)
    assert dropped(Ffn(clamp=clamp), arch_of()) == {"up_down"}


def test_sizes_that_do_not_fit_are_dropped_not_raised():
    torch.manual_seed(0)
    wrong = Edge("norm_down", "norm", ("down_proj",), "norm")
    assert dropped(Ffn(), arch_of(0.0, wrong)) == {"norm_down"}


def test_a_gate_is_no_up():
    torch.manual_seed(0)
    wrong = Edge("gate_down", "gate_proj", ("down_proj",), "linear")
    assert dropped(Ffn(), arch_of(0.0, wrong)) == {"gate_down"}


def proof_of(block: Block, **changes: object) -> set[str]:
    assert block.arch.heads is not None
    arch = replace(block.arch, heads=replace(block.arch.heads, **changes))  # type: ignore[arg-type]
    return set(prove(arch, block.module, block.forward, Stream.plain(block.shape.hidden)).dropped)


def test_rotary_pairs_need_the_right_number_of_channels(make_block: BlockMaker):
    block = make_block("llama")
    assert proof_of(block) == set()
    assert proof_of(block, rotary_dim=32) == {"rotary pairs"}


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (Norm(), 0.0),
        (Norm(1.0), 1.0),
        (Norm(squared=True), None),
        (nn.LayerNorm(WIDTH), 0.0),
        (nn.Linear(WIDTH, WIDTH), None),
    ],
)
def test_the_form_of_a_norm_is_found_by_running_it(norm: nn.Module, offset: float | None):
    if isinstance(norm, nn.Linear):
        norm.weight = nn.Parameter(torch.ones(WIDTH))  # no norm, and not runnable as one
    assert norm_offset(norm) == offset
    assert norm_offset(norm.to("meta")) == offset
