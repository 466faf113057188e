"""The YAML of a plan: what it takes, and the line of every mistake."""

from __future__ import annotations

import pytest

from quantize.errors import RecipeError, UsageError
from quantize.plan.request import parse_request, single

GOOD = """\
models:
  - model: out/llama-w4
    rate: 3.0
    ttft: 1
    tpot: 0.05
  - model: org/other
    name: big
    sequences: 40
    context: 8192
    kv: int4
cluster:
  - gpu: H100 SXM
    gpus: 8
  - gpu: rtx-4090
    nodes: 2
    memory_gib: 47.0
"""


def test_a_file_is_read_in_full():
    found = parse_request(GOOD, "plan.yaml")
    assert [demand.longest for demand in found.models] == [1280, 8192]
    assert [nodes.kind.name for nodes in found.cluster] == ["h100-sxm", "rtx-4090"]
    assert found.cluster[1].kind.memory_gib == 47.0
    assert found.cluster[0].kind.memory_gib == 79.2


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("rate: 3.0", "rates: 3.0", 3, "models[0].rates: unknown field 'rates' (value 3.0); did"),
        ("rate: 3.0", "rate: -1", 3, "models[0].rate: must be a number > 0"),
        ("rate: 3.0", "rate: '3'", 3, "remove the quotes"),
        ("kv: int4", "kv: int3", 10, "models[1].kv: must be one of auto, bf16, fp8"),
        ("context: 8192", "context: 100", 9, "shorter than input + output, 1280"),
        ("sequences: 40", "sequences: 40\n    rate: 2.0", 8, "give rate or sequences, not both"),
        ("sequences: 40", "trace: azure-conv", 8, "played against goals; add ttft, tpot or both"),
        ("name: big", "name: out/llama-w4", 7, "a second model is called 'out/llama-w4'"),
        ("gpu: H100 SXM", "gpu: h110", 12, "not in the table; nearest: "),
        ("gpu: H100 SXM", "gpus: 4", 12, "cluster[0].gpu: required field is missing"),
        ("nodes: 2", "nodes: 0", 15, "cluster[1].nodes: must be an integer >= 1"),
        ("  - model: org/other", "  - org/other\n  - model: x", 6, "write '- model: ...'"),
        ("models:", "model:", 1, "unknown field 'model' (value"),
    ],
)
def test_mistakes_have_their_line(old: str, new: str, line: int, words: str):
    text = GOOD.replace(old, new, 1)
    if "(value" in words and old == "models:":
        words = "unknown field 'model'"
    with pytest.raises(RecipeError) as err:
        parse_request(text, "plan.yaml")
    lines = str(err.value).split("\n")
    assert any(x.startswith(f"plan.yaml:{line}: ") and words in x for x in lines), lines


def test_all_mistakes_are_told_at_once():
    text = GOOD.replace("rate: 3.0", "rate: no").replace("nodes: 2", "nodes: many")
    with pytest.raises(RecipeError) as err:
        parse_request(text, "plan.yaml")
    assert len(str(err.value).split("\n")) == 2
    only = "models:\n  - {model: a, rate: no}\ncluster:\n  - {gpu: h1000}\n"
    with pytest.raises(RecipeError) as err:
        parse_request(only, "plan.yaml")
    assert "the list is empty" not in str(err.value)
    assert len(str(err.value).split("\n")) == 2


@pytest.mark.parametrize("text", ["", "- 1", "models: 3", "models: []\ncluster: []"])
def test_no_plan_at_all(text: str):
    with pytest.raises(RecipeError, match=r"plan\.yaml:1"):
        parse_request(text, "plan.yaml")


def test_a_command_line_is_held_to_the_same():
    assert single("m", "h100", 8, 1, rate=2.0).models[0].rate == 2.0
    with pytest.raises(UsageError, match="--rate: "):
        single("m", "h100", 8, 1, rate=-2.0)
    with pytest.raises(UsageError, match="nearest: "):
        single("m", "h110", 8, 1)
