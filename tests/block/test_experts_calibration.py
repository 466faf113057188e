"""Calibration of routed experts: what each one sees, in how many passes, and what happens where that is too little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import config_of, row_of
from torch import Tensor, nn

import quantize.block.measure as measure_module
from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.measure import moments_of
from quantize.block.statistics import profile
from quantize.block.teacher import keep_parent, teacher_of
from quantize.errors import ModelError
from quantize.formats.fp8 import quantize_activations
from quantize.methods import Stage
from quantize.methods.awq import Awq
from quantize.methods.cas import Cas
from quantize.methods.fireq.stage import Fireq
from quantize.methods.gptq import Gptq
from quantize.methods.rotate import Rotate
from quantize.methods.rtn import Rtn
from quantize.methods.sbvr.stage import Sbvr
from quantize.model.arch import ExpertSizes, Rows
from quantize.model.moe import MoeFfn, Router
from quantize.solvers.grid import Grid

BlockMaker = Callable[..., Block]
ROW = row_of("qwen2_moe")
GATES = [f"mlp.experts.{e}.gate_proj" for e in range(4)]
DOWNS = [f"mlp.experts.{e}.down_proj" for e in range(4)]
SBVR = {"lines": 8, "sweeps": 1}


@dataclass(frozen=True)
class Starved:
    """Every token visits experts 0 and 1, the first two of a batch expert 2, and none expert 3."""

    renormalize = False

    def select(self, scores: Tensor) -> Tensor:
        visits = torch.zeros_like(scores, dtype=torch.bool)
        visits[:, :2] = True
        visits[:2, 2] = True
        return visits


def starved(block: Block) -> Block:
    block.module.mlp.policy = Starved()
    return block


def run(stage: Stage, block: Block) -> Block:
    with torch.no_grad():
        stage.apply(block)
    return block


def outputs(block: Block, module: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([block.forward(module or block.module, x) for x in block.inputs])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def count_forwards(block: Block) -> list[int]:
    """A list that grows by one with every run of the block."""
    runs: list[int] = []
    forward = block.forward

    def counted(module: nn.Module, hidden: Tensor) -> Tensor:
        runs.append(len(hidden))
        return forward(module, hidden)

    block.forward = counted
    return runs


def encode_nearest(block: Block, name: str) -> None:
    grid, weight = Grid(2, 64), block.linear(name).weight
    scale, factor = grid.absmax_scale(weight)
    block.encode(name, grid.pack(grid.round(weight, scale, factor)[0], scale), False)


# What an expert sees


def routed_inputs(block: Block) -> dict[str, Tensor]:
    """Inputs of all routed experts' linears, tokens chosen and carried through the experts by hand, in float64."""
    moe = block.module.mlp
    x = torch.cat([hidden for (hidden,) in inputs_of(block, ("mlp",))])
    best = (x @ moe.gate.weight.T).topk(2, dim=1).indices
    out: dict[str, Tensor] = {}
    for e in range(4):
        seen = x[(best == e).any(dim=1)].double()
        expert = moe.experts[e]
        out[GATES[e]] = seen
        out[DOWNS[e]] = F.silu(seen @ expert.gate_proj.weight.T.double()) * (
            seen @ expert.up_proj.weight.T.double()
        )
    return out


@pytest.mark.parametrize("fp8", [False, True])
def test_one_pass_serves_all_experts(make_block: BlockMaker, fp8: bool):
    block = make_block("qwen2_moe")
    wanted, runs = routed_inputs(block), count_forwards(block)
    for names in (GATES, DOWNS):
        del runs[:]
        for name in names:
            moments = moments_of(block, name, fp8, with_parent=True)
            x = wanted[name]
            x = quantize_activations(x.float()).double() if fp8 else x
            assert moments.tokens == len(x) > 0
            # A value on the border of two E4M3 steps may fall to either side.
            assert difference(moments.hessian, x.T @ x / len(x)) < (1e-3 if fp8 else 1e-5)
            assert difference(moments.absmean, x.abs().mean(dim=0)) < (1e-3 if fp8 else 1e-5)
            assert moments.cross is None
            assert moments.wanted is None
        assert len(runs) == len(block.inputs)


def test_experts_in_one_pass_or_one_by_one(make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch):
    together = {
        n: m
        for b in [make_block("qwen2_moe")]
        for n in (*GATES, *DOWNS)
        for m in [moments_of(b, n, False)]
    }
    for at_once, passes in ((1, 4), (2, 2), (3, 2)):
        monkeypatch.setattr(measure_module, "ROUTED_BYTES", at_once * 4 * 128**2)
        block = make_block("qwen2_moe")
        runs = count_forwards(block)
        for names in (GATES, DOWNS):
            del runs[:]
            for name in names:
                assert torch.equal(moments_of(block, name, False).hessian, together[name].hessian)
            assert len(runs) == passes * len(block.inputs)
    monkeypatch.setattr(measure_module, "ROUTED_BYTES", 1)  # one at a time, however large
    assert torch.equal(
        moments_of(make_block("qwen2_moe"), DOWNS[3], False).hessian, together[DOWNS[3]].hessian
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda b: encode_nearest(b, "self_attn.v_proj"),
        lambda b: encode_nearest(b, "mlp.experts.2.up_proj"),
        lambda b: b.fold(b.arch.edge("mlp_norm"), torch.linspace(0.5, 2, 128)),
        lambda b: b.fold(b.arch.edge("up_down.2"), torch.linspace(0.5, 2, 128)),
        lambda b: b.scale_rows(Rows("mlp.experts.2.up_proj", 0, 128), torch.linspace(0.5, 2, 128)),
        lambda b: b.scale_rows(Rows("self_attn.q_proj", 0, 256), torch.full((256,), 0.1)),
        lambda b: b.map_inputs(lambda x: x * torch.linspace(-1, 1, 128)),
        lambda b: b.rotate_inputs(DOWNS[2]),
        lambda b: Rotate(down=True).apply(b),
        lambda b: moments_of(b, DOWNS[0], True),
    ],
)
def test_what_is_kept_is_dropped_when_it_no_longer_holds(
    make_block: BlockMaker, change: Callable[[Block], Any]
):
    block, fresh = make_block("qwen2_moe"), make_block("qwen2_moe")
    with torch.no_grad():
        moments_of(block, DOWNS[1], False)  # measures those of experts 2 and 3, too
        change(block)
        change(fresh)
    assert (
        difference(
            moments_of(block, DOWNS[2], False).hessian, moments_of(fresh, DOWNS[2], False).hessian
        )
        < 1e-6
    )


def test_siblings_leave_what_is_kept_alone(make_block: BlockMaker):
    block = make_block("qwen2_moe")
    moments_of(block, DOWNS[0], False)
    runs = count_forwards(block)
    encode_nearest(block, "mlp.experts.3.gate_proj")
    encode_nearest(block, "mlp.shared_expert.up_proj")
    block.fold(block.arch.edge("up_down.0"), torch.full((128,), 2.0))
    moments_of(block, DOWNS[1], False)
    moments_of(block, DOWNS[2], False)
    assert not runs
    moments_of(block, DOWNS[3], False)
    assert len(runs) == len(block.inputs)


@pytest.mark.parametrize(
    ("stage", "passes"),
    [
        (Gptq(), 7),
        (Gptq(token_weights="equal"), 6),
        (Fireq(aim="layer"), 7),
        (Sbvr(**SBVR, aim="layer"), 7),
        (Awq(grid=2), 5),
        (Cas(), 0),
        (Rtn(), 0),
    ],
    ids=lambda v: getattr(v, "method", str(v)),
)
def test_stages_run_a_block_as_often_as_they_must(
    make_block: BlockMaker, stage: Stage, passes: int
):
    """Inputs of attention, o_proj, both FFN steps of the shared expert and both of all others; a norm has but one.
    And what attention gives each token."""
    block = make_block("qwen2_moe")
    runs = count_forwards(block)
    run(stage, block)
    assert len(runs) == passes * len(block.inputs)
    assert not block.waiting


def test_tokens_that_overflow_are_dropped_by_expert(make_block: BlockMaker):
    block = make_block("qwen2_moe")
    clean = {name: moments_of(block, name, False) for name in DOWNS}
    block.linear("mlp.experts.1.up_proj").register_forward_hook(
        lambda _, __, out: out.index_fill(0, torch.tensor(0), torch.inf)
    )
    found = {name: moments_of(block, name, False) for name in DOWNS}
    assert found[DOWNS[1]].tokens == clean[DOWNS[1]].tokens - len(block.inputs)
    assert torch.isfinite(found[DOWNS[1]].hessian).all()
    assert {name: facts["dropped_tokens"] for name, facts in block.report.items()} == {
        DOWNS[1]: len(block.inputs)
    }


# Too few tokens


def test_an_expert_without_tokens_has_moments_of_zero(make_block: BlockMaker):
    block = starved(make_block("qwen2_moe"))
    for name in (*GATES, *DOWNS):
        moments = moments_of(block, name, True)
        assert (
            moments.tokens == {"0": 14 * 48, "1": 14 * 48, "2": 14 * 2, "3": 0}[name.split(".")[2]]
        )
        assert (
            bool((moments.hessian != 0).any())
            == bool((moments.absmean != 0).any())
            == bool(moments.tokens)
        )
    block.inputs = []
    with pytest.raises(ModelError, match=r"experts\.0\.gate_proj: no finite calibration inputs"):
        moments_of(block, GATES[0], False)


@pytest.mark.parametrize(
    ("stage", "plain", "what"),
    [
        (Gptq(), Rtn(clip="mse"), "rounded to nearest"),
        (Fireq(activations="none"), None, "rounded to nearest"),
        (Fireq(), None, "rounded to nearest"),
        (Sbvr(**SBVR), Sbvr(**SBVR, fit="data-free"), "fitted to the weights alone"),
    ],
    ids=lambda v: getattr(v, "method", None),
)
def test_experts_that_saw_too_little_are_fitted_without_data(
    make_block: BlockMaker, stage: Stage, plain: Stage | None, what: str
):
    block = run(stage, starved(make_block("qwen2_moe", with_parent=True)))
    expected = run(plain, make_block("qwen2_moe")) if plain else None
    for name in block.arch.roles:
        facts, expert = block.report[name], name.split(".")[2] if block.arch.is_routed(name) else ""
        assert torch.isfinite(block.module.get_submodule(name).weight).all()
        assert 0 < facts["weight_error"] < 0.05
        if expert not in ("2", "3"):
            assert "fallback" not in facts
            assert facts["output_error"] < facts["weight_error"]
            continue
        assert (
            facts["fallback"] == f"saw {28 if expert == '2' else 0} tokens for 128 inputs: {what}"
        )
        assert not {"damping", "output_error", "loss_share"} & set(facts)
        if expected is not None:
            assert torch.equal(block.packed[name].unpack(), expected.packed[name].unpack())


def test_as_many_tokens_as_inputs_are_enough(make_block: BlockMaker):
    for batches, enough in ((64, True), (63, False)):  # two tokens of each batch visit expert 2
        block = run(
            Gptq(layers=(f"*.{GATES[2]}",)), starved(make_block("qwen2_moe", batches=batches))
        )
        assert ("fallback" not in block.report[GATES[2]]) == enough


def test_awq_leaves_edges_alone_that_saw_too_little(make_block: BlockMaker):
    block, plain = starved(make_block("qwen2_moe")), starved(make_block("qwen2_moe"))
    run(Awq(grid=5), block)
    assert difference(outputs(block), outputs(plain)) < 1e-5
    for name, parameter in block.module.named_parameters():
        assert torch.isfinite(parameter).all(), name
    noted = {
        name: facts.get("left_alone")
        for name, facts in block.report.items()
        if name.startswith("up_down")
    }
    assert noted == {
        "up_down.shared": None,
        "up_down.0": None,
        "up_down.1": None,
        "up_down.2": "saw 28 tokens for 128 inputs",
        "up_down.3": "saw 0 tokens for 128 inputs",
    }
    for e, moved in enumerate((True, True, False, False)):
        before, after = (b.linear(DOWNS[e]).weight for b in (plain, block))
        assert torch.equal(before, after) != moved


def test_routers_are_folded_into_but_not_rounded(make_block: BlockMaker):
    """A router of any weights gives the same scales, and still scores as before."""
    folds: list[Tensor] = []
    for factor in (1.0, 1000.0):
        block = make_block("qwen2_moe")
        routers = [m for m in block.module.modules() if isinstance(m, Router)]
        assert len(routers) == 2
        for router in routers:
            router.weight.data = router.weight * factor
        hidden = torch.cat([x for (x,) in inputs_of(block, ("mlp",))])
        scores = [router(hidden) for router in routers]
        norm = block.module.get_submodule("post_attention_layernorm").weight.clone()
        run(Awq(weight_exponents=(1.0,)), block)
        hidden = torch.cat([x for (x,) in inputs_of(block, ("mlp",))])
        assert all(difference(r(hidden), s) < 1e-5 for r, s in zip(routers, scores, strict=True))
        folds.append(norm / block.module.get_submodule("post_attention_layernorm").weight)
    assert difference(folds[0], torch.ones(128)) > 0.1
    assert torch.equal(folds[0], folds[1])


def test_profiles_count_the_tokens_of_each_expert(make_block: BlockMaker):
    block = starved(make_block("qwen2_moe"))
    found = profile(block)["inputs"]
    assert list(found) == [group[0] for group in ROW.calibration_order]
    tokens = {name: facts["tokens"] for name, facts in found.items()}
    everything = 14 * 48
    assert tokens == dict.fromkeys(found, everything) | {
        name: count
        for names in (GATES, DOWNS)
        for name, count in zip(names[2:], (28, 0), strict=True)
    }
    assert found[DOWNS[3]]["absmax"] == 0
    largest = max(float(x.abs().max()) for (x,) in inputs_of(block, (DOWNS[2],)))
    assert found[DOWNS[2]]["absmax"] == pytest.approx(largest, rel=1e-5)


# The parent


def with_experts(block: Block) -> Block:
    """Put experts where the block had a dense FFN, as a restructure stage does."""
    keep_parent(block)
    torch.manual_seed(4)
    ffn = (
        MoeFfn(128, ExpertSizes.of(config_of("qwen2_moe")), nn.SiLU()).requires_grad_(False).eval()
    )
    for parameter in ffn.parameters():
        parameter.data.normal_(std=128**-0.5)
    block.replace_ffn(ffn, ROW)
    return block


@pytest.mark.parametrize(
    "smooth",
    [(), (Awq(grid=5),), (Cas(),), (Rotate(seed=2),), (Awq(grid=5), Rotate(down=True))],
    ids=lambda stages: "+".join(stage.method for stage in stages) or "none",
)
def test_the_parent_may_have_a_dense_ffn(make_block: BlockMaker, smooth: tuple[Stage, ...]):
    block = make_block("qwen2_moe", index=1, with_parent=True, batches=12)
    assert block.parent_inputs is not None
    noise = torch.Generator().manual_seed(5)
    block.inputs = [x + 0.3 * torch.randn(x.shape, generator=noise) for x in block.inputs]
    with torch.no_grad():
        wanted = torch.cat([block.forward(block.module, x) for x in block.parent_inputs])
    with_experts(block)
    for stage in smooth:
        run(stage, block)
        wanted = stage.to_basis(wanted)
    run(Fireq(layers=("*.q_proj", "*.k_proj", "*.v_proj")), block)
    names = ("input_layernorm", "self_attn.o_proj")
    (r, x), (parents_r, parents) = (
        [
            torch.cat(seen).double()
            for seen in zip(*inputs_of(block, names, module, stream), strict=True)
        ]
        for module, stream in (
            (block.module, block.inputs),
            (block.frozen, block.parent_inputs),
        )
    )
    moments = moments_of(block, names[1], False, with_parent=True)
    assert moments.wanted is not None
    made = parents @ block.frozen.get_submodule(names[1]).weight.double().T
    assert difference(moments.wanted, (made + parents_r - r).T @ x / len(x)) < 1e-5
    assert difference(x, parents) < 0.6  # the same channels, with drift between them
    for name in ("mlp.shared_expert.gate_proj", GATES[0], DOWNS[1]):
        assert moments_of(block, name, False, with_parent=True).wanted is None
    with torch.no_grad():
        found = torch.cat([block.forward(teacher_of(block), x) for x in block.parent_inputs])
    assert difference(found, wanted) < 1e-5
