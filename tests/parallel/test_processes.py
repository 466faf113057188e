"""Several processes write the bytes that one process writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ModelMaker
from processes import same
from resumed import RECIPES, model_of, request

MORE = {
    "rotate-awq-gptq": "format: pq, head_bits: 8,"
    " stages: [{method: awq}, {method: rotate}, {method: gptq, group_size: 64}]",
    "sbvr-two": "format: pq, stages: [{method: sbvr, bits: 2, sweeps: 1, lines: 8, layers: ['*.q_proj', '*.v_proj']}]",
    "stages-that-share-inputs": "format: pq, stages: [{method: cas}, {method: fireq, activations: none, sweeps: 1,"
    " ignore: ['*.v_proj', '*.0.*.up_proj']}, {method: gptq, bits: 8, layers: ['*.v_proj']}]",
    "experts-gptq": "format: pq, stages: [{method: awq, grid: 3}, {method: gptq}]",
    "experts-fireq": "format: pq, stages: [{method: cas}, {method: fireq, sweeps: 1, activations: none}]",
}


# Three batches of 64 tokens, or two of 96, so that ranks have nothing to do in the last round.
@pytest.mark.parametrize(
    ("recipe", "batch_tokens"),
    [
        ("rtn", 64),
        ("gptq", 96),
        ("fireq", 64),
        ("rotate-awq-gptq", 96),
        ("sbvr-two", 64),
        ("stages-that-share-inputs", 96),
        ("target", 192),
    ],
)
def test_dense_models(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str, batch_tokens: int
):
    body = MORE.get(recipe, recipe)
    model = model_of(tiny, recipe)
    asked = request(body, model, text_file, tmp_path / "out", batch_tokens=batch_tokens)
    # Three ranks where the sweep below, which is slow, would come too late to tell.
    same(asked, tmp_path, (2, 3) if recipe in ("rtn", "gptq", "fireq") else (2,))


@pytest.mark.parametrize("recipe", ["experts-gptq", "experts-fireq"])
def test_experts(tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str):
    asked = request(MORE[recipe], tiny("qwen2_moe"), text_file, tmp_path / "out", batch_tokens=64)
    same(asked, tmp_path)


def test_sizes_that_no_group_divides(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    """Ranks pass on linears in groups of 64 and in whole rows, and what was noted of them."""
    model = tiny(
        "llama",
        hidden_size=192,
        intermediate_size=172,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    body = "stages: [{method: gptq}]"
    same(request(body, model, text_file, tmp_path / "out", batch_tokens=96), tmp_path, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, *MORE])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3"])
def test_every_recipe(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str, model_type: str
):
    model = model_of(tiny, recipe) if recipe.startswith("rotate") else tiny(model_type)
    if "ladimo" not in recipe:
        same(
            request(MORE.get(recipe, recipe), model, text_file, tmp_path / "out", batch_tokens=32),
            tmp_path,
            (2, 3, 4),
        )
