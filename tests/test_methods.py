"""What rtn, gptq, awq and cas promise, each against its own oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantize.methods.awq as awq_module
from quantize.arch import ARCHITECTURES, Edge
from quantize.block import Block, Moments
from quantize.methods import Stage
from quantize.methods.awq import Awq
from quantize.methods.cas import Cas
from quantize.methods.fireq import Fireq
from quantize.methods.gptq import Gptq
from quantize.methods.rtn import Rtn
from quantize.smoothing import balanced

BlockMaker = Callable[..., Block]
LINEARS = list(ARCHITECTURES["llama"].roles)
EDGES = [edge.name for edge in ARCHITECTURES["llama"].edges]


def correlate(block: Block, seed: int = 1) -> Block:
    """Give the block 320 tokens of inputs that mostly lie in 32 of its 128 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, block.shape.hidden, generator=generator)
    block.inputs = [
        torch.randn(2, 32, 32, generator=generator) @ mix
        + 0.3 * torch.randn(2, 32, block.shape.hidden, generator=generator)
        for _ in range(5)
    ]
    if block.reference_inputs is not None:
        block.reference_inputs = [x.clone() for x in block.inputs]
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


def with_hessian(block: Block, change: Callable[[Tensor], Tensor]) -> Block:
    """Let the block's statistics report a changed Hessian."""
    measure = block.moments

    def moments(*args: Any, **kwargs: Any) -> Moments:
        found = measure(*args, **kwargs)
        return replace(found, hessian=change(found.hessian.clone()))

    block.moments = moments  # type: ignore[method-assign]
    return block


def nearest(weight: Tensor, bits: int = 4, group: int = 128) -> Tensor:
    """Absmax rounding, written out."""
    grouped = weight.unflatten(1, (-1, group))
    top = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(dim=2, keepdim=True) / top).to(torch.bfloat16).float()
    return ((grouped / scale).round().clamp(-top - 1, top) * scale).flatten(1)


def squared_output_error(x: Tensor, quantized: Tensor, weight: Tensor) -> float:
    """Relative squared output error over the tokens x [T, K], in float64."""
    x, quantized, weight = x.double(), quantized.double(), weight.double()
    return float((x @ (quantized - weight).T).square().sum() / (x @ weight.T).square().sum())


def inputs_of(block: Block, name: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([x for (x,) in block.inputs_of((name,))])


# Rounding to nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("tail", [1, 3])
def test_rtn_clipping_never_costs_weight_error(make_block: BlockMaker, bits: int, group_size: int, tail: int):
    errors = {}
    for clip in ("absmax", "mse"):
        block = make_block("llama")
        for name in LINEARS:
            block.linear(name).weight.data = block.linear(name).weight ** tail  # odd: signs stay, tails grow
        run(Rtn(bits=bits, group_size=group_size, clip=clip), block)
        errors[clip] = {name: facts["weight_error"] for name, facts in block.report.items()}
    assert set(errors["mse"]) == set(LINEARS)
    for name, error in errors["mse"].items():
        assert error <= errors["absmax"][name] * (1 + 1e-6), name
    if bits < 8:
        assert sum(errors["mse"].values()) < 0.97 * sum(errors["absmax"].values())


def test_rtn_is_absmax_rounding(make_block: BlockMaker):
    weights = {name: make_block("llama").linear(name).weight for name in LINEARS}
    block = run(Rtn(), make_block("llama"))
    for name, packed in block.packed.items():
        assert torch.equal(packed.unpack(), nearest(weights[name])), name
        wanted = float((packed.unpack() - weights[name]).square().sum() / weights[name].square().sum())
        assert block.report[name]["weight_error"] == pytest.approx(wanted, rel=1e-5)


# GPTQ


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("name", LINEARS)
def test_gptq_has_less_output_error_than_rounding(make_block: BlockMaker, order: str, clip: str, name: str):
    plain = correlate(make_block("llama"))
    x, weight = inputs_of(plain, name), plain.linear(name).weight
    only = (f"*.{name}",)
    rounded = run(Rtn(clip=clip, layers=only), correlate(make_block("llama"))).packed[name].unpack()
    block = run(Gptq(order=order, clip=clip, layers=only), correlate(make_block("llama")))
    error = squared_output_error(x, block.packed[name].unpack(), weight)
    assert block.report[name]["output_error"] == pytest.approx(error, rel=1e-3)
    assert error < 0.8 * squared_output_error(x, rounded, weight)
    assert block.report[name]["damping"] == 0.01
    assert block.report[name]["dead_inputs"] == 0


@pytest.mark.parametrize("stage", [Gptq(), Gptq(order="natural"), Fireq(), Fireq(activations="none")], ids=str)
def test_dead_inputs_are_survived_and_noted(make_block: BlockMaker, stage: Stage):
    block = correlate(make_block("qwen3", reference=True))
    dead = [0, 5, 127]
    block.module.get_submodule("input_layernorm").weight.data[dead] = 0
    wanted = outputs(block)
    run(stage, block)
    for name in LINEARS:
        assert "fallback" not in block.report[name]
        assert block.report[name]["dead_inputs"] == (3 if name[-6:] in ("q_proj", "k_proj", "v_proj") else 0)
        assert torch.isfinite(block.module.get_submodule(name).weight).all()
        assert block.report[name]["output_error"] < 0.05
    assert distance(outputs(block), wanted) < 0.1


@pytest.mark.parametrize("stage", [Gptq(), Fireq(damping=0.01)], ids=str)
def test_an_indefinite_hessian_is_damped_tenfold(make_block: BlockMaker, stage: Stage):
    def shifted(H: Tensor) -> Tensor:
        # Smallest eigenvalue −0.05 of the mean: 0.01 is too little damping, 0.1 is enough.
        values, vectors = torch.linalg.eigh(H.double())
        values[0] = -0.05 * H.diagonal().mean()
        return ((vectors * values) @ vectors.T).float()

    block = run(stage, with_hessian(correlate(make_block("llama", reference=True)), shifted))
    for name in LINEARS:
        assert "fallback" not in block.report[name]
        assert block.report[name]["damping"] == pytest.approx(0.1), name
        assert block.report[name]["weight_error"] < 0.1


def test_a_singular_hessian_is_survived(make_block: BlockMaker):
    block = make_block("llama")
    block.inputs = [x[:1, :3] for x in block.inputs[:1]]  # three tokens for 128 inputs and more
    run(Gptq(), block)
    for name, facts in block.report.items():
        assert "fallback" not in facts, name
        assert facts["output_error"] < 0.01
        assert facts["weight_error"] < 0.1


@pytest.mark.parametrize("stage", [Gptq(), Fireq(), Fireq(activations="none")], ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), "negative"])
def test_an_unusable_hessian_falls_back_to_rounding(make_block: BlockMaker, stage: Stage, broken: float | str):
    def spoilt(H: Tensor) -> Tensor:
        if isinstance(broken, str):
            return -H
        H[3, 3] = broken
        return H

    block = run(stage, with_hessian(correlate(make_block("llama", reference=True)), spoilt))
    for name in LINEARS:
        facts = block.report[name]
        assert "rounded to nearest" in facts["fallback"], name
        assert 0 < facts["weight_error"] < 0.02
        assert not {"damping", "dead_inputs", "output_error"} & set(facts)
    if isinstance(stage, Gptq):
        expected = run(Rtn(clip="mse"), make_block("llama"))
        assert all(torch.equal(block.packed[name].codes, expected.packed[name].codes) for name in LINEARS)


# AWQ


def watch_folds(block: Block) -> dict[str, Tensor]:
    """Record the λ of every fold."""
    folds: dict[str, Tensor] = {}
    fold = block.fold

    def recorded(edge: Edge, scale: Tensor) -> None:
        folds[edge.name] = scale.clone()
        fold(edge, scale)

    block.fold = recorded  # type: ignore[method-assign]
    return folds


def sinks_error(block: Block, edge: Edge, bits: int) -> float:
    """Relative output error of an edge's sinks rounded as they are, from the activations themselves."""
    x = inputs_of(block, edge.sinks[0])
    weights = [block.linear(sink).weight for sink in edge.sinks]
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
    assert {"attn_norm", "up_down"} <= set(errors), "the search found nothing to gain"
    for name in EDGES:
        ratio = block.report[name]["search_ratio"]
        assert ratio <= 1
        assert (ratio < 1) == (name in errors)
        if name in errors:
            before, after = errors[name]
            # A norm keeps its bfloat16, so the λ that is folded is the one tried up to 2⁻⁹.
            assert after / before == pytest.approx(ratio, rel=0.05)
            assert after < 1.01 * before


def candidates_of(block: Block, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Run the search and return every λ it tried, by edge."""
    tried: dict[str, list[Tensor]] = {}
    search = awq_module.search

    def recorded(block: Block, edge: Edge, candidates: Any, *args: Any) -> Any:
        tried[edge.name] = list(candidates)
        return search(block, edge, tried[edge.name], *args)

    monkeypatch.setattr(awq_module, "search", recorded)
    run(Awq(grid=5), block)
    return tried


def test_awq_tries_usable_scales_whatever_is_dead(make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch):
    block = correlate(make_block("llama"))
    block.module.get_submodule("input_layernorm").weight.data[:4] = 0  # inputs that are always zero
    for sink in ("q_proj", "k_proj", "v_proj"):
        block.linear(f"self_attn.{sink}").weight.data[:, 2:8] = 0  # columns that are zero, two of them both
    block.linear("self_attn.v_proj").weight.data[10:20] = 0
    block.linear("mlp.up_proj").weight.data[:9] = 0
    block.linear("mlp.down_proj").weight.data[:, 5:12] = 0
    wanted = outputs(block)
    tried = candidates_of(block, monkeypatch)
    assert list(tried) == EDGES
    for name, scales in tried.items():
        assert len(scales) == 10
        for scale in scales:
            assert torch.isfinite(scale).all(), name
            assert (scale > 0).all(), name
    assert distance(outputs(block), wanted) < 1e-5


@pytest.mark.parametrize("zeroed", ["mlp.down_proj", "self_attn.o_proj", "mlp.up_proj", "self_attn.v_proj"])
def test_awq_survives_a_linear_of_zeros(make_block: BlockMaker, zeroed: str):
    """Layers added to a trained model begin like this."""
    block = correlate(make_block("llama"))
    block.linear(zeroed).weight.data.zero_()
    wanted = outputs(block)
    run(Awq(grid=5), block)
    assert all(torch.isfinite(parameter).all() for parameter in block.module.parameters())
    assert distance(outputs(block), wanted) < 1e-5


@settings(deadline=None)
@given(st.lists(st.one_of(st.floats(2.0**-60, 2.0**60), st.sampled_from([0.0, -1.0, float("inf"), float("nan")]))))
def test_balanced_scales_are_usable(values: list[float]):
    scale = torch.tensor([*values, 3.0])
    out = balanced(scale)
    assert torch.isfinite(out).all()
    assert (out > 0).all()
    assert float(out.max()) * float(out.min()) == pytest.approx(1, rel=1e-5)
    good = torch.isfinite(scale) & (scale > 0)
    assert torch.allclose(out[good] / out[-1], scale[good] / 3.0, rtol=1e-5, atol=0)
    assert torch.allclose(out[~good] * 3.0, out[-1].expand(int((~good).sum())), rtol=1e-5)


# Balance: where outlier channels come from must not matter


def inject(block: Block, edge_name: str) -> None:
    """Give channels of an edge outliers of 2⁴, 2⁵ and 2⁶, the function unchanged."""
    edge = block.arch.edge(edge_name)
    channels = len(block.module.get_submodule(edge.source).weight)
    scale = torch.ones(channels)
    chosen = torch.randperm(channels, generator=torch.Generator().manual_seed(5))[:6]
    scale[chosen] = 2.0 ** -torch.tensor([4.0, 4.0, 5.0, 5.0, 6.0, 6.0])
    block.fold(edge, scale)


def block_error(make_block: BlockMaker, stages: tuple[Stage, ...], injected: tuple[str, ...] = ()) -> float:
    block = correlate(make_block("llama", reference=True))
    wanted = outputs(block)
    for edge_name in injected:
        inject(block, edge_name)
    assert distance(outputs(block), wanted) < 1e-6
    for stage in stages:
        run(stage, block)
    return distance(outputs(block), wanted)


BALANCED = (Awq(weight_exponents=(1.0,)), Fireq())


@pytest.fixture(scope="module")
def plain_error(make_block: BlockMaker) -> float:
    return block_error(make_block, BALANCED)


@pytest.mark.parametrize("edges", [*((name,) for name in EDGES), tuple(EDGES)], ids="+".join)
def test_injected_outliers_do_not_change_the_result(make_block: BlockMaker, plain_error: float, edges: tuple[str, ...]):
    ratio = block_error(make_block, BALANCED, edges) / plain_error
    assert 1 / 1.05 < ratio < 1.05


def test_without_balance_injected_outliers_hurt(make_block: BlockMaker):
    """The property above is awq's doing."""
    assert block_error(make_block, (Fireq(),), tuple(EDGES)) > 3 * block_error(make_block, (Fireq(),))


# CAS


def column_mean(block: Block, edge: Edge) -> Tensor:
    return torch.cat([block.linear(sink).weight for sink in edge.sinks]).abs().mean(dim=0)


def test_cas_gives_every_column_its_constant(make_block: BlockMaker, model_type: str):
    constants = {"attn_norm": 0.02, "mlp_norm": 0.0096, "up_down": 0.015}
    block = make_block(model_type)
    before = {name: column_mean(block, block.arch.edge(name)) for name in constants}
    folds = watch_folds(block)
    run(Cas(qkv=0.02, up_gate=0.0096, down=0.015, v_mul=1.0), block)
    assert set(folds) == set(constants)
    for name, constant in constants.items():
        assert torch.allclose(folds[name] * before[name], torch.tensor(constant), rtol=1e-6, atol=0), name
    for name in ("attn_norm", "up_down"):  # up_proj's rows were divided after its columns were balanced
        after = column_mean(block, block.arch.edge(name))
        assert torch.allclose(after, torch.tensor(constants[name]), rtol=2**-8, atol=0), name


@pytest.mark.parametrize(
    ("field", "edge_name"), [("qkv", "attn_norm"), ("up_gate", "mlp_norm"), ("down", "up_down"), ("v_mul", "v_o")]
)
def test_cas_touches_the_configured_edge_only(make_block: BlockMaker, field: str, edge_name: str):
    off: dict[str, float] = {"qkv": 0, "up_gate": 0, "down": 0, "v_mul": 1}
    block, plain = make_block("llama"), make_block("llama")
    folds = watch_folds(block)
    run(Cas(**(off | {field: 0.05})), block)
    assert set(folds) == {edge_name}
    edge = block.arch.edge(edge_name)
    moved = {f"{name}.weight" for name in (edge.source, *edge.sinks)}
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, plain.module.get_parameter(name)) == (name not in moved), name


def test_cas_with_everything_off_does_nothing(make_block: BlockMaker):
    block, plain = make_block("llama"), make_block("llama")
    run(Cas(qkv=0, up_gate=0, down=0, v_mul=1), block)
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, plain.module.get_parameter(name)), name


def test_cas_scales_v_and_undoes_it_in_o(make_block: BlockMaker):
    block, plain = make_block("qwen2"), make_block("qwen2")
    run(Cas(up_gate=0, down=0, v_mul=0.9), block)
    for name, factor in {"v_proj.weight": 0.9, "v_proj.bias": 0.9, "o_proj.weight": 1 / 0.9}.items():
        new, old = (b.module.get_parameter(f"self_attn.{name}") for b in (block, plain))
        assert torch.allclose(new, factor * old, rtol=1e-6, atol=0), name


def test_cas_leaves_a_column_of_zeros(make_block: BlockMaker):
    block = make_block("llama")
    block.linear("mlp.down_proj").weight.data[:, 3] = 0
    before = block.linear("mlp.up_proj").weight.clone()
    folds = watch_folds(block)
    run(Cas(up_gate=0, v_mul=1), block)
    assert float(folds["up_down"][3]) == 1
    assert torch.equal(block.linear("mlp.up_proj").weight[3], before[3])
