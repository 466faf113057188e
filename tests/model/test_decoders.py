"""Decoders that share every rule of another one: that they do is shown on each, not assumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import COMMON, TINY
from rows import ARCHITECTURES
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantize.block.block import Block
from quantize.evaluation.streamed import open_model
from quantize.model.rope import partners

CPU = torch.device("cpu")
BlockMaker = Callable[..., Block]
Maker = Callable[..., Path]
OTHERS = sorted(set(TINY) - set(COMMON))
PAIRED = [name for name in TINY if ARCHITECTURES[name].qk_norm is None]  # else the norm takes them
ROTATED = """\
description: rotated, then rounded to eight bits
stages:
  - method: rotate
  - method: rtn
    bits: 8
"""


def tokens() -> Tensor:
    return torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))


def stock_logits(folder: Path) -> Tensor:
    """Logits of stock transformers, which must find a tensor for every parameter and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens()).logits
    return logits


def streamed_logits(folder: Path, cache: str) -> Tensor:
    """Logits of pq's walk through the blocks. cache: how it must keep keys and values."""
    model = open_model(folder, CPU, torch.float32, "kernel")
    assert model.kv_cache.startswith(cache), model.kv_cache
    windows, length = tokens().shape
    spans = [(window, 0, length) for window in range(windows)]
    return torch.stack(list(model.read(tokens(), lambda: None)(spans)))


def divergence(parent: Tensor, child: Tensor) -> float:
    p, q = parent.log_softmax(-1), child.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", OTHERS)
def test_streamed_logits_are_those_of_stock_transformers(tiny: Maker, model_type: str):
    found, expected = streamed_logits(tiny(model_type), "16-bit"), stock_logits(tiny(model_type))
    assert float(expected.std()) > 0.1
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("model_type", PAIRED)
def test_scales_within_pairs_commute_with_rotation(
    make_block: BlockMaker, model_type: str, index: int
):
    block = make_block(model_type, index)
    x, shape = block.inputs[0], block.shape
    with torch.no_grad():
        before = block.forward(block.module, x)
        heads = torch.exp(torch.randn(shape.n_kv_heads, shape.head_dim))
        partner = partners(block.arch.rope, shape.head_dim, block.rotary_dim)
        lower = torch.minimum(torch.arange(shape.head_dim), partner)
        pre = heads[:, lower]  # both channels of a pair get the scale of the lower one
        block.scale_rows(block.arch.heads.key, pre.flatten())
        queries = pre.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=0)
        block.scale_rows(block.arch.heads.query, 1 / queries.flatten())
        after = block.forward(block.module, x)
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("smoothing", ["scales", "rotation"])
@pytest.mark.parametrize("model_type", OTHERS)
def test_stock_transformers_loads_what_is_converted(
    tiny: Maker, converted: Maker, tmp_path: Path, model_type: str, smoothing: str
):
    (tmp_path / "rotated.yaml").write_text(ROTATED)
    recipe = "awq" if smoothing == "scales" else str(tmp_path / "rotated.yaml")
    out = converted(recipe, model_type, "bits=8")
    assert divergence(stock_logits(tiny(model_type)), stock_logits(out)) < 1e-3


@pytest.mark.parametrize("model_type", OTHERS)
def test_an_int4_cache_is_close_to_the_parent(tiny: Maker, converted: Maker, model_type: str):
    parent = stock_logits(tiny(model_type))
    off = divergence(parent, streamed_logits(converted("fireq", model_type), "int4"))
    alike = divergence(parent, parent.roll(1, 0))
    assert off < 0.2 * alike, (off, alike)
