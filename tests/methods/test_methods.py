"""What rtn, gptq and awq promise, each against its own oracle; fireq and cas are in test_fireq.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rows import ARCHITECTURES
from torch import Tensor

import quantize.methods.awq as awq_module
import quantize.methods.equalize as equalize_module
from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.measure import moments_of
from quantize.block.moments import Moments
from quantize.block.smoothing import balance, search
from quantize.methods import Stage
from quantize.methods.awq import Awq
from quantize.methods.equalize import Equalize
from quantize.methods.fireq.stage import Fireq
from quantize.methods.gptq import Gptq
from quantize.methods.rtn import Rtn
from quantize.model.arch import Edge
from quantize.solvers.grid import Grid

BlockMaker = Callable[..., Block]
LINEARS = list(ARCHITECTURES["llama"].roles)
EDGES = [edge.name for edge in ARCHITECTURES["llama"].edges]


def correlate(block: Block) -> Block:
    """Give the block inputs that mostly lie in 32 of its 128 dimensions: 320 tokens, or 1280 for one with experts."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.cat(
        [
            torch.randn(32, block.shape.hidden, generator=generator),
            0.3 * torch.eye(block.shape.hidden),
        ]
    )
    batches = 20 if any(map(block.arch.is_routed, block.arch.roles)) else 5
    block.inputs = [torch.randn(2, 32, len(mix), generator=generator) @ mix for _ in range(batches)]
    block.parent_inputs = [x.clone() for x in block.inputs]
    return block


def run(stage: Stage, block: Block) -> Block:
    with torch.no_grad():
        stage.apply(block)
    return block


def outputs(block: Block) -> Tensor:
    with torch.no_grad():
        return torch.cat([block.forward(block.module, x) for x in block.inputs])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def change_hessians(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let stages measure a changed Hessian."""

    def changed(*args: Any, **kwargs: Any) -> Moments:
        return replace(found := moments_of(*args, **kwargs), hessian=change(found.hessian))

    for module in ("gptq", "fireq.stage"):
        patch.setattr(f"quantize.methods.{module}.moments_of", changed)


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Absmax rounding in groups of 128, written out."""
    grouped = weight.unflatten(1, (-1, 128))
    top = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(dim=2, keepdim=True) / top).to(torch.bfloat16).float()
    return ((grouped / scale).round().clamp(-top - 1, top) * scale).flatten(1)


def squared_output_error(x: Tensor, quantized: Tensor, weight: Tensor) -> float:
    """Relative squared output error over the tokens x [T, K], in float64."""
    x, quantized, weight = x.double(), quantized.double(), weight.double()
    return float((x @ (quantized - weight).T).square().sum() / (x @ weight.T).square().sum())


def entering(block: Block, name: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([x for (x,) in inputs_of(block, (name,))])


# Rounding to nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("tail", [1, 3])
def test_rtn_clipping_never_costs_weight_error(
    make_block: BlockMaker, bits: int, group_size: int, tail: int
):
    errors = {}
    for clip in ("absmax", "mse"):
        block = make_block("llama")
        for name in LINEARS:
            block.linear(name).weight.data = (
                block.linear(name).weight ** tail
            )  # odd: signs stay, tails grow
        run(Rtn(bits=bits, group_size=group_size, clip=clip), block)
        errors[clip] = {name: facts["weight_error"] for name, facts in block.report.items()}
    for name in LINEARS:
        assert errors["mse"][name] <= errors["absmax"][name] * (1 + 1e-6), name
    if bits < 8:
        assert sum(errors["mse"].values()) < 0.97 * sum(errors["absmax"].values())


# GPTQ


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("name", LINEARS)
def test_gptq_has_less_output_error_than_rounding(
    make_block: BlockMaker, order: str, clip: str, name: str
):
    plain = correlate(make_block("llama"))
    x, weight = entering(plain, name), plain.linear(name).weight
    rounded = run(Rtn(clip=clip, layers=(f"*.{name}",)), make_block("llama")).packed[name]
    block = run(Gptq(order=order, clip=clip, layers=(f"*.{name}",)), correlate(make_block("llama")))
    error = squared_output_error(x, block.packed[name].unpack(), weight)
    assert block.report[name]["output_error"] == pytest.approx(error, rel=1e-3)
    assert error < 0.8 * squared_output_error(x, rounded.unpack(), weight)
    assert torch.equal(block.packed[name].scale, rounded.scale)
    assert (block.report[name]["damping"], block.report[name]["dead_inputs"]) == (0.01, 0)


@pytest.mark.parametrize(
    "stage", [Gptq(), Gptq(order="natural"), Fireq(), Fireq(activations="none")], ids=str
)
def test_dead_inputs_are_survived_and_noted(make_block: BlockMaker, stage: Stage):
    block = correlate(make_block("qwen3", with_parent=True))
    block.module.get_submodule("input_layernorm").weight.data[[0, 5, 127]] = 0
    wanted = outputs(block)
    run(stage, block)
    for name in LINEARS:
        assert "fallback" not in block.report[name]
        assert block.report[name]["dead_inputs"] == (
            3 if name[-6:] in ("q_proj", "k_proj", "v_proj") else 0
        )
        assert block.report[name]["output_error"] < 0.05
    assert distance(outputs(block), wanted) < 0.1


@pytest.mark.parametrize("stage", [Gptq(), Fireq(damping=0.01)], ids=str)
def test_an_indefinite_hessian_is_damped_tenfold(
    make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch, stage: Stage
):
    def shifted(H: Tensor) -> Tensor:
        # Smallest eigenvalue −0.05 of the mean: 0.01 is too little damping, 0.1 is enough.
        values, vectors = torch.linalg.eigh(H.double())
        values[0] = -0.05 * H.diagonal().mean()
        return ((vectors * values) @ vectors.T).float()

    change_hessians(monkeypatch, shifted)
    block = run(stage, correlate(make_block("llama", with_parent=True)))
    for name in LINEARS:
        assert block.report[name]["damping"] == pytest.approx(0.1), name
        assert block.report[name]["weight_error"] < 0.1


@pytest.mark.parametrize("stage", [Gptq(), Fireq(), Fireq(activations="none")], ids=str)
@pytest.mark.parametrize(
    "spoil", [torch.neg, lambda H: H * torch.nan, lambda H: H.fill_diagonal_(torch.inf)]
)
def test_an_unusable_hessian_falls_back_to_rounding(
    make_block: BlockMaker,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    spoil: Callable[[Tensor], Tensor],
):
    change_hessians(monkeypatch, spoil)
    block = run(stage, correlate(make_block("llama", with_parent=True)))
    for name in LINEARS:
        facts = block.report[name]
        assert "rounded to nearest" in facts["fallback"], name
        assert 0 < facts["weight_error"] < 0.02
        assert not {"damping", "dead_inputs", "output_error"} & set(facts)
    if isinstance(stage, Gptq):
        expected = run(Rtn(clip="mse"), make_block("llama"))
        assert all(
            torch.equal(block.packed[name].codes, expected.packed[name].codes) for name in LINEARS
        )


# AWQ


def sinks_error(block: Block, edge: Edge, bits: int) -> float:
    """Relative output error of an edge's sinks rounded as they are, from the activations themselves."""
    x = entering(block, edge.sinks[0])
    weights = [block.linear(sink).weight for sink in block.rounded_sinks(edge)]
    return sum(squared_output_error(x, nearest(weight, bits), weight) for weight in weights)


@pytest.mark.parametrize(("bits", "weight_exponents"), [(4, (0.0,)), (3, (1.0,)), (4, (0.0, 1.0))])
def test_awq_never_raises_an_edges_rounding_error(
    make_block: BlockMaker, model_type: str, bits: int, weight_exponents: tuple[float, ...]
):
    block = correlate(make_block(model_type))
    block.module.get_submodule("input_layernorm").weight.data[[7, 9]] *= 20
    errors: dict[str, tuple[float, float]] = {}
    fold = block.fold

    def measured(edge: Edge, scale: Tensor) -> None:
        before = sinks_error(block, edge, bits)
        fold(edge, scale)
        errors[edge.name] = (before, sinks_error(block, edge, bits))

    block.fold = measured  # type: ignore[method-assign]
    run(Awq(bits=bits, weight_exponents=weight_exponents), block)
    downs = {edge.name for edge in block.arch.edges if edge.name.startswith("up_down")}
    assert {"attn_norm", *downs} <= set(errors), "the search found nothing to gain"
    ratios = {edge.name: block.report[edge.name]["search_ratio"] for edge in block.arch.edges}
    assert {name for name, ratio in ratios.items() if ratio != 1} == set(errors)
    for name, (before, after) in errors.items():
        # A norm keeps its bfloat16, so the λ that is folded is the one tried up to 2⁻⁹.
        assert ratios[name] < 1
        assert after / before == pytest.approx(ratios[name], rel=0.05)
        assert after < 1.01 * before


def candidates_of(
    stage: Awq, block: Block, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Tensor]]:
    """Run the search and return every λ it tried, by edge."""
    tried: dict[str, list[Tensor]] = {}

    def recorded(block: Block, edge: Edge, candidates: Any, *args: Any) -> Any:
        tried[edge.name] = list(candidates)
        return search(block, edge, tried[edge.name], *args)

    monkeypatch.setattr(awq_module, "search", recorded)
    run(stage, block)
    return tried


def test_awq_tries_every_pair_of_exponents(make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch):
    block = correlate(make_block("qwen3"))
    x = entering(block, "self_attn.q_proj").abs().mean(dim=0)
    w = (
        torch.cat([block.linear(f"self_attn.{sink}_proj").weight for sink in "qkv"])
        .abs()
        .mean(dim=0)
    )
    tried = candidates_of(Awq(grid=4, weight_exponents=(0.0, 0.5, 1.0)), block, monkeypatch)[
        "attn_norm"
    ]
    pairs = [(a, b) for a in (0.0, 0.25, 0.5, 0.75) for b in (0.0, 0.5, 1.0)]
    for (a, b), scale in zip(pairs, tried, strict=True):
        ratio = scale / (x**a / w ** (b * (1 - a)))
        assert torch.allclose(ratio, ratio[:1], rtol=1e-4), (a, b)


def test_awq_tries_usable_scales_whatever_is_dead(
    make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch
):
    block = correlate(make_block("llama"))
    block.module.get_submodule("input_layernorm").weight.data[:4] = 0  # inputs that are always zero
    for sink in ("q_proj", "k_proj", "v_proj"):
        block.linear(f"self_attn.{sink}").weight.data[:, 2:8] = (
            0  # columns that are zero, two of them both
        )
    block.linear("self_attn.v_proj").weight.data[10:20] = 0
    block.linear("mlp.up_proj").weight.data[:9] = 0
    block.linear("mlp.down_proj").weight.data[:, 5:12] = 0
    wanted = outputs(block)
    tried = candidates_of(Awq(grid=5), block, monkeypatch)
    assert list(tried) == EDGES
    for name, scales in tried.items():
        assert len(scales) == 10
        assert all((torch.isfinite(scale) & (scale > 0)).all() for scale in scales), name
    assert distance(outputs(block), wanted) < 1e-5


SEARCHES = pytest.mark.parametrize("stage", [Awq(grid=5), Equalize()], ids=lambda s: s.method)


@SEARCHES
@pytest.mark.parametrize(
    "zeroed", ["mlp.down_proj", "self_attn.o_proj", "mlp.up_proj", "self_attn.v_proj"]
)
def test_a_linear_of_zeros_is_survived(make_block: BlockMaker, zeroed: str, stage: Stage):
    """Layers added to a trained model begin like this."""
    block = correlate(make_block("llama"))
    block.linear(zeroed).weight.data.zero_()
    wanted = outputs(block)
    run(stage, block)
    assert all(torch.isfinite(parameter).all() for parameter in block.module.parameters())
    assert distance(outputs(block), wanted) < 1e-5


# Equalization


def test_equalization_never_raises_an_edges_error(make_block: BlockMaker, model_type: str):
    block = correlate(make_block(model_type))
    block.module.get_submodule("input_layernorm").weight.data[[7, 9]] *= 20
    wanted = outputs(block)
    run(Equalize(), block)
    ratios = {edge.name: block.report[edge.name]["search_ratio"] for edge in block.arch.edges}
    assert all(0 < ratio <= 1 for ratio in ratios.values())
    assert ratios["attn_norm"] < 0.95
    assert distance(outputs(block), wanted) < 1e-2  # norms keep their bfloat16


def test_a_scale_that_helps_nothing_is_not_folded(
    make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch
):
    block = correlate(make_block("llama"))
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    monkeypatch.setattr(  # whatever is tried errs more than nothing
        equalize_module,
        "feedback_error",
        lambda linears, columns, *_: 1 + float((columns - 1).abs().sum()),
    )
    run(Equalize(), block)
    assert {block.report[name]["search_ratio"] for name in EDGES} == {1.0}
    assert all(torch.equal(block.module.state_dict()[name], before[name]) for name in before)


def test_a_hessian_that_cannot_be_factored_leaves_the_edge_alone(make_block: BlockMaker):
    block = make_block("llama")
    block.inputs = [torch.zeros_like(x) for x in block.inputs]
    run(Equalize(), block)
    assert {block.report[name]["search_ratio"] for name in EDGES} == {1.0}


def test_equalized_linears_err_less_than_searched_ones(make_block: BlockMaker):
    """On the text that both saw, by the error that encoding leaves."""
    errors = {
        stage.method: block_error(make_block, (stage, Fireq(activations="none", damping=0.1)))
        for stage in (Awq(weight_exponents=(1.0,)), Equalize())
    }
    assert errors["equalize"] < errors["awq"]


def test_a_search_that_finds_nothing_leaves_the_edge_alone(make_block: BlockMaker):
    block = correlate(make_block("llama"))
    edge = block.arch.edge("attn_norm")
    poor = torch.exp(2 * torch.randn(128, generator=torch.Generator().manual_seed(0)))
    moments = moments_of(block, edge.sinks[0], fp8_activations=False)
    assert search(block, edge, [poor], moments.hessian, Grid(4, 128)) == (None, 1.0)


def test_balanced_scales_are_usable():
    scale = torch.tensor([4.0, 0.0, -1.0, torch.inf, torch.nan, 0.25, 16.0])
    assert balance(scale).tolist() == [2.0, 0.5, 0.5, 0.5, 0.5, 0.125, 8.0]


# Balance: where outlier channels come from must not matter


def inject(block: Block, edge_name: str) -> None:
    """Give channels of an edge outliers of 2⁴, 2⁵ and 2⁶, the function unchanged."""
    edge = block.arch.edge(edge_name)
    channels = len(block.module.get_submodule(edge.source).weight)
    scale = torch.ones(channels)
    chosen = torch.randperm(channels, generator=torch.Generator().manual_seed(5))[:6]
    scale[chosen] = 2.0 ** -torch.tensor([4.0, 4.0, 5.0, 5.0, 6.0, 6.0])
    block.fold(edge, scale)


def block_error(
    make_block: BlockMaker, stages: tuple[Stage, ...], injected: tuple[str, ...] = ()
) -> float:
    block = correlate(make_block("llama", with_parent=True))
    wanted = outputs(block)
    for edge_name in injected:
        inject(block, edge_name)
    assert distance(outputs(block), wanted) < 1e-6
    for stage in stages:
        run(stage, block)
    return distance(outputs(block), wanted)


BALANCED = {
    "awq": (Awq(weight_exponents=(1.0,)), Fireq()),
    "equalize": (Equalize(), Fireq()),
}


@functools.cache
def plain_error(make_block: BlockMaker, balance: str) -> float:
    return block_error(make_block, BALANCED[balance])


@pytest.mark.parametrize("balance", BALANCED)
@pytest.mark.parametrize("edges", [*((name,) for name in EDGES), tuple(EDGES)], ids="+".join)
def test_injected_outliers_do_not_change_the_result(
    make_block: BlockMaker, balance: str, edges: tuple[str, ...]
):
    ratio = block_error(make_block, BALANCED[balance], edges) / plain_error(make_block, balance)
    assert 1 / 1.05 < ratio < 1.05
