"""Files of other tools given as recipes: named, and told what is the same or nearest for pq."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantize.errors import RecipeError
from quantize.methods.fireq.stage import Fireq
from quantize.methods.gptq import Gptq
from quantize.methods.rtn import Rtn
from quantize.recipe.recipe import Recipe, parse_recipe

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
FP8 = {"num_bits": 8, "type": "float"}


def told(text: str | dict[str, Any]) -> list[str]:
    """The lines of the refusal, without the file's name."""
    raw = text if isinstance(text, str) else json.dumps(text)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, "theirs.yaml")
    lines = str(caught.value).split("\n")
    assert all(line.startswith("theirs.yaml: ") for line in lines)
    return [line.removeprefix("theirs.yaml: ") for line in lines]


def recipe_in(line: str) -> Recipe:
    """The recipe that a line tells, read as a file that it is copied into."""
    assert ", which pq does not read; " in line
    return parse_recipe(line[line.index("{") :], "ours.yaml")


def compressor(**modifiers: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": modifiers}}


@pytest.mark.parametrize(
    ("theirs", "tool", "stages"),
    [
        (
            compressor(
                GPTQModifier={
                    "ignore": ["lm_head", "re:.*gate$"],
                    "dampening_frac": 0.05,
                    "config_groups": {"group_0": {"weights": W4, "targets": ["Linear"]}},
                }
            ),
            "llm-compressor (GPTQModifier)",
            [Gptq(group_size=64, damping=0.05, ignore=("lm_head", "re:.*gate$"))],
        ),
        (
            {"DEFAULT_stage": {"DEFAULT_modifiers": {"GPTQModifier": {
                "scheme": "W4A16", "targets": "Linear", "actorder": None, "ignore": "lm_head",
            }}}},
            "llm-compressor (GPTQModifier)",
            [Gptq(order="natural", ignore=("lm_head",))],
        ),
        (
            compressor(QuantizationModifier={"scheme": "W8A16", "targets": ["re:.*q_proj"]}),
            "llm-compressor (QuantizationModifier)",
            [Rtn(bits=8, group_size=-1, layers=("re:.*q_proj",))],
        ),
        (
            {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True},
            "GPTQModel or AutoGPTQ",
            [Gptq(damping=0.01, order="natural")],
        ),
        (
            {"bits": 8, "group_size": -1, "quant_method": "gptq", "desc_act": True},
            "GPTQModel or AutoGPTQ",
            [Gptq(bits=8, group_size=-1, order="activation")],
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 3}},
            "GPTQModel or AutoGPTQ",
            [Gptq(bits=3)],
        ),
    ],
)  # fmt: skip
def test_what_pq_can_do_too(theirs: dict[str, Any], tool: str, stages: list[Any]):
    (line,) = told(theirs)
    assert line.startswith(f"a file of {tool}, which pq does not read; the same for pq: {{")
    assert list(recipe_in(line).stages) == stages


@pytest.mark.parametrize(
    ("theirs", "tool", "methods", "note"),
    [
        (
            {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
            "AutoAWQ",
            ["awq", "rtn"],
            "zero points have no like in pq, whose integers are symmetric",
        ),
        (
            {"bits": 4, "group_size": 128, "sym": False, "desc_act": False},
            "GPTQModel or AutoGPTQ",
            ["gptq"],
            "zero points have no like",
        ),
        (
            {"bits": 4, "group_size": 32, "sym": True, "iters": 200, "nsamples": 64, "seqlen": 512},
            "AutoRound",
            ["fireq"],
            "signed gradients",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", ["rtn"], "NF4"),
        (
            {"config_groups": {"g": {"weights": W4, "targets": ["Linear"]}}, "ignore": ["lm_head"]},
            "compressed-tensors",
            ["rtn"],
            "not how they were found",
        ),
        (
            {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8"},
            },
            "NVIDIA ModelOpt",
            ["awq", "rtn"],
            "fireq-attention",
        ),
        (
            compressor(SmoothQuantModifier={}, GPTQModifier={"scheme": "W4A16"}),
            "llm-compressor (SmoothQuantModifier, GPTQModifier)",
            ["gptq"],
            "SmoothQuantModifier has no like",
        ),
    ],
)
def test_what_is_nearest_is_told_with_what_differs(
    theirs: dict[str, Any], tool: str, methods: list[str], note: str
):
    first, *notes = told(theirs)
    assert first.startswith(f"a file of {tool}")
    assert "; nearest for pq: {" in first
    assert [stage.method for stage in recipe_in(first).stages] == methods
    assert any(note in line for line in notes)


@pytest.mark.parametrize(
    ("theirs", "note"),
    [
        (compressor(GPTQModifier={"scheme": "W8A8"}), "scheme W8A8"),
        (
            compressor(
                GPTQModifier={"config_groups": {"g": {"weights": W4, "input_activations": FP8}}}
            ),
            "input_activations",
        ),
        ({"quantization": {"quant_algo": "NVFP4"}, "producer": {}}, "NVFP4"),
    ],
)
def test_what_has_no_like(theirs: dict[str, Any], note: str):
    first, *notes = told(theirs)
    assert first.endswith("which pq does not read; nothing here does the same")
    assert any(note in line for line in notes)


def test_sizes_and_text_are_taken_over():
    first, *_ = told({"bits": 3, "group_size": 32, "iters": 5, "nsamples": 64, "seqlen": 512})
    found = recipe_in(first)
    (stage,) = found.stages
    assert isinstance(stage, Fireq)
    assert (stage.bits, stage.group_size, stage.activations) == (3, 32, "none")
    assert (found.calibration.nsamples, found.calibration.seqlen) == (64, 512)


def test_a_config_of_a_model_is_no_recipe():
    (line,) = told({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert line.startswith("a file of transformers (a model's config.json)")


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("symmetric: false", "zero points have no like in pq, whose integers are symmetric"),
        ("symmetric: true", "always so; remove it"),
        ("sym: false", "zero points have no like"),
        ("zero_point: true", "zero points have no like"),
        ("actorder: true", "it is order: activation, in gptq"),
        ("desc_act: false", "it is order: natural, in gptq"),
        ("damp_percent: 0.1", "it is damping"),
        ("w_bit: 4", "it is bits"),
        ("q_group_size: 64", "it is group_size"),
        ("targets: [Linear]", "it is layers"),
        ("num_calibration_samples: 9", "it is calibration.nsamples"),
        ("bit: 4", "did you mean 'bits'?"),
    ],
)
def test_fields_of_other_tools(field: str, remedy: str):
    name = field.partition(":")[0]
    (line,) = told_fields(f"description: d\nstages:\n  - method: gptq\n    {field}\n")
    assert line.startswith(f"theirs.yaml:4: stages[0].{name}: unknown field '{name}'")
    assert remedy in line


def told_fields(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "theirs.yaml")
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    "odd",
    [
        {"quant_stage": 3},
        {"GPTQModifier": []},
        {"x_stage": {"x_modifiers": {"AWQModifier": {"scheme": [], "ignore": {}}}}},
        {"desc_act": {}, "bits": [], "dynamic": 1},
        {"config_groups": [1]},
        {"quant_method": []},
        {"producer": 3, "quantization": []},
        {"model_type": [], "quantization_config": {"quant_method": {}}},
    ],
)
def test_odd_values_are_refused_and_no_more(odd: dict[str, Any]):
    with pytest.raises(RecipeError):
        parse_recipe(json.dumps(odd), "theirs.yaml")
