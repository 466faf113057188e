"""Linears whose outputs go through a norm: what they should give for the parent's stream, against the norm itself."""

from __future__ import annotations

import pytest
import torch
from conftest import BlockMaker
from torch import nn

from quantize.block.capture import inputs_of
from quantize.block.measure import moments_of
from quantize.block.post_norm import PostNorm
from quantize.block.teacher import freeze_layer
from quantize.block.token_weights import weights_of


class Rms(nn.Module):
    def __init__(self, gains: torch.Tensor, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(gains - offset), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.offset + self.weight)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_is_added_before_the_norm_arrives_behind_it(offset: float):
    gains = 0.5 + torch.rand(32)
    gains[3] *= -1
    norm = PostNorm.of(Rms(gains, offset), 32)
    assert norm is not None
    assert torch.allclose(norm.gains, gains)
    y, missing = torch.randn(9, 32), 1e-4 * torch.randn(9, 32)
    module = Rms(gains, offset)
    with torch.no_grad():
        moved = module(y + norm.before(missing, norm.sizes(y))) - module(y)
    # The norm takes away what changes the size alone.
    unit = y / y.norm(dim=1, keepdim=True)
    along = ((missing / gains) * unit).sum(1, keepdim=True) * unit * gains
    assert float((moved - (missing - along)).norm() / missing.norm()) < 2e-2


def test_a_channel_that_is_nearly_off_repairs_little():
    gains = torch.ones(8)
    gains[2] = 1e-6
    norm = PostNorm.of(Rms(gains, 0.0), 8)
    assert norm is not None
    assert float(norm.before(torch.ones(1, 8), torch.ones(1, 1)).abs().max()) < 30


@pytest.mark.parametrize("other", [nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8)])
def test_other_functions_are_none(other: nn.Module):
    if isinstance(other, nn.LayerNorm):
        nn.init.normal_(other.bias)
    assert PostNorm.of(other, 8) is None


FOUND = {
    "self_attn.o_proj": "post_attention_layernorm",
    "mlp.down_proj": "post_feedforward_layernorm",
}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "glm4"])
def test_norms_behind_linears_are_found(make_block: BlockMaker, model_type: str):
    arch = make_block(model_type).arch
    norms = {
        "glm4": {
            "self_attn.o_proj": "post_self_attn_layernorm",
            "mlp.down_proj": "post_mlp_layernorm",
        }
    }.get(model_type, FOUND)
    # OLMo 2 reads its stream without a norm, so nothing says where the stream stands.
    assert arch.post_norms == ({} if model_type == "olmo2" else norms)
    assert set(arch.residual) == set(arch.post_norms)


def test_where_nothing_is_normed_behind_nothing_is_found(make_block: BlockMaker, model_type: str):
    assert make_block(model_type).arch.post_norms == {}


@pytest.mark.parametrize("name", list(FOUND))
@pytest.mark.parametrize("kind", ["equal", "attention"])
def test_moments_of_a_linear_before_a_norm(make_block: BlockMaker, name: str, kind: str):
    """Errors in the size of the output, and the drift of the stream as it must be before the norm, in float64."""
    block = make_block("gemma3_text", with_parent=True)
    assert block.parent_inputs is not None
    freeze_layer(block)
    names = [block.arch.residual[name], name]
    theirs = [t.double() for t in _all(block, names)]
    block.inputs = [x + 0.1 * torch.randn(x.shape) for x in block.inputs]
    ours = [t.double() for t in _all(block, names)]
    (r, x), (r_ours, x_ours) = theirs, ours
    y = x @ block.linear(name).weight.double().T
    rms = y.square().mean(1, keepdim=True).sqrt()
    gains = 1 + block.module.get_submodule(FOUND[name]).weight.double()
    per_batch = len(x) // len(block.inputs)
    share = rms.squeeze(1) ** -2
    if kind == "attention":
        share *= torch.cat([weights_of(block, i, "attention") for i in range(len(block.inputs))])  # type: ignore[misc]
    share = (share.view(-1, per_batch) / share.view(-1, per_batch).mean(1, keepdim=True)).flatten()

    found = moments_of(block, name, False, with_parent=True, token_weights=kind)  # type: ignore[arg-type]
    weighted = share[:, None] * x_ours / len(x)
    wanted = (y + (r - r_ours) * rms / gains).T @ weighted
    assert found.wanted is not None
    assert float((found.hessian - x_ours.T @ weighted).norm() / found.hessian.norm()) < 1e-4
    assert float((found.wanted - wanted).norm() / wanted.norm()) < 1e-4


def test_a_window_that_overflowed_leaves_the_other_of_its_batch_alone(make_block: BlockMaker):
    block = make_block("gemma3_text", with_parent=True)
    freeze_layer(block)
    assert block.parent_inputs is not None
    block.parent_inputs[1][0, 20, 3] = float("inf")
    found = moments_of(block, "mlp.down_proj", False, True, token_weights="sinks")
    assert found.tokens == sum(x.shape[0] * x.shape[1] for x in block.inputs) - 24  # its window
    assert found.hessian.isfinite().all()
    assert found.wanted is not None
    assert found.wanted.isfinite().all()


def _all(block, names):  # type: ignore[no-untyped-def]
    found = list(inputs_of(block, names))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
