"""`--set FIELD=VALUE`: which stages it reaches, what values mean, and how mistakes are told."""

from __future__ import annotations

from typing import Any

import pytest

from quantize.errors import RecipeError, UsageError
from quantize.methods.encode import Encode
from quantize.methods.fireq.stage import Fireq
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe, parse_recipe, resolved_yaml

TEXT = """description: "three encode stages, two of one method"
stages:
  - method: awq
  - method: gptq
    layers: ["*.self_attn.*"]
  - method: rtn
    layers: ["*.up_proj"]
  - method: gptq
    layers: ["*.mlp.*"]
    ignore: ["*.up_proj"]
"""


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(TEXT, "mixed.yaml")


def values(recipe: Recipe, field: str) -> list[Any]:
    return [getattr(stage, field, None) for stage in recipe.stages]


def refused(recipe: Recipe, *assignments: str) -> str:
    with pytest.raises(UsageError) as caught:
        with_stage_fields(recipe, assignments)
    message = str(caught.value)
    assert message.startswith("--set"), message
    assert "\n" not in message
    return message


def test_a_field_reaches_every_stage_that_has_it(recipe: Recipe):
    changed = with_stage_fields(recipe, ["bits=3", "clip=absmax", "damping=0.5"])
    assert values(changed, "bits") == [3, 3, 3, 3]
    assert values(changed, "clip") == [None, "absmax", "absmax", "absmax"]
    assert values(changed, "damping") == [None, 0.5, None, 0.5]


def test_a_method_limits_it(recipe: Recipe):
    changed = with_stage_fields(recipe, ["gptq.bits=3", "rtn.group_size=32"])
    assert values(changed, "bits") == [4, 3, 4, 3]
    assert values(changed, "group_size") == [128, 128, 32, 128]


def test_everything_else_stays(recipe: Recipe):
    before = resolved_yaml(recipe)
    changed = with_stage_fields(recipe, ["gptq.damping=0.5"])
    assert resolved_yaml(recipe) == before
    assert (changed.name, changed.description, changed.calibration) == (
        "mixed",
        recipe.description,
        recipe.calibration,
    )
    assert changed.stages[0] == recipe.stages[0]
    assert changed.stages[2] == recipe.stages[2]
    assert values(changed, "layers") == values(recipe, "layers")
    assert with_stage_fields(recipe, []) == recipe


def test_the_last_assignment_wins(recipe: Recipe):
    assert values(with_stage_fields(recipe, ["bits=3", "bits=2"]), "bits") == [2, 2, 2, 2]
    assert values(with_stage_fields(recipe, ["bits=3", "rtn.bits=8"]), "bits") == [3, 3, 8, 3]
    assert values(with_stage_fields(recipe, ["rtn.bits=8", "bits=3"]), "bits") == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("assignment", "field", "wanted"),
    [
        ("rtn.ignore=*.0.*,*.1.*", "ignore", ("*.0.*", "*.1.*")),
        ("rtn.layers=*.down_proj", "layers", ("*.down_proj",)),
        ("weight_exponents=0,0.5,1", "weight_exponents", (0.0, 0.5, 1.0)),
        ("weight_exponents=1", "weight_exponents", (1.0,)),
        ("awq.grid=0x10", "grid", 16),
        ("gptq.damping=1e-3", "damping", 0.001),
        ("gptq.damping=1", "damping", 1.0),
        ("rtn.clip=mse", "clip", "mse"),
    ],
)
def test_values_mean_what_they_mean_in_a_recipe(
    recipe: Recipe, assignment: str, field: str, wanted: object
):
    found = values(with_stage_fields(recipe, [assignment]), field)
    assert wanted in found
    changed = [value for value in found if value == wanted]
    assert all(type(value) is type(wanted) for value in changed)


def test_the_result_is_a_recipe_that_reads_back(recipe: Recipe):
    changed = with_stage_fields(
        recipe, ["bits=3", "rtn.ignore=*.0.*,*.1.*", "weight_exponents=0.25,0.75"]
    )
    assert parse_recipe(resolved_yaml(changed), "mixed.yaml") == changed


def test_fields_that_need_each_other_are_set_together():
    """fp8 wants 4 bits and groups of 128: neither order may trip over the state in between."""
    fireq = load_recipe("fireq")
    for assignments in (["bits=3", "activations=none"], ["activations=none", "bits=3"]):
        assert with_stage_fields(fireq, assignments).stages[-1].model_dump()["bits"] == 3
    nearest = (
        with_stage_fields(fireq, ["scales=tensor", "rounding=nearest"]).stages[-1].model_dump()
    )
    assert (nearest["scales"], nearest["rounding"]) == ("tensor", "nearest")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("bist=3", "has the field 'bist'; did you mean 'bits'?"),
        ("gptq.dampin=1", "has the field 'gptq.dampin'; did you mean 'damping'?"),
        ("rtn.damping=0.1", "no stage of recipe 'mixed' has the field 'rtn.damping'"),
        ("cas.v_mul=1", "no stage of recipe 'mixed' has the field 'cas.v_mul'"),
        ("qqqqqq=1", "fields: activations, bits, clip, damping"),
        ("method=rtn", "no stage of recipe 'mixed' has the field 'method'"),
        ("awq.gptq.bits=3", "no stage"),
        ("stages=1", "no stage"),
    ],
)
def test_a_wrong_field_is_named_with_its_neighbour(recipe: Recipe, assignment: str, says: str):
    message = refused(recipe, assignment)
    assert message.startswith(f"--set {assignment}: ")
    assert says in message


@pytest.mark.parametrize("assignment", ["bits", "", "=", "=3", "gptq.=3", "bits:3"])
def test_what_is_no_assignment_is_told_the_form(recipe: Recipe, assignment: str):
    assert (
        refused(recipe, assignment) == f"--set {assignment}: write FIELD=VALUE, for example bits=3"
    )


@pytest.mark.parametrize(
    ("assignment", "where", "value"),
    [
        ("gptq.bits=9", "gptq.bits", "9"),
        ("gptq.bits=3.5", "gptq.bits", "3.5"),
        ("gptq.bits=four", "gptq.bits", "'four'"),
        ("gptq.bits=true", "gptq.bits", "True"),
        ("gptq.bits=", "gptq.bits", "None"),
        ("gptq.damping=0", "gptq.damping", "0"),
        ("rtn.clip=none", "rtn.clip", "'none'"),
        ("rtn.clip=1", "rtn.clip", "1"),
        ("weight_exponents=0.5,x", "awq.weight_exponents.1", "'x'"),
        ("rtn.ignore=*.a,,*.b", "rtn.ignore.1", "None"),
    ],
)
def test_a_wrong_value_names_the_field(recipe: Recipe, assignment: str, where: str, value: str):
    message = refused(recipe, assignment)
    assert message.startswith(f"--set: {where}: ")
    assert f"(value {value})" in message


def test_a_combination_that_does_not_exist_names_the_method():
    message = refused(load_recipe("fireq"), "bits=3")
    assert message.startswith("--set: fireq: ")
    assert "activations: fp8 needs bits: 4 and group_size: 128" in message


@pytest.mark.parametrize("value", [".inf", ".nan", "1e999", "9" * 5000])
def test_numbers_that_are_none_are_refused(recipe: Recipe, value: str):
    assert "damping" in refused(recipe, f"gptq.damping={value}")


def test_a_combination_is_refused_in_few_words():
    message = refused(load_recipe("fireq"), "bits=3")
    assert "Value error" not in message
    assert "{" not in message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            "scales: tensor",
            "scales: tensor is the paper's and goes with rounding: nearest; use scales: row",
        ),
        (
            "scales: bf16",
            "scales: bf16 is the paper's and goes with rounding: nearest; use scales: row",
        ),
        ("bits: 3", "activations: fp8 needs bits: 4 and group_size: 128"),
        ("group_size: 64", "activations: fp8 needs bits: 4 and group_size: 128"),
        ("bits: 8\n    rounding: nearest", "activations: fp8 needs bits: 4 and group_size: 128"),
    ],
)
def test_combinations_that_do_not_exist_are_refused(fields: str, says: str):
    text = f'description: "x"\nstages:\n  - method: fireq\n    {fields}\n'
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml:3: stages[0]: "), message
    assert says in message
    assert "Value error" not in message
    assert "pydantic" not in message


def test_combinations_that_exist_are_taken():
    Fireq(activations="none", bits=3, group_size=32)
    Fireq(rounding="nearest", scales="tensor")
    Fireq(rounding="nearest", scales="bf16", activations="none", bits=2)


def test_the_exit_code_is_that_of_usage():
    assert UsageError.exit_code == 2


def test_an_empty_list_can_be_given(recipe: Recipe):
    stages = with_stage_fields(recipe, ["ignore="]).stages
    assert all(stage.ignore == () for stage in stages if isinstance(stage, Encode))
