"""Attention on the INT4 cache: its emulation, RoPE pairs, and the scales that FireQ fits to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import request_for
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantize.block.block import Block
from quantize.block.teacher import freeze_layer
from quantize.conversion.loop import convert
from quantize.errors import ModelError
from quantize.evaluation import evaluate
from quantize.files.checkpoint import Checkpoint
from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import KvScheme, fake_quantize
from quantize.kernels.attention.reference import attend
from quantize.methods.fireq.attention import FireqAttention
from quantize.methods.fireq.kv_search import (
    Sample,
    aligned,
    channel_maxima,
    first_of,
    key_balance,
    paper_scales,
    treated_channels,
    value_balance,
)
from quantize.model.attention import KvAttention, KvNumerics
from quantize.model.load import load_model
from quantize.model.rope import pair_norm, partners, rotary_dim

CPU = torch.device("cpu")
Maker = Callable[..., Path]
BlockMaker = Callable[..., Block]


def heads(
    B: int = 2, H: int = 4, Hkv: int = 2, T: int = 9, L: int = 9, d: int = 32, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, n, length, d, generator=generator)
        for n, length in ((H, T), (Hkv, L), (Hkv, L))
    ]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax attention, one head and one query at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    R = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                scores = k[b, h // R].double() @ q[b, h, t].double() * scaling
                p = torch.where(allowed[t], scores, -math.inf).softmax(0)
                out[b, h, t] = p @ v[b, h // R].double()
    return out


@pytest.mark.parametrize(("T", "L"), [(9, 9), (3, 9), (1, 9)])
def test_attention_is_causal_softmax(T: int, L: int):
    q, k, v = heads(T=T, L=L)
    allowed = torch.ones(T, L, dtype=torch.bool).tril(L - T)
    expected = exact(q, k, v, allowed, 0.3)
    assert torch.allclose(attend(q, k, v, None, 0.3, False).double(), expected, atol=1e-5)
    assert torch.allclose(
        attend(q, k, v, allowed[None, None], 0.3, False).double(), expected, atol=1e-5
    )
    additive = torch.zeros(T, L).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    assert torch.allclose(attend(q, k, v, additive, 0.3, False).double(), expected, atol=1e-5)


def test_few_scores_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch):
    q, k, v = heads(T=40, L=40)
    whole = attend(q, k, v, None, 0.2, True)
    monkeypatch.setattr("quantize.kernels.attention.reference.SCORES", 4 * 40 * 7)
    assert torch.allclose(attend(q, k, v, None, 0.2, True), whole, atol=1e-6)


def test_a_query_that_may_see_nothing_gives_zeros():
    q, k, v = heads()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, :4] = False
    out = attend(q, k, v, mask, 0.2, True)
    assert torch.equal(out[1, :, :4], torch.zeros_like(out[1, :, :4]))
    assert out.isfinite().all()


def test_the_rounding_is_that_of_the_kernel():
    q, k, v = heads(seed=3)
    S = torch.rand(2, 32) + 0.5
    kv = KvAttention(KvNumerics(KvScheme()), 2, 32)
    kv.scale.copy_(S)
    rounded_q = quantize_activations(q / S.repeat_interleave(2, 0)[:, None])
    rounded = fake_quantize(k * S[:, None], KvScheme()), fake_quantize(v, KvScheme())
    expected = attend(rounded_q, *rounded, None, 0.2, True)
    assert torch.equal(kv(q, k, v, None, 0.2), expected)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    error = (expected.double() - exact(q, k, v, allowed, 0.2)).norm() / expected.norm()
    assert 0.02 < error < 0.3
    stored = rounded[0].clone()
    stored.pq_stored = True  # type: ignore[attr-defined]
    assert torch.equal(kv(q, stored, rounded[1], None, 0.2), expected)


@pytest.mark.parametrize("part", ["fp8_query", "fp8_probabilities"])
def test_each_rounding_can_be_switched_off(part: str):
    q, k, v = heads(seed=4)
    on, off = (
        KvAttention(replace(KvNumerics(), **{part: flag}), 2, 32)(q, k, v, None, 0.2)
        for flag in (True, False)
    )
    assert 1e-4 < (on - off).norm() / off.norm() < 0.1


# RoPE pairs


@given(
    st.sampled_from(["half-split", "interleaved"]),
    st.sampled_from([8, 64, 128]),
    st.sampled_from([0.25, 0.5, 1.0]),
)
def test_pairs_are_mutual(layout: str, d: int, part: float):
    r = rotary_dim({"partial_rotary_factor": part}, d)
    partner = partners(layout, d, r)  # type: ignore[arg-type]
    channel = torch.arange(d)
    assert torch.equal(partner[partner], channel)
    assert (partner[:r] != channel[:r]).all()
    assert torch.equal(partner[r:], channel[r:])


@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
def test_pairs_are_those_that_rotation_mixes(layout: str):
    from transformers.models.helium.modeling_helium import rotate_half as interleaved
    from transformers.models.llama.modeling_llama import rotate_half as half_split

    rotate = half_split if layout == "half-split" else interleaved
    mixed = rotate(torch.eye(16)).abs()  # row c: where channel c goes
    assert torch.equal(mixed.argmax(dim=1), partners(layout, 16, 16))  # type: ignore[arg-type]


def test_the_length_of_a_pair_does_not_turn():
    partner = partners("half-split", 8, 6)
    x, angle = torch.randn(5, 8), 0.7
    turned = x.clone()
    turned[:, :3] = x[:, :3] * math.cos(angle) - x[:, 3:6] * math.sin(angle)
    turned[:, 3:6] = x[:, 3:6] * math.cos(angle) + x[:, :3] * math.sin(angle)
    assert torch.allclose(pair_norm(turned, partner), pair_norm(x, partner), atol=1e-5)
    assert torch.equal(pair_norm(x, partner)[:, 6:], x[:, 6:].abs())


@pytest.mark.parametrize("factor", [0.3, 1.5, 0.0])
def test_rotary_parts_that_cannot_be(factor: float):
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        rotary_dim(
            {"rope_parameters": {"partial_rotary_factor": factor}}, 30 if factor == 0.3 else 64
        )


# The stage


def stage(**fields: object) -> FireqAttention:
    return FireqAttention(method="fireq-attention", **fields)  # type: ignore[arg-type]


def outputs(block: Block) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([block.forward(block.module, x) for x in block.inputs])


@pytest.mark.parametrize(
    "fields", [{}, {"search": False}, {"post": False}, {"affine": False, "pre": False}]
)
def test_the_scales_preserve_the_function(
    make_block: BlockMaker, model_type: str, fields: dict[str, object]
):
    """Without rounding (the `kv` taken off again, S undone by hand) every architecture computes what it did."""
    block = make_block(model_type)
    before = outputs(block)
    stage(**fields).apply(block)
    attention = block.module.get_submodule("self_attn")
    kv = attention.kv

    class Unrounded(torch.nn.Module):
        def forward(self, q, k, v, mask, scaling):  # type: ignore[no-untyped-def]
            S, maps = kv.scale, kv.affine(q.device)
            if maps is not None:
                stored = maps.queries(q), maps.keys(k), maps.values(v)
                return maps.output(attend(*stored, mask, scaling, False), q.dtype)
            R = q.shape[1] // k.shape[1]
            return attend(
                q / S.repeat_interleave(R, 0)[:, None], k * S[:, None], v, mask, scaling, False
            )

    assert difference(outputs(block), before) > 1e-3  # the rounded cache shows
    attention.kv = Unrounded()
    assert difference(outputs(block), before) < 1e-5


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_every_pair_gets_one_treatment(make_block: BlockMaker, model_type: str):
    block = make_block(model_type)
    before = {n: p.clone() for n, p in block.module.named_parameters()}
    stage(search=False, top_k=5).apply(block)
    S = block.module.get_submodule("self_attn.kv").scale
    partner = partners(block.arch.rope, block.shape.head_dim, block.rotary_dim)
    treated = S != 1
    assert torch.equal(treated, treated[:, partner])
    assert (treated.sum(dim=1) >= 5).all()
    assert (treated.sum(dim=1) <= 10).all()
    changed = (
        block.module.get_parameter("self_attn.k_norm.weight") / before["self_attn.k_norm.weight"]
        if block.arch.qk_norm
        else (
            block.module.get_parameter("self_attn.k_proj.weight")
            / before["self_attn.k_proj.weight"]
        )[:, 0]
    )
    N = changed.view(-1, block.shape.head_dim)
    assert torch.allclose(N, N[:, partner], rtol=1e-4)
    both = treated & ((N - 1).abs() > 1e-3).expand_as(treated)
    assert not both.any()
    if not block.arch.qk_norm:
        assert (treated | ((N - 1).abs() > 1e-3)).all()


def test_the_published_constants():
    channel = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    pair = torch.tensor([[9.2, 3.2, 9.2, 3.2]])
    partner = partners("half-split", 4, 4)
    scales = paper_scales(channel, pair, partner, 8.0, 4.0, 1)
    assert treated_channels(channel, partner, 1).tolist() == [[True, False, True, False]]
    assert scales.post[0].tolist() == pytest.approx([4 / 9, 1, 4 / 2, 1])
    assert scales.pre[0].tolist() == pytest.approx([1, 2.5, 1, 2.5])


@pytest.mark.parametrize("outlier", ["key", "value"])
def test_outliers_are_searched_away(make_block: BlockMaker, outlier: str):
    """One channel ×40, undone where it is read: without scales the cache loses the rest, with them it hardly does."""
    errors = {}
    for fields in ({"pre": False, "post": False, "values": False}, {}):
        block = make_block("llama")
        linear = block.linear("self_attn.k_proj" if outlier == "key" else "self_attn.v_proj")
        other = block.linear("self_attn.q_proj" if outlier == "key" else "self_attn.o_proj")
        for channel in (3, 35):
            linear.weight.data[channel] *= 40
            for head in range(2):  # query heads that read kv head 0
                part = (
                    other.weight.data[head * 64 + channel]
                    if outlier == "key"
                    else other.weight.data[:, head * 64 + channel]
                )
                part /= 40
        stage(**fields).apply(block)
        errors[not fields] = block.report["self_attn"]["kv_error"]
    assert errors[True] < 0.25 * errors[False]


def test_the_search_is_never_worse_than_nothing(make_block: BlockMaker, model_type: str):
    block = make_block(model_type)
    stage().apply(block)
    facts = block.report["self_attn"]
    assert 0 < facts["kv_error"] <= facts["kv_error_unscaled"]


def test_neither_is_the_search_for_scales(make_block: BlockMaker):
    block = make_block("qwen2")
    stage(affine=False).apply(block)
    facts = block.report["self_attn"]
    assert 0 < facts["kv_error"] <= facts["kv_error_unscaled"]
    assert facts["value_gain"] <= 1


def test_without_post_scales_in_the_format_none_are_used(make_block: BlockMaker):
    block = make_block("llama")
    block.keeps_post_scales = False
    stage().apply(block)
    assert (block.module.get_submodule("self_attn.kv").scale == 1).all()
    assert block.report["self_attn"]["post_channels"] == 0
    assert block.report["self_attn"]["pre_channels"] > 0


def test_the_parent_keeps_its_full_cache(make_block: BlockMaker):
    block = make_block("qwen2", with_parent=True)
    before = outputs(block)
    stage().apply(block)
    freeze_layer(block)
    with torch.no_grad():
        after = torch.cat([block.forward(block.frozen, x) for x in block.inputs])
    assert difference(after, before) < 1e-5


def test_group_sizes_that_do_not_divide_a_head(make_block: BlockMaker):
    with pytest.raises(ModelError, match="48"):
        stage(group_size=48).apply(make_block("llama"))


def test_fields_are_strict():
    with pytest.raises(ValidationError):
        stage(top_k=-1)


# End to end


@pytest.mark.parametrize("recipe", ["fireq", "fireq-kv", "fireq-paper"])
def test_a_conversion_with_attention(
    tiny: Maker, converted: Maker, text_file: Path, model_type: str, recipe: str
):
    out = converted(recipe, model_type)
    source = Checkpoint(out)
    config = source.config["quantization_config"]
    assert config["quant_method"] == "pq"
    symmetric = recipe == "fireq-paper"
    assert config["attention"] == (
        KvNumerics(KvScheme(symmetric=symmetric), affine=not symmetric).as_json()
    )
    scales = [n for n in source.names() if n.endswith("self_attn.kv.scale")]
    assert len(scales) == 2
    figures = evaluate(out, tiny(model_type), dataset=str(text_file), seqlen=32, max_windows=4)
    assert figures.kv_cache == ("int4 g64" if symmetric else "int4 g64 asymmetric")
    assert 0 < figures.kld_mean < 1
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    model = load_model(out, CPU, torch.float32)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert logits.isfinite().all()
    assert (figures.bits_per_weight is None) == (recipe == "fireq-kv")


def test_a_stock_format_says_what_it_cannot_hold(tiny: Maker, text_file: Path, tmp_path: Path):
    request = request_for(tiny("llama"), "fireq-kv", tmp_path / "out", text_file)
    request = replace(
        request, recipe=request.recipe.model_copy(update={"format": "compressed-tensors"})
    )
    summary = convert(request)
    assert any("post-RoPE" in line for line in summary.lost)
    assert not [n for n in Checkpoint(tmp_path / "out").names() if "kv" in n.split(".")]


def test_the_cache_can_be_emulated_for_any_checkpoint(tiny: Maker, text_file: Path):
    args = {"dataset": str(text_file), "seqlen": 32, "max_windows": 4}
    folder = tiny("llama")
    assert evaluate(folder, folder, **args).kld_mean == 0
    rounded = evaluate(folder, folder, **args, attention=KvNumerics())
    assert 1e-5 < rounded.kld_mean < 1
    assert rounded.kv_cache == "int4 g64"


def test_maxima_cover_all_samples():
    class One:
        def __init__(self, k: torch.Tensor) -> None:
            self.k = k

    ks = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    partner = partners("half-split", 8, 8)
    channel, pair = channel_maxima([One(k) for k in ks], partner)  # type: ignore[list-item]
    together = torch.cat([k.transpose(1, 2).flatten(0, 1) for k in ks])
    assert torch.allclose(channel, together.abs().amax(0))
    assert torch.allclose(pair, pair_norm(together, partner).amax(0))


def samples_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Sample]:
    return [Sample.of(q, k, v, None, q.shape[-1] ** -0.5)]


@pytest.mark.parametrize("pairs", [False, True])
def test_balanced_keys_lose_least_of_all_scales(pairs: bool):
    """(Σ k²A²)(Σ q²/A²), which rounding errs by, is least there: every step away from it costs."""
    generator = torch.Generator().manual_seed(0)
    spread = (1.5 * torch.randn(2, 16, generator=generator)).exp()
    k = torch.randn(1, 2, 200, 16, generator=generator) * spread[:, None]
    q = (
        torch.randn(1, 4, 200, 16, generator=generator)
        * spread.flip(0).repeat_interleave(2, 0)[:, None]
    )
    partner = partners("half-split", 16, 16) if pairs else None
    A = key_balance(samples_of(q, k, k), partner)
    assert torch.allclose(A.log().mean(1), torch.zeros(2), atol=1e-5)
    if partner is not None:
        assert torch.allclose(A, A[:, partner])

    def lost(scale: torch.Tensor) -> torch.Tensor:
        keys = (k * scale[:, None]).square().sum(-1).mean((0, 2))
        queries = (q / scale.repeat_interleave(2, 0)[:, None]).square().sum(-1).mean((0, 2))
        return keys * queries.view(2, 2).sum(1)

    best = lost(A)
    assert (best < 0.8 * lost(torch.ones_like(A))).all()
    for _ in range(20):
        step = (0.3 * torch.randn(2, 16, generator=generator)).exp()
        step = step if partner is None else (step * step[:, partner]).sqrt()
        assert (lost(A * step) > best * 0.999).all()


def test_queries_decide_which_channels_may_err(make_block: BlockMaker):
    """Keys of one size; queries look at few channels: no scale that evens out keys helps, the balance does."""
    block = make_block("llama")
    look = torch.full((64,), 0.05)
    look[:8] = look[32:40] = 3.0
    block.linear("self_attn.q_proj").weight.data *= look.repeat(4)[:, None]
    stage(queries="none", probabilities="none").apply(block)
    facts = block.report["self_attn"]
    assert facts["kv_error"] < 0.8 * facts["kv_error_unscaled"]


def test_balanced_values():
    generator = torch.Generator().manual_seed(1)
    size = (torch.randn(1, 8, generator=generator)).exp()
    v = torch.randn(1, 1, 400, 8, generator=generator) * size[:, None]
    gram = torch.diag_embed(torch.tensor([[1.0, 4.0, 1, 1, 1, 1, 1, 1]]))
    found = value_balance(samples_of(v, v, v), gram)[0]
    wanted = (v.square().mean((0, 2))[0] / torch.diagonal(gram[0])) ** 0.25
    assert torch.allclose(found / found[0], wanted / wanted[0], rtol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("move", "own", "others"), [(0.15, 0.85, 1.1), (1 / 3, 0.5, 1.35)])
def test_the_first_token_loses_less(symmetric: bool, move: float, own: float, others: float):
    scheme = KvScheme(128, symmetric)
    draw = torch.Generator().manual_seed(3)
    first, other = torch.randn(2, 256, generator=draw), torch.randn(200, 2, 256, generator=draw)
    scale = torch.ones(2, 256)
    moved = aligned(first, scale, scheme, move)

    def lost(x: torch.Tensor, s: torch.Tensor) -> float:
        return float((fake_quantize(x * s, scheme) / s - x).square().sum())

    assert lost(first, moved) < own * lost(first, scale)
    assert lost(other, moved) < others * lost(other, scale)


def test_only_a_first_token_that_is_the_same_everywhere_counts():
    k = torch.randn(3, 2, 5, 8)
    assert first_of([k]) is None
    k[:, :, 0] = k[0, :, 0]
    found = first_of([k, k])
    assert found is not None
    assert torch.allclose(found, k[0, :, 0], atol=1e-6)
