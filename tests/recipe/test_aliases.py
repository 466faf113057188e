"""Recipes by scheme: what each stands for is what our own figures say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.errors import RecipeError
from quantize.files.resources import data_dir
from quantize.recipe.aliases import ALIASES, Alias, alias_of
from quantize.recipe.files import find, find_recipe, shipped_recipes
from quantize.recipe.listing import (
    CHOICES,
    PURPOSES,
    WIDTH,
    Listing,
    list_aliases,
    list_shipped,
)
from quantize.recipe.measured import MODELS, ROWS, measured
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.recipe.serving import unserved_by


def scheme_of(recipe: Recipe) -> str:
    """From the stages themselves, not from the file's words."""
    encoder = next((stage for stage in recipe.stages if stage.kind == "encode"), None)
    fp8 = getattr(encoder, "activations", "none") == "fp8"
    cache = "KV4" if any(stage.kind == "cache" for stage in recipe.stages) else ""
    return f"W{encoder.bits if encoder else 16}A{8 if fp8 else 16}{cache}"


def measured_recipes() -> dict[tuple[str, tuple[str, ...]], Recipe]:
    return {key: with_stage_fields(load_recipe(key[0]), key[1]) for key in ROWS}


@pytest.mark.parametrize("alias", ALIASES, ids=str)
def test_an_alias_is_the_best_that_was_measured_of_its_scheme(alias: Alias):
    mine = load_recipe(alias.name)
    assert scheme_of(mine).lower() == alias.name
    rivals = {
        key: recipe
        for key, recipe in measured_recipes().items()
        if scheme_of(recipe) == scheme_of(mine)
        and all(stage.kind != "restructure" for stage in recipe.stages)
    }
    # What stock vLLM serves on some GPU without an optional package goes before what needs pq.
    stock = {
        key: recipe
        for key, recipe in rivals.items()
        if recipe.format == "compressed-tensors"
        and not any(line.refused for line in unserved_by(recipe))
    }
    losses = {key: measured(*key)[MODELS[0]].kld for key in stock or rivals}
    assert len(losses) > 1 or alias.name == "w4a8kv4"
    assert min(losses, key=lambda key: losses[key]) == (alias.recipe, alias.settings)


def test_every_row_of_results_is_found_once():
    for stem, key in ROWS.values():
        rows = json.loads((data_dir("eval") / "results" / f"{stem}.json").read_text())["rows"]
        found = [row["model"] for row in rows if key.items() <= row.items()]
        assert sorted(found) == sorted(set(found)), (stem, key)
        assert MODELS[0] in found, (stem, key)


def test_figures_are_those_of_the_results_page():
    found = measured("fireq-linear", ("activations=none",))
    text = (data_dir("eval").parent / "docs" / "results.md").read_text()
    for figures in found.values():
        row = f"| {figures.model} | fireq-linear | W4A16 | 4.125 |"
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        assert f"| {figures.kld:.5f} |" in line
        assert f"| {figures.top1:.3f} |" in line
    assert measured("fireq-linear", ("bits=7",)) == measured("no such recipe") == {}


@pytest.mark.parametrize("name", ["w4a16", "W4A16", "w4a8", "W4a8-KV4", "w4_a16", "w3a16.yaml"])
def test_case_and_strokes_do_not_matter(name: str):
    alias = alias_of(name.removesuffix(".yaml"))
    assert alias is not None
    loaded = load_recipe(name)
    assert loaded == with_stage_fields(load_recipe(alias.recipe), alias.settings)
    assert find(name).path == find_recipe(alias.recipe)


def test_a_file_goes_before_an_alias_and_a_shipped_name_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("GPTQ") == load_recipe("gptq")
    Path("w4a16").mkdir()  # an output that is called so
    assert load_recipe("w4a16").name == "fireq-linear"
    Path("w4a8").write_text("description: mine\nstages: [{method: rtn}]\n")
    assert load_recipe("w4a8").description == "mine"


def test_a_slip_is_answered_with_the_nearest():
    for wrong, meant in (("w4a61", "w4a16"), ("w4a8kv", "w4a8kv4"), ("sbrv", "sbvr")):
        with pytest.raises(RecipeError, match=f"did you mean '{meant}'"):
            load_recipe(wrong)


# The list


def test_lines_of_the_list_say_what_the_recipes_do():
    listings = [*list_aliases(), *list_shipped()]
    assert [one.name for one in listings[: len(ALIASES)]] == [alias.name for alias in ALIASES]
    assert len(listings) == len(ALIASES) + len(shipped_recipes())
    for one in listings:
        recipe = load_recipe(one.name)
        assert one.scheme == scheme_of(recipe), one.name
        assert one.format == recipe.format
        reads = any(stage.needs_inputs for stage in recipe.stages)
        tokens = recipe.calibration.nsamples * recipe.calibration.seqlen
        assert one.tokens == (tokens if reads else 0), one.name
        assert one.loads_in == loads_in(recipe), one.name
        assert one.name in PURPOSES
        widths = (18, 9, 9, 4, 6, 24)
        assert all(len(cell) <= width for cell, width in zip(one.cells(), widths, strict=True))
        assert sum(widths) + 2 * (len(widths) - 1) == WIDTH
    assert {*CHOICES} <= {one.name for one in listings}


def loads_in(recipe: Recipe) -> str:
    if recipe.format != "compressed-tensors":
        return {"pq": "pq", "gguf": "llama.cpp"}[recipe.format]
    lines = unserved_by(recipe)
    assert not any(line.refused for line in lines)
    return "vLLM*" if any("H100" in line.where for line in lines) else "vLLM"


def test_what_was_not_measured_is_not_made_up():
    kld = {one.name: one.kld for one in list_shipped()}
    assert kld["fireq-sbvr"] is None
    by_name: dict[str, Listing] = {one.name: one for one in list_shipped()}
    assert by_name["fireq-sbvr"].cells()[4] == "-"
    assert kld["sbvr"] is not None
    assert kld["gptq"] is not None
    assert kld["sbvr"] < kld["gptq"]
