"""FireQ: the paper's two scale rules, what descent stores, and what each of its parts is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import ARCHITECTURES
from torch import Tensor

import quantize.methods.fireq.stage as fireq_module
from quantize.block.block import Block
from quantize.block.measure import moments_of
from quantize.block.moments import Moments
from quantize.methods import Stage
from quantize.methods.cas import Cas
from quantize.methods.fireq.stage import Fireq, tensor_scale
from quantize.methods.gptq import Gptq
from quantize.model.arch import Edge
from quantize.solvers.feedback import Rounded, loss
from quantize.solvers.grid import Grid

BlockMaker = Callable[..., Block]
LINEARS = list(ARCHITECTURES["llama"].roles)
DESCENTS = {
    "row": Fireq(),
    "layer": Fireq(aim="layer"),
    "error feedback alone": Fireq(sweeps=0),
}


def correlated_block(
    make_block: BlockMaker, model_type: str = "llama", drift: float = 0.0
) -> Block:
    """A block whose inputs mostly lie in 24 dimensions; `drift` is what earlier blocks got wrong, relatively."""
    block = make_block(model_type, with_parent=True)
    generator = torch.Generator().manual_seed(3)
    D = block.shape.hidden
    mix, wrong = (torch.randn(D, D, generator=generator) * D**-0.5 for _ in range(2))
    clean = [
        4 * torch.randn(2, 48, 24, generator=generator) @ mix[:24]
        + 0.3 * torch.randn(2, 48, D, generator=generator)
        for _ in range(6)
    ]
    block.parent_inputs = clean
    block.inputs = [x + drift * x @ wrong for x in clean]
    return block


def run(stage: Stage, block: Block) -> Block:
    with torch.no_grad():
        stage.apply(block)
    return block


def outputs(block: Block, stream: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([block.forward(block.module, x) for x in stream])


# The paper's per-tensor scale


def brute_force(weight: Tensor, group_size: int) -> float:
    """The docstring of `tensor_scale`, read literally in float64."""
    largest = [float(g.abs().max()) for row in weight.double() for g in row.split(group_size)]
    costs = {
        2.0**i: sum(max(0.0, 7 * 2.0**-9 - m * 2.0**i) for m in largest)
        for i in range(15)
        if all(m * 2.0**i <= 448 for m in largest)
    }
    return min(costs, key=lambda t: (costs[t], t), default=1.0)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(-24, 11), st.floats(1, 2, exclude_max=True)), min_size=4, max_size=4
    )
)
@example([(7, 1.75), *[(-20, 1.0)] * 3])  # 448 itself, at t = 2, is allowed
@example([(8, 1.76)] * 4)  # above 448 already at t = 1
@example([(-200, 1.0)] * 4)  # nothing helps
def test_tensor_scale_is_what_its_docstring_says(magnitudes: list[tuple[int, float]]):
    weight = torch.full((2, 32), 2.0**-30)
    for i, (exponent, mantissa) in enumerate(magnitudes):
        weight[i // 2, 16 * (i % 2) + 3] = -mantissa * 2.0**exponent
    assert tensor_scale(weight, 16) == brute_force(weight, 16)


def test_tensor_scale_of_plain_weights():
    weight = torch.full((4, 128), 0.02)
    assert tensor_scale(weight, 128) == 1  # 0.02 > 7·2⁻⁹: nothing would underflow
    assert tensor_scale(weight / 2**4, 128) == 2**4
    assert tensor_scale(weight / 2**30, 128) == 2**14
    assert tensor_scale(torch.zeros(4, 128), 128) == 1


@pytest.mark.parametrize("size", [1.0, 2.0**-6, 2.0**-12])
def test_tensor_scales_are_e4m3_by_a_power_of_two(make_block: BlockMaker, size: float):
    block = make_block("llama")
    weights = {}
    for name in LINEARS:
        block.linear(name).weight.data *= size
        weights[name] = block.linear(name).weight.clone()
    run(Fireq(rounding="nearest", scales="tensor"), block)
    for name, packed in block.packed.items():
        t = block.report[name]["tensor_scale"]
        assert t == brute_force(weights[name], 128), name
        scaled = packed.scale.float() * t
        assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), scaled), name
        assert (scaled > 0).all()
        wanted = weights[name].unflatten(1, (-1, 128)).abs().amax(dim=2) / 7
        assert torch.allclose(packed.scale.float(), wanted, rtol=2**-4, atol=2.0**-9 / t), name
        assert block.report[name]["weight_error"] < 0.04  # a scale of 2⁻⁹ · t⁻¹ has few digits
    if size < 0.1:
        assert all(block.report[name]["tensor_scale"] > 1 for name in LINEARS)


# What descent stores


def fitted_by(stage: Fireq, block: Block, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Run a stage and return the weight that the solver fitted to each layer, in order."""
    fitted: list[Tensor] = []
    descend = fireq_module.descend

    def recorded(
        w: Tensor, rounded: Rounded, hessian: Tensor, grid: Grid, sweeps: int, lost: Tensor
    ) -> Rounded:
        assert torch.allclose(lost, loss(w, rounded, hessian, grid), rtol=1e-3)
        out = descend(w, rounded, hessian, grid, sweeps, lost)
        fitted.append(out.value(grid))
        return out

    monkeypatch.setattr(fireq_module, "descend", recorded)
    run(stage, block)
    return fitted


@pytest.mark.parametrize("activations", ["fp8", "none"])
@pytest.mark.parametrize("variant", DESCENTS)
def test_the_stored_weight_is_the_fitted_one(
    make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch, variant: str, activations: str
):
    stage = DESCENTS[variant].model_copy(update={"activations": activations})
    block = correlated_block(make_block, drift=0.02)
    weights = {name: block.linear(name).weight.clone() for name in LINEARS}
    hessians: dict[str, Tensor] = {}

    def moments(block: Block, name: str, *args: Any, **kwargs: Any) -> Moments:
        found = moments_of(block, name, *args, **kwargs)
        group = next(group for group in block.arch.calibration_order if name in group)
        hessians.update(dict.fromkeys(group, found.hessian))
        return found

    monkeypatch.setattr(fireq_module, "moments_of", moments)
    fitted = fitted_by(stage, block, monkeypatch)
    assert list(block.packed) == [name for group in block.arch.calibration_order for name in group]
    for (name, packed), value in zip(block.packed.items(), fitted, strict=True):
        stored = packed.kernel_weight() if activations == "fp8" else packed.unpack()
        assert torch.equal(stored, value), name
        delta, weight, H = (
            (stored - weights[name]).double(),
            weights[name].double(),
            hessians[name].double(),
        )
        error = float(((delta @ H) * delta).sum() / ((weight @ H) * weight).sum())
        assert block.report[name]["output_error"] == pytest.approx(error, rel=1e-3), name
        assert block.report[name]["weight_error"] == pytest.approx(
            float(delta.square().sum() / weight.square().sum()), rel=1e-4
        )


def test_row_scales_survive_a_reload_by_the_row_factor(make_block: BlockMaker):
    """vLLM divides each row's scales by rowmax / 448 and rounds to E4M3: nothing may be lost."""
    for packed in run(Fireq(), correlated_block(make_block)).packed.values():
        scale = packed.scale.float()
        factor = scale.abs().amax(dim=1, keepdim=True) / 448
        code = (scale / factor).to(torch.float8_e4m3fn).float()
        assert torch.equal((code * factor).to(torch.bfloat16), packed.scale)


def test_all_but_the_papers_rounding_use_signed_scales(make_block: BlockMaker, model_type: str):
    for scales in ("row", "tensor", "bf16"):
        stage = Fireq(rounding="nearest", scales=scales)
        for packed in run(stage, correlated_block(make_block, model_type)).packed.values():
            assert (packed.scale > 0).all(), scales
    for packed in run(Fireq(signed_scales=False), correlated_block(make_block)).packed.values():
        assert (packed.scale > 0).all()
    for stage in (Fireq(), Fireq(activations="none")):
        for name, packed in run(stage, correlated_block(make_block, model_type)).packed.items():
            share = float((packed.scale < 0).float().mean())
            assert 0.2 < share < 0.8, (stage.activations, name)
            assert int(packed.codes.min()) == -8


# What it is worth


def error_against_parent(make_block: BlockMaker, stage: Stage, drift: float) -> float:
    """Relative output error of a block that receives drifted inputs, against the parent on its own."""
    block = correlated_block(make_block, drift=drift)
    assert block.parent_inputs is not None
    wanted = outputs(block, block.parent_inputs)
    run(stage, block)
    return float((outputs(block, block.inputs) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("activations", ["fp8", "none"])
def test_each_part_brings_the_block_nearer_to_its_parent(make_block: BlockMaker, activations: str):
    def error(stage: Stage) -> float:
        # All of them damp alike: by how much is a question of other text, and this is the fitted one.
        alike = {"activations": activations, "damping": 0.1}
        return error_against_parent(make_block, stage.model_copy(update=alike), drift=0.05)

    gptq = error(Gptq())
    layer = {sweeps: error(Fireq(aim="layer", sweeps=sweeps)) for sweeps in (0, 4)}
    parent = {sweeps: error(Fireq(sweeps=sweeps)) for sweeps in (0, 4)}
    assert layer[4] < gptq
    assert parent[4] < gptq
    assert parent[0] < layer[0]
    assert parent[4] < layer[4]
    assert layer[4] < layer[0]
    assert parent[4] < parent[0]


def test_without_drift_sweeps_alone_are_worth_it(make_block: BlockMaker):
    gptq = error_against_parent(make_block, Gptq(activations="fp8"), drift=0)
    errors = [
        error_against_parent(make_block, Fireq(sweeps=sweeps), drift=0) for sweeps in (0, 1, 4)
    ]
    assert errors[2] < gptq
    assert errors[2] <= errors[1] < errors[0]


def test_what_is_measured_follows_the_fields():
    assert (Fireq().needs_inputs, Fireq().needs_parent) == (True, True)
    assert (Fireq(aim="layer").needs_inputs, Fireq(aim="layer").needs_parent) == (True, False)
    assert (Fireq(rounding="nearest").needs_inputs, Fireq(rounding="nearest").needs_parent) == (
        False,
        False,
    )


# Channel-wise absmean scaling


def watch_folds(block: Block) -> dict[str, Tensor]:
    """Record the λ of every fold."""
    folds: dict[str, Tensor] = {}
    fold = block.fold

    def recorded(edge: Edge, scale: Tensor) -> None:
        folds[edge.name] = scale.clone()
        fold(edge, scale)

    block.fold = recorded  # type: ignore[method-assign]
    return folds


def column_mean(block: Block, edge: Edge) -> Tensor:
    return (
        torch.cat([block.linear(sink).weight for sink in block.rounded_sinks(edge)])
        .abs()
        .mean(dim=0)
    )


def test_cas_gives_every_column_its_constant(make_block: BlockMaker, model_type: str):
    of_kind = {"attn_norm": 0.02, "mlp_norm": 0.0096, "up_down": 0.015}
    block = make_block(model_type)
    edges = {
        edge.name: edge.name.partition(".")[0] for edge in block.arch.edges
    }  # up_down.3 is of expert 3
    constants = {name: of_kind[kind] for name, kind in edges.items() if kind in of_kind}
    before = {name: column_mean(block, block.arch.edge(name)) for name in constants}
    folds = watch_folds(block)
    run(Cas(qkv=0.02, up_gate=0.0096, down=0.015, v_mul=1.0), block)
    assert set(folds) == set(constants)
    for name, constant in constants.items():
        assert torch.allclose(
            folds[name] * before[name], torch.tensor(constant), rtol=1e-6, atol=0
        ), name
    for name in set(constants) - {
        "mlp_norm"
    }:  # up_proj's rows were divided after its columns were balanced
        after = column_mean(block, block.arch.edge(name))
        assert torch.allclose(after, torch.tensor(constants[name]), rtol=2**-8, atol=0), name


@pytest.mark.parametrize(
    ("field", "edge_name"),
    [("qkv", "attn_norm"), ("up_gate", "mlp_norm"), ("down", "up_down"), ("v_mul", "v_o")],
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
    for name, factor in {
        "v_proj.weight": 0.9,
        "v_proj.bias": 0.9,
        "o_proj.weight": 1 / 0.9,
    }.items():
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
