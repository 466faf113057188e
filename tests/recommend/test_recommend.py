"""`pq recommend`: what it says of outputs is what conversions make, and its choice follows its rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for

from quantize.conversion.foretold import foretold
from quantize.errors import ModelError, UsageError
from quantize.formats.registry import FORMATS
from quantize.inspect.engines import loadings, loadings_as
from quantize.plan.checkpoint import served_model
from quantize.plan.gpus import GPUS
from quantize.recipe.measured import Measured
from quantize.recipe.recipe import load_recipe
from quantize.recommend.choose import chosen, recommend
from quantize.recommend.target import GPU_RECIPES, HOST_RECIPES, target_named
from quantize.recommend.ways import Asked, Output, Way, asked_for, outputs_of, shapes_of, way

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def asked(tiny: Maker) -> Asked:
    return asked_for("tiny", tiny("llama"), None, 8)


@pytest.fixture(scope="module")
def outputs(asked: Asked) -> list[Output]:
    """What all names that are looked at would make of a tiny Llama."""
    return outputs_of(asked, tuple(dict.fromkeys((*GPU_RECIPES, *HOST_RECIPES))))


# What outputs would be


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("rtn", ()), ("gptq", ("bits=3",)), ("fireq", ()), ("sbvr", ()), ("fireq-linear", ())],
)
def test_engines_of_an_output_are_told_before_it_is_there(
    recipe: str, changes: tuple[str, ...], converted: Maker, tiny: Maker, text_file: Path
):
    made = loadings(converted(recipe, "llama", *changes))
    request = request_for(tiny("llama"), recipe, Path("nowhere"), text_file, *changes)
    found, config = foretold(request)
    told = loadings_as(FORMATS[request.recipe.format].name, config, shapes_of(found))
    assert told == made


def test_sizes_are_those_of_the_plan(asked: Asked, outputs: list[Output], tiny: Maker):
    plain, *made = outputs
    assert plain.served == served_model(tiny("llama"), name="tiny")
    assert (asked.context, plain.recipe) == (256, None)  # where the model ends
    refused = {output.name: output.refused for output in made if output.refused}
    assert set(refused) <= {"gguf-q4_0", "gguf-q4_1"}  # whose tokenizer llama.cpp may not know
    sizes = {o.name: o.served.weights() for o in made if o.served}
    assert sizes["w2a16"] < sizes["w3a16"] < sizes["w4a16"] == sizes["w4a8"]
    found = {one.output.name: one for one in recommend(asked, target_named("h100"), outputs).ways}
    tokens = asked.context * asked.sequences
    full = 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, channels, bytes
    assert found["w4a16"].cache == tokens * full
    assert found["w4a8kv4"].cache < 0.4 * tokens * full


# What runs where


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
def test_schemes_run_where_their_kernels_do(gpu: str, asked: Asked, outputs: list[Output]):
    target = target_named(gpu)
    capability = target.gpu.capability if target.gpu else 0
    found = {one.output.name: one for one in recommend(asked, target, outputs).ways}
    assert set(found) == set(GPU_RECIPES)
    assert found["w4a16"].runner.install == ()
    assert (found["w4a16"].runner.engine or "").startswith("vLLM")
    assert (found["w4a8"].runner.engine is not None) == (capability >= 8.9)
    assert (found["w4a8"].runner.install == ("pq-vllm",)) == (
        capability >= 8.9 and capability != 9.0
    )
    assert found["w3a16"].runner.install == ("pq-vllm",)
    assert (found["w4a8kv4"].runner.engine is not None) == (capability >= 8.9)
    for one in found.values():
        assert (one.count is None) == (one.why_not is not None)
        assert (one.count is None) == (one.first is None)


def test_machines_without_gpus(asked: Asked, outputs: list[Output]):
    cpu = {o.output.name: o for o in recommend(asked, target_named("cpu"), outputs).ways}
    mac = {o.output.name: o for o in recommend(asked, target_named("mac"), outputs).ways}
    assert tuple(cpu) == tuple(mac) == HOST_RECIPES
    assert (cpu["w4a16"].runner.engine or "").startswith("vLLM")
    assert mac["w4a16"].runner.engine is None  # transformers unpacks what it loads
    assert (mac["w3a16"].runner.engine or "").startswith("transformers")
    assert mac["w3a16"].first is None
    small = recommend(asked, target_named("cpu", memory=10**6), outputs)
    assert small.chosen is None
    assert "of which there are 0.0 GB" in (small.ways[2].why_not or "")


# The choice


def made_up(name: str, bits: int, count: int | None, kld: float, *install: str) -> Way:
    """A way of which nothing but the figures of the rule is known."""
    recipe = load_recipe({4: "rtn", 3: "sbvr-3bit", 2: "sbvr-2bit"}[bits])
    losses = {"m": Measured("m", kld, 0.9, "f")}
    output = Output(name, recipe, (), None, None, None, losses)
    base = way(replace(output, refused="x"), target_named("cpu"), None)  # type: ignore[arg-type]
    return replace(base, count=count, runner=replace(base.runner, engine="e", install=install))


@pytest.mark.parametrize(
    ("ways", "best"),
    [
        ([("a", 4, 2, 0.01), ("b", 4, 1, 0.02)], "b"),  # fewer GPUs
        ([("a", 4, 8, 0.01), ("b", 3, 1, 0.001), ("c", 2, 1, 0.001)], "a"),  # four bits
        ([("a", 4, None, 0.01), ("b", 3, 2, 0.03), ("c", 2, 1, 0.1)], "b"),
        ([("a", 4, 1, 0.02), ("b", 4, 1, 0.01, "pq-vllm")], "a"),  # nothing beside the engine
        ([("a", 4, 1, 0.02), ("b", 4, 1, 0.01)], "b"),  # less loss
        ([("a", 4, None, 0.02)], None),
    ],
)
def test_the_order_of_choice(ways: list[Any], best: str | None):
    for order in (ways, ways[::-1]):
        found = chosen([made_up(*one) for one in order])
        assert (found and found.output.name) == best


def test_speed_counts_where_it_differs(asked: Asked, outputs: list[Output]):
    one = recommend(asked, target_named("h100"), outputs)
    fast = {w.output.name: w for w in one.ways if w.output.name in ("w4a16", "w4a8")}
    assert (fast["w4a16"].kld or 1) < (fast["w4a8"].kld or 0)
    option = fast["w4a8"].option
    assert option is not None
    slow = replace(option, gpu=replace(option.gpu, bandwidth_tb=1e-6))
    alike = chosen(list(fast.values()))
    assert alike is not None
    assert alike.output.name == "w4a16"
    behind = chosen([replace(fast["w4a16"], option=slow), fast["w4a8"]])
    assert behind is not None
    assert behind.output.name == "w4a8"


# The command


def test_the_screen(pq: Call, tiny: Maker):
    code, out, err = pq("recommend", "-m", tiny("llama"), "--gpu", "H100", "--sequences", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    commands = [line for line in lines if line.startswith("  pq ") or "vllm serve" in line]
    assert all(len(line) <= 80 for line in lines[1:] if line not in commands)
    assert "3 sequences of 256 tokens at once" in lines[0]
    name = tiny("llama").name
    assert f"  pq convert --model {tiny('llama')} --recipe w4a16 --output {name}-w4a16" in lines
    assert f"  vllm serve {name}-w4a16 --max-model-len 256 --max-num-seqs 3" in lines
    words = " ".join(out.split())
    assert "not of your model" in words
    assert "eval/results/yardstick-4bit.json" in words


def test_json_says_the_same(pq: Call, tiny: Maker):
    arguments = ("recommend", "-m", tiny("llama"), "--gpu", "a100", "-o", "x y", "--json")
    code, out, _ = pq(*arguments)
    found = json.loads(out)
    assert code == 0
    assert (found["target"], found["chosen"], found["context"]) == ("a100-80-sxm", "w4a16", 256)
    ways = {one["name"]: one for one in found["ways"]}
    assert "compute capability 8.9" in ways["w4a8kv4"]["why_not"]
    assert "9.0" in ways["w4a8"]["why_not"]
    assert [m["model"] for m in ways["w4a16"]["measured"]] == ["yardstick", "yardstick-outliers"]
    assert found["commands"]["convert"].endswith("--recipe w4a16 --output 'x y'")
    assert found["commands"]["measure"] == f"pq eval 'x y' --baseline {tiny('llama')}"
    assert "pq convert would refuse" not in out
    assert found["estimate"]["ram"] > found["estimate"]["output"] > 0


def test_every_target_in_a_line(pq: Call, tiny: Maker):
    code, out, _ = pq("recommend", "-m", tiny("llama"))
    lines = out.splitlines()
    assert code == 0
    assert all(len(line) <= 80 for line in lines[1:])
    assert [line.split()[0] for line in lines[3 : 5 + len(GPUS)]] == [
        *(gpu.name for gpu in GPUS),
        "cpu",
        "mac",
    ]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--gpu", "h10"), 2, "nearest: h100"),
        (("--gpu", "tpu"), 2, "or cpu, mac"),
        (("--gpu", "l4", "--memory", "3GB"), 2, "--memory goes with --gpu cpu or mac"),
        (("--memory", "3GB"), 2, "--memory goes with --gpu cpu or mac"),
        (("--gpu", "cpu", "--memory", "lots"), 2, "--memory"),
        (("--gpu", "l4", "--context", "257"), 2, "ends at 256 tokens"),
        (("--gpu", "l4", "--sequences", "90000000"), 10, "fits no 8 × l4 as asked"),
        (("--gpu", "mac", "--memory", "1MB"), 10, "fits no mac as asked"),
        (("--gpu", "l4", "--gpus", "9"), 2, "--gpus"),
    ],
)
def test_what_cannot_be(pq: Call, tiny: Maker, options: tuple[str, ...], code: int, says: str):
    found, _, err = pq("recommend", "-m", tiny("llama"), *options)
    assert found == code
    assert says in err


def test_a_quantized_model_is_no_parent(converted: Maker):
    folder = converted("rtn", "llama")
    with pytest.raises(ModelError, match="is quantized already"):
        outputs_of(asked_for("m", folder, None, 8), ("w4a16", "w3a16"))
    with pytest.raises(UsageError, match="ends at 256 tokens"):
        asked_for("m", folder, 1000, 8)
    assert torch.get_default_dtype() == torch.float32
