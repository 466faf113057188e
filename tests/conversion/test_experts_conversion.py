"""Whole models with experts: every recipe, what is refused and reported, and a target of bits per weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of, random_weights, request_for, row_of, save_model, save_side_files
from rows import ARCHITECTURES

from quantize.conversion.allocation import Space
from quantize.conversion.loop import convert
from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.methods.rotate import Rotate
from quantize.recipe.recipe import parse_recipe

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]
ROW = row_of("qwen2_moe")


def facts_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pq.json").read_text())
    return found


RECIPES = (
    "rtn",
    "gptq",
    "awq",
    "fireq-paper-linear",
    "fireq-linear",
    "fireq",
    "fireq-kv",
    "fireq-paper",
    "sbvr",
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_converts_experts(tiny: Maker, converted: Maker, recipe: str):
    changes = ("sbvr.lines=8", "sbvr.sweeps=1") if recipe.startswith("sbvr") else ()
    out = converted(recipe, "qwen2_moe", *changes)
    facts, source, written = facts_of(out), Checkpoint(tiny("qwen2_moe")), Checkpoint(out)
    linears = {
        f"model.layers.{i}.{name}" for i in range(2) for name in row_of("qwen2_moe", i).roles
    }
    packed = {
        name.removesuffix(".weight_packed")
        for name in written.names()
        if name.endswith(".weight_packed")
    }
    if recipe.startswith("sbvr"):
        packed = {
            name.rpartition(".")[0] for name in written.names() if name.endswith(".weight_lines")
        }
    assert packed == (set() if recipe == "fireq-kv" else linears)
    for name in packed:
        assert 0 < facts["layers"][name]["weight_error"] < 0.1, name
        assert "fallback" not in facts["layers"][name], name
    routers = [
        name
        for name in source.names()
        if name.endswith((".gate.weight", ".shared_expert_gate.weight"))
    ]
    assert len(routers) == 2
    smoothed = recipe not in ("rtn", "gptq", "fireq-kv")
    for name in routers:
        assert written.tensor(name).dtype == torch.bfloat16
        assert torch.equal(written.tensor(name), source.tensor(name)) != smoothed


def test_the_summary_and_the_command_line_name_fallbacks(
    pq: Call, tiny: Maker, text_file: Path, tmp_path: Path
):
    options = ["--dataset", text_file, "--nsamples", 2, "--seqlen", 32, "--device", "cpu"]
    code, _, err = pq(
        "convert", "-m", tiny("qwen2_moe"), "-r", "gptq", "-o", tmp_path / "o", *options
    )
    assert code == 0
    fallen = {
        n: f["fallback"] for n, f in facts_of(tmp_path / "o")["layers"].items() if "fallback" in f
    }
    assert set(fallen) == {f"model.layers.0.{name}" for name in ROW.roles if ROW.is_routed(name)}
    assert all("tokens for 128 inputs: rounded to nearest" in reason for reason in fallen.values())
    said = " ".join(err.split())
    assert (
        "12 linears were not fitted to their inputs (pq.json says why): model.layers.0.mlp.experts.0."
        in said
    )
    assert "and 5 more, all in pq.json" in said


def test_the_head_is_packed_beside_experts(tiny: Maker, text_file: Path, tmp_path: Path):
    request = request_for(tiny("qwen2_moe"), "rtn", tmp_path / "out", text_file)
    request.recipe.__dict__["head_bits"] = 8
    assert convert(request).quantized_linears == 4 * 2 + 5 * 3 + 3 + 1
    assert "lm_head.weight_packed" in Checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            "rtn",
            r"mlp\.experts\.0\.down_proj: 96 inputs are no multiple of the group 128; set group_size to",
        ),
        (
            "fireq-linear",
            r"mlp\.experts\.0\.gate_proj: 96 outputs are no multiple of 128, which INT4×FP8 kernels",
        ),
    ],
)
def test_sizes_of_experts_that_do_not_fit(
    tiny: Maker, text_file: Path, tmp_path: Path, recipe: str, says: str
):
    model = tiny("qwen2_moe", moe_intermediate_size=96)
    with pytest.raises(ModelError, match=rf"^model\.layers\.0\.{says}[^\n]*$"):
        convert(request_for(model, recipe, tmp_path / "out", text_file, "strict=true"))


def test_rotations_need_a_matrix_for_every_expert():
    arch, stage = ARCHITECTURES["qwen2_moe"], Rotate(residual=False, values=False, down=True)
    shapes = {
        "model.layers.0.mlp.experts.7.down_proj": (128, 130),
        "model.layers.0.mlp.experts.7.up_proj": (134, 128),
    }
    with pytest.raises(
        ModelError,
        match=r"inputs of down_proj 130: no Hadamard matrix [^\n]+; set down: false$",
    ):
        stage.check_model(arch, None, shapes)  # type: ignore[arg-type]
    stage.check_model(arch, None, {"model.layers.0.mlp.shared_expert.down_proj": (128, 256)})  # type: ignore[arg-type]


# Bits per weight


def space_of(target: float, **fields: Any) -> Space:
    config = config_of("qwen2_moe")
    weights = random_weights(config)
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in row_of("qwen2_moe", i).roles]
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in names}
    recipe = parse_recipe(
        f"description: d\nstages: {fields.pop('stages', '[{method: rtn}]')}", "r.yaml"
    )
    return Space.of(recipe, ARCHITECTURES["qwen2_moe"], shapes, target, **fields)


def test_experts_of_a_block_get_the_same_bits():
    groups = {
        frozenset(n.removeprefix("model.layers.") for n in group) for group in space_of(5).groups
    }
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
    assert (
        len({linear["bits"] for name, linear in found["linears"].items() if ".experts." in name})
        == 1
    )
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
    assert facts["allocation"]["linears"]["model.layers.0.mlp.experts.3.up_proj"]["errors"] == {
        "4": 0,
        "8": 0,
    }
    assert "saw 0 tokens" in facts["layers"]["model.layers.0.mlp.experts.3.up_proj"]["fallback"]
