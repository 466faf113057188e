"""Calibration of routed experts: what each one sees, in how many passes, and what happens where that is too little."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import config_of, random_weights, request_for, row_of, save_model, save_side_files
from torch import Tensor, nn

import quantize.block as block_module
from quantize.allocation import Space
from quantize.arch import ARCHITECTURES, ExpertSizes
from quantize.block import Block
from quantize.checkpoint import Checkpoint
from quantize.convert import convert
from quantize.errors import ModelError
from quantize.formats.fp8 import quantize_activations
from quantize.grid import Grid
from quantize.methods import Stage
from quantize.methods.awq import Awq
from quantize.methods.cas import Cas
from quantize.methods.fireq import Fireq
from quantize.methods.gptq import Gptq
from quantize.methods.rotate import Rotate
from quantize.methods.rtn import Rtn
from quantize.methods.sbvr import Sbvr
from quantize.moe import MoeFfn, Router
from quantize.recipe import parse_recipe
from quantize.statistics import profile
from quantize.streams import Streams

Maker = Callable[..., Path]
BlockMaker = Callable[..., Block]
Call = Callable[..., tuple[int, str, str]]
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
    x = torch.cat([hidden for (hidden,) in block.inputs_of(("mlp",))])
    best = (x @ moe.gate.weight.T).topk(2, dim=1).indices
    out: dict[str, Tensor] = {}
    for e in range(4):
        seen = x[(best == e).any(dim=1)].double()
        expert = moe.experts[e]
        out[GATES[e]] = seen
        out[DOWNS[e]] = F.silu(seen @ expert.gate_proj.weight.T.double()) * (seen @ expert.up_proj.weight.T.double())
    return out


@pytest.mark.parametrize("fp8", [False, True])
def test_one_pass_serves_all_experts(make_block: BlockMaker, fp8: bool):
    block = make_block("qwen2_moe")
    wanted, runs = routed_inputs(block), count_forwards(block)
    for names in (GATES, DOWNS):
        del runs[:]
        for name in names:
            moments = block.moments(name, fp8, with_reference=True)
            x = wanted[name]
            x = quantize_activations(x.float()).double() if fp8 else x
            assert moments.tokens == len(x) > 0
            # A value on the border of two E4M3 steps may fall to either side.
            assert difference(moments.hessian, x.T @ x / len(x)) < (1e-3 if fp8 else 1e-5)
            assert difference(moments.absmean, x.abs().mean(dim=0)) < (1e-3 if fp8 else 1e-5)
            assert moments.cross is None
            assert moments.residual is None
        assert len(runs) == len(block.inputs)


def test_experts_in_one_pass_or_one_by_one(make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch):
    together = {n: m for b in [make_block("qwen2_moe")] for n in (*GATES, *DOWNS) for m in [b.moments(n, False)]}
    for at_once, passes in ((1, 4), (2, 2), (3, 2)):
        monkeypatch.setattr(block_module, "_KEPT_BYTES", at_once * 4 * 128**2)
        block = make_block("qwen2_moe")
        runs = count_forwards(block)
        for names in (GATES, DOWNS):
            del runs[:]
            for name in names:
                assert torch.equal(block.moments(name, False).hessian, together[name].hessian)
            assert len(runs) == passes * len(block.inputs)
    monkeypatch.setattr(block_module, "_KEPT_BYTES", 1)  # one at a time, however large
    assert torch.equal(make_block("qwen2_moe").moments(DOWNS[3], False).hessian, together[DOWNS[3]].hessian)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: encode_nearest(b, "self_attn.v_proj"),
        lambda b: encode_nearest(b, "mlp.experts.2.up_proj"),
        lambda b: b.fold(b.arch.edge("mlp_norm"), torch.linspace(0.5, 2, 128)),
        lambda b: b.fold(b.arch.edge("up_down.2"), torch.linspace(0.5, 2, 128)),
        lambda b: b.scale_rows("mlp.experts.2.up_proj", torch.linspace(0.5, 2, 128)),
        lambda b: b.scale_rows("self_attn.q_proj", torch.full((256,), 0.1)),
        lambda b: b.map_inputs(lambda x: x * torch.linspace(-1, 1, 128)),
        lambda b: b.rotate_inputs(DOWNS[2]),
        lambda b: Rotate(down=True).apply(b),
        lambda b: b.moments(DOWNS[0], True),
    ],
)
def test_what_is_kept_is_dropped_when_it_no_longer_holds(make_block: BlockMaker, change: Callable[[Block], Any]):
    block, fresh = make_block("qwen2_moe"), make_block("qwen2_moe")
    with torch.no_grad():
        block.moments(DOWNS[1], False)  # measures those of experts 2 and 3, too
        change(block)
        change(fresh)
    assert difference(block.moments(DOWNS[2], False).hessian, fresh.moments(DOWNS[2], False).hessian) < 1e-6


def test_siblings_leave_what_is_kept_alone(make_block: BlockMaker):
    block = make_block("qwen2_moe")
    block.moments(DOWNS[0], False)
    runs = count_forwards(block)
    encode_nearest(block, "mlp.experts.3.gate_proj")
    encode_nearest(block, "mlp.shared_expert.up_proj")
    block.fold(block.arch.edge("up_down.0"), torch.full((128,), 2.0))
    block.moments(DOWNS[1], False)
    block.moments(DOWNS[2], False)
    assert not runs
    block.moments(DOWNS[3], False)
    assert len(runs) == len(block.inputs)


@pytest.mark.parametrize(
    ("stage", "passes"),
    [(Gptq(), 6), (Fireq(aim="layer"), 6), (Sbvr(**SBVR, aim="layer"), 6), (Awq(grid=2), 5), (Cas(), 0), (Rtn(), 0)],
    ids=lambda v: getattr(v, "method", str(v)),
)
def test_stages_run_a_block_as_often_as_they_must(make_block: BlockMaker, stage: Stage, passes: int):
    """Inputs of attention, o_proj, both FFN steps of the shared expert and both of all others; a norm has but one."""
    block = make_block("qwen2_moe")
    runs = count_forwards(block)
    run(stage, block)
    assert len(runs) == passes * len(block.inputs)
    assert not block._kept


def test_tokens_that_overflow_are_dropped_by_expert(make_block: BlockMaker):
    block = make_block("qwen2_moe")
    clean = {name: block.moments(name, False) for name in DOWNS}
    block.linear("mlp.experts.1.up_proj").register_forward_hook(
        lambda _, __, out: out.index_fill(0, torch.tensor(0), torch.inf)
    )
    found = {name: block.moments(name, False) for name in DOWNS}
    assert found[DOWNS[1]].tokens == clean[DOWNS[1]].tokens - len(block.inputs)
    assert torch.isfinite(found[DOWNS[1]].hessian).all()
    assert {name: facts["dropped_tokens"] for name, facts in block.report.items()} == {DOWNS[1]: len(block.inputs)}


# Too few tokens


def test_an_expert_without_tokens_has_moments_of_zero(make_block: BlockMaker):
    block = starved(make_block("qwen2_moe"))
    for name in (*GATES, *DOWNS):
        moments = block.moments(name, True)
        assert moments.tokens == {"0": 14 * 48, "1": 14 * 48, "2": 14 * 2, "3": 0}[name.split(".")[2]]
        assert bool((moments.hessian != 0).any()) == bool((moments.absmean != 0).any()) == bool(moments.tokens)
    block.inputs = []
    with pytest.raises(ModelError, match=r"experts\.0\.gate_proj: no finite calibration inputs"):
        block.moments(GATES[0], False)


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
    block = run(stage, starved(make_block("qwen2_moe", reference=True)))
    expected = run(plain, make_block("qwen2_moe")) if plain else None
    for name in block.arch.roles:
        facts, expert = block.report[name], name.split(".")[2] if block.arch.is_routed(name) else ""
        assert torch.isfinite(block.module.get_submodule(name).weight).all()
        assert 0 < facts["weight_error"] < 0.05
        if expert not in ("2", "3"):
            assert "fallback" not in facts
            assert facts["output_error"] < facts["weight_error"]
            continue
        assert facts["fallback"] == f"saw {28 if expert == '2' else 0} tokens for 128 inputs: {what}"
        assert not {"damping", "output_error", "loss_share"} & set(facts)
        if expected is not None:
            assert torch.equal(block.packed[name].unpack(), expected.packed[name].unpack())


def test_as_many_tokens_as_inputs_are_enough(make_block: BlockMaker):
    for batches, enough in ((64, True), (63, False)):  # two tokens of each batch visit expert 2
        block = run(Gptq(layers=(f"*.{GATES[2]}",)), starved(make_block("qwen2_moe", batches=batches)))
        assert ("fallback" not in block.report[GATES[2]]) == enough


def test_awq_leaves_edges_alone_that_saw_too_little(make_block: BlockMaker):
    block, plain = starved(make_block("qwen2_moe")), starved(make_block("qwen2_moe"))
    run(Awq(grid=5), block)
    assert difference(outputs(block), outputs(plain)) < 1e-5
    for name, parameter in block.module.named_parameters():
        assert torch.isfinite(parameter).all(), name
    noted = {name: facts.get("left_alone") for name, facts in block.report.items() if name.startswith("up_down")}
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
        hidden = torch.cat([x for (x,) in block.inputs_of(("mlp",))])
        scores = [router(hidden) for router in routers]
        norm = block.module.get_submodule("post_attention_layernorm").weight.clone()
        run(Awq(weight_exponents=(1.0,)), block)
        hidden = torch.cat([x for (x,) in block.inputs_of(("mlp",))])
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
        name: count for names in (GATES, DOWNS) for name, count in zip(names[2:], (28, 0), strict=True)
    }
    assert found[DOWNS[3]]["absmax"] == 0
    largest = max(float(x.abs().max()) for (x,) in block.inputs_of((DOWNS[2],)))
    assert found[DOWNS[2]]["absmax"] == pytest.approx(largest, rel=1e-5)


# The parent


def with_experts(block: Block) -> Block:
    """Put experts where the block had a dense FFN, which is frozen as what the parent computes."""
    block.freeze_reference()
    config = config_of("qwen2_moe")
    torch.manual_seed(4)
    ffn = MoeFfn(128, ExpertSizes.of(config), "silu").requires_grad_(False).eval()
    for name, parameter in ffn.named_parameters():
        parameter.data.normal_(std=128**-0.5)
        block.storage[f"mlp.{name}"] = torch.bfloat16
    block.module.mlp = ffn
    block.arch = ROW
    return block


@pytest.mark.parametrize("smooth", [(), (Awq(grid=5),), (Cas(),), (Rotate(seed=2),), (Awq(grid=5), Rotate(down=True))])
def test_attention_aims_at_a_parent_with_a_dense_ffn(make_block: BlockMaker, smooth: tuple[Stage, ...]):
    block = make_block("qwen2_moe", index=1, reference=True, batches=12)
    assert block.reference_inputs is not None
    noise = torch.Generator().manual_seed(5)
    for batch, x in enumerate(block.inputs):
        block.inputs[batch] = x + 0.3 * torch.randn(x.shape, generator=noise)
    with torch.no_grad():
        teacher = torch.cat([block.forward(block.module, x) for x in block.reference_inputs])
    with_experts(block)
    turn: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    for stage in smooth:
        run(stage, block)
        turn = stage.to_basis if stage.changes_basis else turn
    assert block.reference is not None
    run(Fireq(layers=("*.q_proj", "*.k_proj", "*.v_proj")), block)
    streams = Streams(list(block.inputs), list(block.reference_inputs))
    name, (ours, theirs) = (
        "self_attn.o_proj",
        (
            [
                torch.cat(x)
                for x in zip(*block.inputs_of(("input_layernorm", "self_attn.o_proj"), module, stream), strict=True)
            ]
            for module, stream in ((block.module, block.inputs), (block.reference, block.reference_inputs))
        ),
    )
    moments = block.moments(name, False, with_reference=True)
    x, parents = ours[1].double(), theirs[1].double()
    assert moments.cross is not None
    assert moments.residual is not None
    assert difference(moments.cross, parents.T @ x / len(x)) < 1e-5
    assert difference(moments.residual, (theirs[0] - ours[0]).double().T @ x / len(x)) < 1e-5
    # Both have the same channels, so that what is left between them is drift alone.
    assert difference(x, parents) < 0.6
    for ffn in ("mlp.shared_expert.gate_proj", GATES[0], DOWNS[1]):
        assert block.moments(ffn, False, with_reference=True).cross is None
    with torch.no_grad():
        streams.advance(block)
    assert streams.reference is not None
    assert difference(torch.cat(streams.reference), turn(teacher)) < 1e-5


# Whole models


def facts_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pq.json").read_text())
    return found


RECIPES = ("rtn", "gptq", "awq", "fireq-paper-linear", "fireq-linear", "fireq", "fireq-kv", "fireq-paper", "sbvr")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_converts_experts(tiny: Maker, converted: Maker, recipe: str):
    changes = ("sbvr.lines=8", "sbvr.sweeps=1") if recipe.startswith("sbvr") else ()
    out = converted(recipe, "qwen2_moe", *changes)
    facts, source, written = facts_of(out), Checkpoint(tiny("qwen2_moe")), Checkpoint(out)
    linears = {f"model.layers.{i}.{name}" for i in range(2) for name in row_of("qwen2_moe", i).roles}
    packed = {name.removesuffix(".weight_packed") for name in written.names() if name.endswith(".weight_packed")}
    if recipe.startswith("sbvr"):
        packed = {name.rpartition(".")[0] for name in written.names() if name.endswith(".weight_lines")}
    assert packed == (set() if recipe == "fireq-kv" else linears)
    for name in packed:
        assert 0 < facts["layers"][name]["weight_error"] < 0.1, name
        assert "fallback" not in facts["layers"][name], name
    routers = [name for name in source.names() if name.endswith((".gate.weight", ".shared_expert_gate.weight"))]
    assert len(routers) == 2
    smoothed = recipe not in ("rtn", "gptq", "fireq-kv")
    for name in routers:
        assert written.tensor(name).dtype == torch.bfloat16
        assert torch.equal(written.tensor(name), source.tensor(name)) != smoothed


def test_the_summary_and_the_command_line_name_fallbacks(pq: Call, tiny: Maker, text_file: Path, tmp_path: Path):
    options = ["--dataset", text_file, "--nsamples", 2, "--seqlen", 32, "--device", "cpu"]
    code, _, err = pq("convert", "-m", tiny("qwen2_moe"), "-r", "gptq", "-o", tmp_path / "o", *options)
    assert code == 0
    fallen = {n: f["fallback"] for n, f in facts_of(tmp_path / "o")["layers"].items() if "fallback" in f}
    assert set(fallen) == {f"model.layers.0.{name}" for name in ROW.roles if ROW.is_routed(name)}
    assert all("tokens for 128 inputs: rounded to nearest" in reason for reason in fallen.values())
    said = " ".join(err.split())
    assert "12 linears were not fitted to their inputs (pq.json says why): model.layers.0.mlp.experts.0." in said
    assert "and 5 more, all in pq.json" in said


def test_the_head_is_packed_beside_experts(tiny: Maker, text_file: Path, tmp_path: Path):
    request = request_for(tiny("qwen2_moe"), "rtn", tmp_path / "out", text_file)
    request.recipe.__dict__["head_bits"] = 8
    assert convert(request).quantized_linears == 4 * 2 + 5 * 3 + 3 + 1
    assert "lm_head.weight_packed" in Checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("rtn", r"mlp\.experts\.0\.down_proj: 96 inputs are no multiple of the group 128; set group_size to a divisor"),
        ("fireq-linear", r"mlp\.experts\.0\.gate_proj: 96 outputs are no multiple of 128, which INT4×FP8 kernels"),
    ],
)
def test_sizes_of_experts_that_do_not_fit(tiny: Maker, text_file: Path, tmp_path: Path, recipe: str, says: str):
    model = tiny("qwen2_moe", moe_intermediate_size=96)
    with pytest.raises(ModelError, match=rf"^model\.layers\.0\.{says}[^\n]*$"):
        convert(request_for(model, recipe, tmp_path / "out", text_file))


def test_rotations_need_a_matrix_for_every_expert():
    arch, stage = ARCHITECTURES["qwen2_moe"], Rotate(residual=False, values=False, down=True)
    shapes = {"model.layers.0.mlp.experts.7.down_proj": (128, 130), "model.layers.0.mlp.experts.7.up_proj": (134, 128)}
    with pytest.raises(ModelError, match=r"inputs of mlp\.down_proj 130: no Hadamard matrix [^\n]+; set down: false$"):
        stage.check_model(arch, None, shapes)  # type: ignore[arg-type]
    stage.check_model(arch, None, {"model.layers.0.mlp.shared_expert.down_proj": (128, 256)})  # type: ignore[arg-type]


# Bits per weight


def space_of(target: float, **fields: Any) -> Space:
    config = config_of("qwen2_moe")
    weights = random_weights(config)
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in row_of("qwen2_moe", i).roles]
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in names}
    recipe = parse_recipe(f"description: d\nstages: {fields.pop('stages', '[{method: rtn}]')}", "r.yaml")
    return Space.of(recipe, ARCHITECTURES["qwen2_moe"], shapes, target, **fields)


def test_experts_of_a_block_get_the_same_bits():
    groups = {frozenset(n.removeprefix("model.layers.") for n in group) for group in space_of(5).groups}
    routed = {f"0.{name}" for name in ROW.roles if ROW.is_routed(name)}
    shared = {f"0.mlp.shared_expert.{name}_proj" for name in ("gate", "up")}
    assert {len(group) for group in groups} == {1, 2, 3, 12}
    assert routed in groups
    assert shared in groups
    assert {"0.mlp.shared_expert.down_proj"} in groups
    assert {"1.mlp.gate_proj", "1.mlp.up_proj"} in groups
    assert len(space_of(5, tie_inputs=False).groups) == 19 + 7 == sum(map(len, groups))


def test_promoted_experts_are_one_pattern():
    space = space_of(6)
    errors = {n: {4: 1.0 if ".experts." in n else 0.01, 8: 0.001} for n in space.shapes}
    small, large = space.choose(errors).recipe.stages
    assert "model.layers.0.mlp.experts.*" in small.ignore
    assert "model.layers.0.mlp.experts.*" in large.layers
    assert not any("experts.0" in pattern for pattern in (*small.ignore, *large.layers))
    for name in space.shapes:
        assert small.selects(name) != large.selects(name)
        assert large.selects(name) == (name in space.choose(errors).promoted)
    # A pattern must not take what another stage has or none.
    some = space_of(6, stages="[{method: rtn, ignore: ['*.experts.1.up_proj']}]")
    small, large = some.choose(errors).recipe.stages
    assert "model.layers.0.mlp.experts.0.up_proj" in large.layers
    assert not large.selects("model.layers.0.mlp.experts.1.up_proj")
    assert not small.selects("model.layers.0.mlp.experts.1.up_proj")


@pytest.mark.parametrize("recipe", ["rtn", "fireq-linear"])
def test_a_conversion_to_a_target(tiny: Maker, text_file: Path, tmp_path: Path, recipe: str):
    request = request_for(tiny("qwen2_moe"), recipe, tmp_path / "out", text_file)
    request.recipe.__dict__["target_bpw"] = 6
    convert(request)
    facts = facts_of(tmp_path / "out")
    found = facts["allocation"]
    assert 5.5 < found["bits_per_weight"] == facts["bits_per_weight"] <= 6
    assert len(found["linears"]) == 19 + 7
    assert len({linear["bits"] for name, linear in found["linears"].items() if ".experts." in name}) == 1
    for linear in found["linears"].values():
        assert 0 < linear["errors"]["8"] < linear["errors"]["4"] < 1
    assert not any("fallback" in layer for layer in facts["layers"].values())


def test_an_expert_that_no_token_visits_costs_nothing(text_file: Path, tmp_path: Path):
    config = config_of("qwen2_moe", num_experts_per_tok=1)
    weights = random_weights(config)
    # No score of expert 3 is above all of ±those of another one.
    rows = weights["model.layers.0.mlp.gate.weight"]
    rows[2], rows[3] = -rows[1], 0
    save_side_files(save_model(tmp_path / "model", config, weights))
    request = request_for(tmp_path / "model", "gptq", tmp_path / "out", text_file)
    request.recipe.__dict__["target_bpw"] = 5
    convert(request)
    facts = facts_of(tmp_path / "out")
    assert facts["allocation"]["linears"]["model.layers.0.mlp.experts.3.up_proj"]["errors"] == {"4": 0, "8": 0}
    assert "saw 0 tokens" in facts["layers"]["model.layers.0.mlp.experts.3.up_proj"]["fallback"]
