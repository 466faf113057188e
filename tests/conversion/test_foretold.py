"""What a recipe would make of a model is what it does make of it: bytes of the plan, no conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker, request_for

from quantize.conversion.foretold import foretold
from quantize.errors import UsageError
from quantize.plan.checkpoint import model_of, served_model
from quantize.plan.served import ServedModel


def expected_of(model: Path, recipe: str, text: Path, *changes: str) -> ServedModel:
    request = request_for(model, recipe, Path("nowhere"), text, *changes)
    return model_of(*foretold(request), name="it")


@pytest.mark.parametrize(
    ("recipe", "model_type", "changes", "model"),
    [
        ("gptq", "llama", (), {}),
        ("fireq", "llama", (), {}),
        ("rtn", "qwen2_moe", (), {}),
        pytest.param("sbvr", "llama", (), {}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_of_a_recipe_is_that_of_its_output(
    recipe: str,
    model_type: str,
    changes: tuple[str, ...],
    model: dict[str, Any],
    converted: ModelMaker,
    tiny: ModelMaker,
    text_file: Path,
):
    found = served_model(converted(recipe, model_type, *changes, **model), name="it")
    told = expected_of(tiny(model_type, **model), recipe, text_file, *changes)
    plain = served_model(tiny(model_type, **model), name="it")
    for tp in (1, 2):
        weights = found.weights(tp)
        # Codebooks of bit vectors are counted as the stage allows them at most.
        slack = {"sbvr": 0.03 * weights}.get(recipe, 0)
        assert told.weights(tp) == pytest.approx(weights, rel=0, abs=slack)
        assert told.kv_bytes_per_token(tp) == found.kv_bytes_per_token(tp)
        assert weights < plain.weights(tp)
    same = {"parts": (), "notes": ()}
    assert replace(told, **same) == replace(found, **same)
    assert [p.name for p in told.parts] == [p.name for p in found.parts]


def test_a_rotation_gives_a_tied_head_its_own_bytes(
    converted: ModelMaker, tiny: ModelMaker, text_file: Path
):
    tied = {"tie_word_embeddings": True}
    found = served_model(converted("fireq", "llama", **tied), name="it")
    told = expected_of(tiny("llama", **tied), "fireq", text_file)
    assert told.weights() == found.weights()


def test_what_is_decided_by_measuring_is_refused(tiny: ModelMaker, text_file: Path):
    with pytest.raises(UsageError, match="convert, and name the output's folder"):
        expected_of(tiny("llama"), "ladimo", text_file)
    request = request_for(tiny("llama"), "gptq", Path("nowhere"), text_file)
    with pytest.raises(UsageError, match="a budget of bits"):
        foretold(replace(request, target_bpw=4.5))
