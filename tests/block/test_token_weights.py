"""Tokens weighted by the attention they receive: against dense probabilities and sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import quantize.block.token_weights as token_weights_module
import quantize.model.attention_received as received_module
from quantize.block.block import Block
from quantize.block.capture import attention_inputs, inputs_of
from quantize.block.measure import moments_of
from quantize.block.teacher import freeze_layer
from quantize.block.token_weights import weights_of
from quantize.cost.footprint import QUERIES, SCORES
from quantize.formats.fp8 import quantize_activations
from quantize.methods.gptq import Gptq
from quantize.methods.rtn import Rtn
from quantize.model.attention import KvAttention, KvNumerics, attend_plainly
from quantize.model.attention_received import attention_received

BlockMaker = Callable[..., Block]


def shares_of(
    q: Tensor,
    k: Tensor,
    allowed: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention probabilities [B, T, S], mean over heads, in float64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores + torch.where(allowed, 0.0, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    return scores.softmax(-1)[..., : k.shape[2]].mean(1)


def dense(q: Tensor, k: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    """What `attention_received` gives, from all probabilities at once."""
    return shares_of(q, k, allowed, scaling).sum(1)


def causal(T: int, window: int | None = None) -> Tensor:
    place = torch.arange(T)
    seen = place <= place[:, None]
    return (seen if window is None else seen & (place > place[:, None] - window))[None, None]


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("form", ["none", "bool", "additive"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"s_aux": torch.tensor([0.5, -1.0, 3.0, 0.0])}],
    ids=["plain", "capped", "sinks"],
)
def test_attention_received_is_the_sum_of_probabilities(
    rows: int, every: int, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(received_module, "_QUERIES", rows)
    q, k = torch.randn(2, 4, 23, 8), torch.randn(2, 2, 23, 8)
    allowed = causal(23, None if form == "none" else 7)
    mask = {
        "none": None,
        "bool": allowed,
        "additive": torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
    }[form]
    found = attention_received(q, k, mask, 0.7, every=every, **options)
    # Of 23 queries every fourth from the end, the first of which stands for three.
    looked = torch.arange(22, -1, -every).flip(0)
    stands_for = torch.tensor([int(looked[0]) + 1] + [every] * (len(looked) - 1))
    probabilities = shares_of(q, k, allowed, 0.7, options.get("softcap"), options.get("s_aux"))
    wanted = (probabilities[:, looked] * stands_for[:, None]).sum(1)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
    if "s_aux" not in options:
        assert torch.allclose(found.sum(1), torch.full((2,), 23.0))


def test_memory_is_counted_with_the_same_limits():
    assert (SCORES, QUERIES) == (received_module._SCORES, received_module._QUERIES)
    assert Gptq(token_weights="sinks").weighs_tokens
    assert not Gptq(token_weights="equal").weighs_tokens
    assert not Rtn().weighs_tokens


def test_fewer_queries_than_keys_are_the_last_ones():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8)
    wanted = dense(q, k, causal(9)[..., -3:, :], 1.0)
    assert torch.allclose(attention_received(q, k, None, 1.0).double(), wanted, atol=1e-6)


def test_plain_attention_has_the_same_probabilities():
    """One-hot values show them."""
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    options: dict[str, Any] = {"softcap": 2.0, "s_aux": torch.randn(4)}
    v = torch.eye(9).expand(1, 2, 9, 9)
    shares = attend_plainly(q, k, v, None, 0.5, **options)
    wanted = shares.mean(1).sum(1)
    assert torch.allclose(attention_received(q, k, None, 0.5, **options), wanted, atol=1e-6)


def twin(block: Block) -> list[Tensor]:
    """Weights [B·T] of all batches of a block in float64."""
    found = []
    for q, k, _, mask, scaling in attention_inputs(block, 10**9):
        allowed = causal(q.shape[2]) if mask is None else mask
        found.append(dense(q, k, allowed, scaling).flatten())
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "ministral"])
@pytest.mark.parametrize("fp8", [False, True])
def test_moments_count_tokens_by_their_weights(make_block: BlockMaker, model_type: str, fp8: bool):
    block = make_block(model_type, with_parent=True)
    assert block.parent_inputs is not None
    w = torch.cat(twin(block))[:, None]
    assert float(w.max()) > 2
    parents = dict(zip("qd", _inputs(block), strict=True))
    block.inputs = [x + 0.3 * torch.randn(x.shape) for x in block.inputs]
    freeze_layer(block)
    ours = dict(zip("qd", _inputs(block), strict=True))
    for key, name in (("q", "self_attn.q_proj"), ("d", "mlp.gate_proj")):
        x = ours[key]
        x = quantize_activations(x.float()).double() if fp8 else x
        found = moments_of(block, name, fp8, with_parent=True, token_weights="attention")
        assert found.cross is not None
        assert _apart(found.hessian, x.T @ (w * x) / len(x)) < 1e-5
        assert _apart(found.cross, parents[key].T @ (w * x) / len(x)) < 1e-5
        assert _apart(found.absmean, (w * x.abs()).mean(0)) < 1e-5
        equal = moments_of(block, name, fp8, with_parent=True)
        assert _apart(equal.hessian, x.T @ x / len(x)) < 1e-5
    down = moments_of(block, "mlp.down_proj", fp8, with_parent=True, token_weights="attention")
    assert down.wanted is not None
    assert block.frozen is not None


def test_what_a_residual_linear_should_give_is_weighted_too(make_block: BlockMaker):
    """Without drift, that is what it gives: W in the weighted metric."""
    block = make_block("llama", with_parent=True)
    freeze_layer(block)
    W = block.linear("mlp.down_proj").weight.double()
    found = moments_of(block, "mlp.down_proj", False, True, token_weights="attention")
    plain = moments_of(block, "mlp.down_proj", False, True)
    assert found.wanted is not None
    assert _apart(found.wanted, W @ found.hessian.double()) < 1e-5
    assert _apart(found.hessian, plain.hessian.double()) > 1e-2


def _inputs(block: Block) -> tuple[Tensor, Tensor]:
    found = list(inputs_of(block, ["self_attn.q_proj", "mlp.gate_proj"]))
    q, gate = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    return q, gate


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_weights_are_those_from_before_anything_was_encoded(make_block: BlockMaker):
    block = make_block("llama")
    wanted = twin(block)[0]
    first = weights_of(block, 0, "attention")
    assert first is not None
    assert torch.allclose(first.double(), wanted, rtol=1e-4, atol=1e-5)
    block.linear("self_attn.q_proj").weight.data.zero_()
    again = weights_of(block, 0, "attention")
    assert again is first


def test_a_rounded_cache_stays_in_its_place(make_block: BlockMaker):
    block = make_block("llama")
    kv = KvAttention(KvNumerics(), block.shape.n_kv_heads, block.shape.head_dim)
    block.attend_with(kv)
    with torch.no_grad():
        before = block.forward(block.module, block.inputs[0])
        assert weights_of(block, 0, "attention") is not None
        assert block.module.get_submodule("self_attn").kv is kv
        assert torch.equal(block.forward(block.module, block.inputs[0]), before)
    assert "kv" not in vars(make_block("llama").module.get_submodule("self_attn"))


def test_a_block_without_attention_counts_tokens_the_same_and_says_so(make_block: BlockMaker):
    block = make_block("llama")
    block.arch = replace(block.arch, attention="")
    found = moments_of(block, "mlp.down_proj", False, token_weights="attention")
    assert torch.equal(found.hessian, moments_of(block, "mlp.down_proj", False).hessian)
    assert "no attention probabilities" in block.report["attention"]["equal_tokens"]


def test_a_module_that_never_attends_counts_the_same_and_says_so(make_block: BlockMaker):
    block = make_block("llama")
    block.arch = replace(block.arch, attention="mlp")
    assert weights_of(block, 0, "attention") is None
    assert "equal_tokens" in block.report["mlp"]
    assert not hasattr(block.module.mlp, "kv")


def test_routed_experts_count_tokens_the_same(make_block: BlockMaker):
    name = "mlp.experts.0.down_proj"
    plain = moments_of(make_block("qwen2_moe"), name, False)
    found = moments_of(make_block("qwen2_moe"), name, False, token_weights="attention")
    assert torch.equal(found.hessian, plain.hessian)


def test_a_window_that_overflowed_leaves_the_others_alone(make_block: BlockMaker):
    block = make_block("llama")
    clean = weights_of(make_block("llama"), 0, "attention")
    block.inputs[0][1, 3, 5] = float("nan")
    found = weights_of(block, 0, "attention")
    assert found is not None
    assert clean is not None
    assert torch.equal(found[:24], clean[:24])
    assert found.isfinite().all()
    moments = moments_of(block, "self_attn.q_proj", False, token_weights="attention")
    assert moments.hessian.isfinite().all()
    assert moments.tokens == 3 * 48 - 1


def test_sinks_alone_count_more(make_block: BlockMaker):
    block = make_block("llama")
    w = weights_of(block, 0, "attention")
    assert w is not None
    assert float(w.max()) < 8
    plain = weights_of(block, 0, "sinks")
    assert plain is not None
    assert torch.equal(plain, torch.ones(48))

    sink = torch.rand(48).add(0.5)
    sink[0], sink[30] = 20.0, 9.0
    block.token_weights["sinks", 0] = sink
    found = weights_of(block, 0, "sinks")
    assert found is not None
    assert torch.allclose(found[:24], torch.tensor([20.0] + [1.0] * 23) / (43 / 24))
    assert torch.allclose(found[24:], torch.where(torch.arange(24) == 6, 9.0, 1.0) / (32 / 24))
    assert weights_of(block, 0, "equal") is None


def test_a_sink_of_a_long_window_is_a_part_of_all_attention(make_block: BlockMaker):
    block = make_block("llama")
    block.inputs[0] = torch.zeros(1, 320, 1)
    block.token_weights["sinks", 0] = torch.ones(320)
    block.token_weights["sinks", 0][0] = 19.0
    found = weights_of(block, 0, "sinks")
    assert found is not None
    assert float(found[0]) == 1
    block.token_weights["sinks", 0][0] = 21.0
    found = weights_of(block, 0, "sinks")
    assert found is not None
    assert float(found[0] / found[1]) == pytest.approx(21)


def test_sinks_are_found_by_few_queries(make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch):
    """A window whose first key all queries look at, with one query in three."""
    monkeypatch.setattr(token_weights_module, "_QUERIES", 8)
    block = make_block("llama")
    asked = []

    def received(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        query[...], key[:, :, 0] = query.abs(), 30.0
        asked.append(options["every"])
        return attention_received(query, key, *rest, **options)

    monkeypatch.setattr(token_weights_module, "attention_received", received)
    found = weights_of(block, 0, "sinks")
    assert found is not None
    windows = found.view(2, 24)
    assert torch.allclose(windows[:, 0] / windows[:, 1], torch.full((2,), 24.0), rtol=1e-3)
    whole = weights_of(block, 0, "attention")
    assert whole is not None
    assert torch.allclose(whole.view(2, 24)[:, 0], torch.full((2,), 24.0), rtol=1e-3)
    assert asked == [3, 1]
