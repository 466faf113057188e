"""Patterns of recipes: as other tools write them, mistyped, and of modules that no stage encodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rows import ARCHITECTURES

from quantize.conversion.patterns import require_patterns
from quantize.errors import ModelError, RecipeError
from quantize.formats.patterns import matches, nearest_pattern
from quantize.methods.rtn import Rtn

LINEARS = [f"model.layers.{i}.{name}" for i in range(12) for name in ARCHITECTURES["llama"].roles]
OTHERS = ("model.embed_tokens", "model.norm", "model.layers.3.mlp.gate", "visual.blocks.0.attn.qkv")


def require(head_bits: int | None = None, **fields: tuple[str, ...]) -> None:
    source: Any = SimpleNamespace(
        shapes={f"{name}.weight": (1, 1) for name in (*LINEARS, *OTHERS)},
        output=SimpleNamespace(name=lambda name: name.replace("self_attn.o_proj", "attention.wo")),
    )
    recipe: Any = SimpleNamespace(name="r", head_bits=head_bits)
    require_patterns(Rtn(**fields), recipe, source, ARCHITECTURES["llama"], LINEARS)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("re:.*down_proj$", 12),
        ("re:model\\.layers\\.1\\.", 7),
        ("re:model.layers.1", 21),  # as in compressed-tensors: 1, 10 and 11
        ("re:down_proj", 0),  # which is not where a name begins
        ("*.down_proj", 12),
        ("down_proj", 0),
        ("Linear", 84),
    ],
)
def test_what_a_pattern_matches(pattern: str, count: int):
    assert sum(matches(name, [pattern]) for name in LINEARS) == count
    assert sum(Rtn(layers=(pattern,)).selects(name) for name in LINEARS) == count
    assert sum(Rtn(ignore=(pattern,)).selects(name) for name in LINEARS) == 84 - count


@pytest.mark.parametrize(
    "pattern",
    [
        "lm_head",
        "re:.*lm_head",
        "re:.*mlp.gate$",
        "re:visual.*",
        "model.embed_tokens",
        "visual",
        "*",
    ],
)
def test_what_stays_as_it_is_may_be_named_in_ignore(pattern: str):
    require(ignore=(pattern,))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.mlp.dwon_proj", "*.mlp.down_proj"),
        ("re:.*dwon_proj$", "re:.*down_proj$"),
        ("*.qproj", "*.q_proj"),
        ("q_proj", "*.q_proj"),
        ("*.mlp", "*.mlp.*"),
        ("*.self_atn.o_porj", "*.self_attn.o_proj"),
        ("*.zzz", None),
        ("*.99.*", None),
    ],
)
@pytest.mark.parametrize("field", ["layers", "ignore"])
def test_a_mistyped_pattern_is_told_with_the_nearest(field: str, pattern: str, near: str | None):
    found = nearest_pattern(pattern, LINEARS)
    assert found == near
    with pytest.raises(ModelError) as caught:
        require(**{field: (pattern,)})
    text = str(caught.value)
    assert f"pattern '{pattern}' matches no linear of this model" in text
    assert ("did you mean" in text) == (near is not None)
    if near is not None:
        assert f"did you mean '{near}'?" in text
        require(**{field: (near,)})


def test_names_of_the_file_lead_to_those_of_the_model():
    with pytest.raises(
        ModelError, match=r"stored as .*attention\.wo is called .*self_attn\.o_proj"
    ):
        require(ignore=("*.attention.wo",))


def test_the_head_is_the_business_of_its_own_field():
    with pytest.raises(ModelError, match="head_bits"):
        require(layers=("lm_head",))
    with pytest.raises(RecipeError, match="head_bits: 8, but stage rtn has 'lm_head' in ignore"):
        require(8, ignore=("lm_head",))
    require(8, ignore=("*",))


def test_a_broken_expression_is_told_when_the_recipe_is_read():
    with pytest.raises(ValidationError, match=r"pattern 're:\*\(' is no regular expression"):
        Rtn(ignore=("re:*(",))


def test_patterns_of_other_tools_make_the_same_model(
    pq: Callable[..., tuple[int, str, str]], tiny: Callable[..., Path], tmp_path: Path
):
    kept = []
    for name, ignore in (("ours", "['*.down_proj']"), ("theirs", "[lm_head, 're:.*down_proj$']")):
        recipe, out = tmp_path / f"{name}.yaml", tmp_path / name
        recipe.write_text(f"description: d\nstages: [{{method: rtn, ignore: {ignore}}}]\n")
        code, _, err = pq("convert", "-m", tiny("llama"), "-r", recipe, "-o", out)
        assert code == 0, err
        kept.append(json.loads((out / "config.json").read_text())["quantization_config"])
    assert kept[0] == kept[1]
    assert "model.layers.1.mlp.down_proj" in kept[0]["ignore"]
    assert "model.layers.1.mlp.up_proj" not in kept[0]["ignore"]
