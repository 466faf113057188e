from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from quantize.errors import RecipeError
from quantize.files import strict_yaml
from quantize.files.problems import MAX_PROBLEMS
from quantize.files.resources import data_dir
from quantize.methods import STAGES
from quantize.methods.base import Kind, Stage
from quantize.recipe import recipe as recipes
from quantize.recipe import stages
from quantize.recipe.recipe import parse_recipe, recipe_schema, resolved_yaml
from quantize.recipe.stages import METHODS

SHIPPED = sorted(data_dir("recipes").glob("*.yaml"))
GOOD = "description: plain\nstages:\n  - method: rtn\n"
CALIBRATION = "description: d\ncalibration:\n  {}\nstages:\n  - method: rtn\n"


def errors(text: str | bytes, source: str = "r.yaml") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source)
    return str(caught.value).split("\n")


def parse_stage(method: str, **fields: Any) -> str:
    lines = [f"    {key}: {json.dumps(value)}\n" for key, value in fields.items()]
    head = [] if METHODS[method].kind == "encode" else ["  - method: rtn\n"]
    order = [f"  - method: {method}\n", *lines, *head]
    return "".join(["description: d\n", "stages:\n", *order])


# What a recipe refuses


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nsamples: 0", "nsamples: must be an integer >= 1 (value 0); the default is 128"),
        ("nsamples: 2.0", "nsamples: must be an integer >= 1 (value 2.0); the default is 128"),
        ("nsamples: true", "nsamples: must be an integer >= 1 (value true); the default is 128"),
        ("nsamples:", "nsamples: must be an integer >= 1 (value null); the default is 128"),
        ("nsamples: [1]", "nsamples: must be an integer >= 1 (value a list); the default is 128"),
        ("seqlen: 7", "seqlen: must be an integer >= 8 (value 7); the default is 2048"),
        ('seqlen: "9"', "seqlen: must be an integer >= 8 (value '9'); remove the quotes"),
        (
            f"seed: {2**63}",
            f"seed: must be an integer >= 0 and <= {2**63 - 1} (value {2**63}); the default is 0",
        ),
        (
            "chat_template: yes",
            "chat_template: must be true or false or null (value 'yes')",
        ),
        (
            "chat_template: 1",
            "chat_template: must be true or false or null (value 1)",
        ),
        ("dataset: 7", "dataset: must be a string (value 7); put it in quotes"),
        ("text_field: 1.5", "text_field: must be a string or null (value 1.5); put it in quotes"),
        ("nsample: 3", "nsample: unknown field 'nsample' (value 3); did you mean 'nsamples'?"),
        (
            "Chat-Template: a",
            "Chat-Template: unknown field 'Chat-Template' (value 'a'); did you mean 'chat_template'?",
        ),
        ("stages: []", "stages: unknown field 'stages'; it belongs to the top level"),
        ("method: rtn", "method: unknown field 'method' (value 'rtn'); it belongs to a stage"),
        (
            "zzz: 3",
            "zzz: unknown field 'zzz' (value 3); fields: dataset, nsamples, seqlen, seed, chat_template, "
            "text_field, bos",
        ),
    ],
)
def test_bad_fields_in_full(line: str, message: str):
    assert errors(CALIBRATION.format(line)) == [f"r.yaml:3: calibration.{message}"]


def test_terminal_escapes_never_reach_the_message():
    (line,) = errors(CALIBRATION.format(r'"\e[31m": 3'))
    assert line == r"r.yaml:3: calibration: key '\x1b[31m' is not a plain string; use a field name"
    (line,) = errors(CALIBRATION.format(r'seed: "\e[31m"'))
    assert r"(value '\x1b[31m')" in line


def test_seed_takes_its_whole_range():
    assert (
        parse_recipe(CALIBRATION.format(f"seed: {2**63 - 1}"), "r.yaml").calibration.seed
        == 2**63 - 1
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: the file is empty; begin with 'description: ...' and 'stages:'"),
        ("# only a comment\n", "r.yaml:1: the file is empty; begin with 'description: ...' and 'stages:'"),
        ("- a", "r.yaml:1: must be a mapping (value a list); begin with 'description: ...' and 'stages:'"),
        ("stages: [{method: rtn}]",
         "r.yaml:1: description: required field is missing; add 'description: ...', a string"),
        ("\ndescription: a", "r.yaml:2: stages: required field is missing; add 'stages: ...', a list"),
        ("description: a\nstages: rtn", "r.yaml:2: stages: must be a list (value 'rtn')"),
        ("description: a\n\nstages: [rtn]",
         "r.yaml:3: stages[0]: must be a mapping (value 'rtn'); write '- method: ...'"),
        (GOOD + "name: x", "r.yaml:4: name: unknown field 'name'; a recipe is named by its file, remove the line"),
        (GOOD + "format: exl3",
         "r.yaml:4: format: must be 'compressed-tensors' or 'pq' or 'gguf' (value 'exl3'); "
         "the default is 'compressed-tensors'"),
        (GOOD + "seqlen: 9", "r.yaml:4: seqlen: unknown field 'seqlen' (value 9); it belongs to 'calibration'"),
        (GOOD + "calibration:", "r.yaml:4: calibration: must be a mapping (value null)"),
        (GOOD + "    bist: 3", "r.yaml:4: stages[0].bist: unknown field 'bist' (value 3); did you mean 'bits'?"),
    ],
)  # fmt: skip
def test_bad_files_in_full(text: str, message: str):
    assert errors(text) == [message]


def test_empty_stages_names_what_to_add():
    (line,) = errors("description: a\nstages: []")
    assert line.startswith("r.yaml:2: stages: the list is empty; add at least one encode stage")
    assert "rtn" in line


def test_unknown_and_missing_methods():
    every = ", ".join(METHODS)
    assert errors(GOOD.replace("rtn", "gpqt")) == [
        f"r.yaml:3: stages[0].method: unknown method 'gpqt'; did you mean 'gptq'? the methods are {every}"
    ]
    assert errors(GOOD.replace("rtn", "3")) == [
        f"r.yaml:3: stages[0].method: unknown method 3; the methods are {every}"
    ]
    assert errors(GOOD.replace("rtn", "[rtn]"))[0].startswith(
        "r.yaml:3: stages[0].method: unknown method a list;"
    )
    assert errors(GOOD.replace("method", "bits")) == [
        f"r.yaml:3: stages[0]: required field 'method' is missing; add 'method: ...', the methods are {every}"
    ]


def test_an_unknown_method_might_have_been_the_encode_stage():
    (line,) = errors("description: d\nstages: [{method: cas}, {method: gpqt}]")
    assert "stages[1].method: unknown method" in line


def test_a_field_of_another_method_is_sent_home():
    owners = {
        f: [m for m, cls in METHODS.items() if f in cls.model_fields]
        for c in STAGES
        for f in c.model_fields
    }
    own = [(field, home[0]) for field, home in owners.items() if len(home) == 1]
    assert own
    for field, home in own:
        stranger = next(method for method in METHODS if method != home)
        (line,) = errors(parse_stage(stranger, **{field: 3}))
        start = f"r.yaml:4: stages[0].{field}: unknown field '{field}' (value 3); it belongs to method '{home}'"
        assert line.startswith(start)


def test_stage_numbers_out_of_range_state_the_range():
    seen = 0
    for method, cls in METHODS.items():
        for field, schema in cls.model_json_schema()["properties"].items():
            if "maximum" in schema:
                (line,) = errors(parse_stage(method, **{field: schema["maximum"] + 1}))
                assert line.startswith(f"r.yaml:4: stages[0].{field}: must be a")
                assert f"<= {schema['maximum']} (value {schema['maximum'] + 1})" in line
                seen += 1
    assert seen


def test_every_problem_of_a_file_is_reported_in_file_order():
    text = """\
description: 12
formats: x
calibration:
  nsamples: 0
  nsamples: 3
stages:
  - method: rtn
    bist: 3
  - method: gpqt
  - method: cas
    zzz: *a
  - method: rtn
"""
    starts = [
        "1: description: must be a string (value 12)",
        "2: formats: unknown field 'formats' (value 'x'); did you mean 'format'?",
        "4: calibration.nsamples: must be",
        "5: calibration.nsamples: duplicate key, first on line 4",
        "8: stages[0].bist: unknown field",
        "9: stages[1].method: unknown method 'gpqt'",
        "10: stages[2]: smooth 'cas' follows encode 'rtn'",
        "11: stages[2].zzz: alias '*a' is refused",
    ]
    lines = errors(text, "dir/fireq.yaml")
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"dir/fireq.yaml:{start}")


def test_a_wholly_wrong_file_stays_readable():
    lines = errors("".join(f"a{i}: 1\n" for i in range(500)))
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == "r.yaml: and 482 more problems; mend these first"
    (line,) = errors(CALIBRATION.format(f"seed: {'x' * 500}"))
    assert len(line) < 200


# The law


class _Restructure(Stage):
    kind: ClassVar[Kind] = "restructure"
    method: Literal["rotate"] = "rotate"


class _Smooth(Stage):
    kind: ClassVar[Kind] = "smooth"
    method: Literal["scale"] = "scale"


class _Encode(Stage):
    kind: ClassVar[Kind] = "encode"
    method: Literal["code"] = "code"


def test_the_law_is_the_regular_expression():
    letters = {"r": _Restructure, "s": _Smooth, "e": _Encode}
    for word in itertools.chain.from_iterable(
        itertools.product(letters, repeat=n) for n in range(1, 6)
    ):
        found = list(stages.order_problems([letters[letter] for letter in word]))
        lawful = re.fullmatch("r*s*e*", "".join(word)) and {"r", "e"} & set(word)
        assert bool(found) != bool(lawful), word


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            "rtn cas",
            "r.yaml:4: stages[1]: smooth 'cas' follows encode 'rtn'; the order is {}, move it before stages[0]",
        ),
        (
            "cas rtn gptq awq cas",
            "r.yaml:6: stages[3]: smooth 'awq' follows encode 'rtn'; the order is {}, move it before stages[1]",
        ),
    ],
)
def test_a_stage_out_of_order_is_sent_to_its_place(methods: str, message: str):
    text = "description: d\nstages:\n" + "".join(
        f"  - method: {method}\n" for method in methods.split()
    )
    assert errors(text) == [message.format(stages.LAW)]


def test_a_recipe_without_encode_is_refused():
    (line,) = errors("description: d\nstages: [{method: cas}, {method: awq}]")
    assert line.startswith(
        f"r.yaml:2: stages: no encode stage; the order is {stages.LAW}, add one of rtn"
    )


# The schema for editors


def test_schema_is_strict_and_discriminated():
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == {
        "description",
        "format",
        "head_bits",
        "embedding_bits",
        "calibration",
        "target_bpw",
        "stages",
    }
    assert schema["required"] == ["description", "stages"]
    items = schema["properties"]["stages"]["items"]
    assert items["discriminator"]["propertyName"] == "method"
    assert len(items["oneOf"]) == len(STAGES)
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        assert part["description"]
    for cls in STAGES:
        part = schema["$defs"][cls.__name__]
        assert "method" in part["required"]
        assert part["properties"]["method"]["const"] in METHODS
        assert all(
            "description" in field for name, field in part["properties"].items() if name != "method"
        )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes(path: Path):
    recipe = recipes.load_recipe(path.stem)
    assert recipe == parse_recipe(resolved_yaml(recipe), path.name)
    raw = strict_yaml.load(path.read_bytes(), path.name).data
    schema = recipe_schema()
    assert set(schema["required"]) <= set(raw) <= set(schema["properties"])
    for stage in raw["stages"]:
        assert set(stage) <= set(schema["$defs"][METHODS[stage["method"]].__name__]["properties"])
