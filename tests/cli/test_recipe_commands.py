from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantize.cli.recipe import app
from quantize.errors import RecipeError
from quantize.recipe import files as recipe_files
from quantize.recipe import recipe as recipes
from quantize.recipe.listing import list_shipped
from quantize.recipe.recipe import recipe_schema, resolved_yaml

GOOD = "description: plain\nstages:\n  - method: rtn\n"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped recipes with two good ones, and an empty working directory."""
    folder, cwd = tmp_path / "data" / "recipes", tmp_path / "cwd"
    folder.mkdir(parents=True)
    cwd.mkdir()
    (folder / "plain.yaml").write_text(GOOD)
    (folder / "second.yaml").write_text(
        "# why\ndescription: '[b]two[/b]'\nstages:\n- method: awq\n- method: gptq\n"
    )
    monkeypatch.setattr(recipe_files, "data_dir", lambda name: folder.parent / name)
    monkeypatch.chdir(cwd)
    return folder


# Finding


def test_an_existing_path_wins_over_a_shipped_name(shelf: Path):
    assert (
        recipe_files.find_recipe("plain")
        == recipe_files.find_recipe("plain.yaml")
        == shelf / "plain.yaml"
    )
    Path("plain").mkdir()
    assert recipe_files.find_recipe("plain") == shelf / "plain.yaml"
    Path("plain.yaml").write_text(GOOD.replace("plain", "mine"))
    assert recipes.load_recipe("plain.yaml").description == "mine"
    assert recipes.load_recipe("plain").description == "plain"
    assert [path.name for path in recipe_files.shipped_recipes()] == ["plain.yaml", "second.yaml"]


@pytest.mark.parametrize(
    "name", ["plian", "plian.yaml", "", "../plain.yaml", "a\0b", "x" * 5000, "."]
)
def test_an_unknown_recipe_lists_the_names(shelf: Path, name: str):
    with pytest.raises(RecipeError) as caught:
        recipe_files.find_recipe(name)
    assert "(shipped: plain, second)" in str(caught.value)
    assert ("did you mean 'plain'?" in str(caught.value)) == ("pl" in name)
    assert len(str(caught.value)) < 300


def test_errors_name_the_file_as_it_was_given(shelf: Path):
    (shelf / "bad.yaml").write_text("description: 1\nstages: [{method: rtn}]")
    Path("own.yaml").write_text("description: 1\nstages: [{method: rtn}]")
    for given_name, shown in (
        ("bad", "bad.yaml"),
        ("./own.yaml", "own.yaml"),
        (str(shelf / "bad.yaml"),) * 2,
    ):
        with pytest.raises(RecipeError, match=f"^{re.escape(shown)}:1: description"):
            recipes.load_recipe(given_name)


# The commands


def call(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_ls(shelf: Path):
    (shelf / "third.yaml").write_text(
        "description: d\nstages:\n- {method: gptq, bits: 3, activations: none}\n- {method: rtn, bits: 8}\n"
    )
    rows = json.loads(call("ls", "--json").stdout)
    methods = {row["name"]: row["methods"] for row in rows}
    assert methods == {"plain": ["rtn"], "second": ["awq", "gptq"], "third": ["gptq", "rtn"]}
    assert [row["bits"] for row in rows] == [[], [], [3, 8]]
    assert [row["activations"] for row in rows] == [[], [], ["none"]]
    table = call("ls").stdout
    assert call("list").stdout == table
    assert "[b]two[/b]" in table  # text, not rich markup
    names = [line.partition(" ")[0] for line in table.splitlines()]
    assert names[:4] == ["name", "plain", "second", "third"]


def test_ls_is_a_line_a_recipe_at_80_columns():
    table = call("ls").stdout
    assert max(map(len, table.splitlines())) <= 80
    rows = json.loads(call("ls", "--json").stdout)
    told = table.splitlines()
    lines = {line.partition(" ")[0]: line for line in reversed(told)}
    for row in rows:
        line = lines[row["name"]]
        assert row["scheme"] in line
        assert row["purpose"] in line
    assert "w4a16 is fireq-linear --set activations=none" in told


def test_show_of_an_alias_is_a_recipe_of_its_own(tmp_path: Path):
    shown = call("show", "W4A16").stdout
    assert shown.startswith("# fireq-linear.yaml with activations=none\n")
    (tmp_path / "mine.yaml").write_text(shown)
    mine, meant = recipes.load_recipe(str(tmp_path / "mine.yaml")), recipes.load_recipe("w4a16")
    assert mine.stages == meant.stages
    assert call("show", "w4a8").stdout == call("show", "fireq-linear").stdout


def test_diff_shows_the_fields_that_differ():
    found = call("diff", "w4a16", "w4a8")
    assert found.exit_code == 1
    changed = [line for line in found.stdout.splitlines() if line[0] in "+-"]
    assert changed[:2] == ["--- w4a16", "+++ w4a8"]
    assert [line.split() for line in changed[2:]] == [
        ["-", "activations:", "none"],
        ["+", "activations:", "fp8"],
    ]
    same = call("diff", "w4a8", "FIREQ-LINEAR")
    assert (same.exit_code, same.stdout) == (0, "")


@pytest.mark.parametrize("path", recipe_files.shipped_recipes(), ids=lambda path: path.stem)
def test_ls_reads_in_each_shipped_recipe_what_its_stages_will_do(path: Path):
    """The list fills in no defaults: a recipe that leaves its bits or activations to them would show none."""
    recipe = recipes.load_recipe(path.stem)
    encodes = [stage for stage in recipe.stages if stage.kind == "encode"]
    (listing,) = [listing for listing in list_shipped() if listing.name == path.stem]
    assert listing.description == recipe.description
    assert listing.methods == [stage.method for stage in recipe.stages]
    for field, shown in (("bits", listing.bits), ("activations", listing.activations)):
        values = [getattr(stage, field) for stage in encodes if hasattr(stage, field)]
        assert shown == list(dict.fromkeys(values))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "is no recipe; `pq recipe validate broken` says why"),
        ("description: d\nstages: [rtn]\n", "is no recipe; `pq recipe validate broken` says why"),
        (
            "description: d\nstages: &s [{method: rtn}]\n",
            "broken.yaml:2: stages: anchor '&s' is refused",
        ),
    ],
)
def test_ls_names_a_file_that_is_no_recipe(shelf: Path, text: str, says: str):
    (shelf / "broken.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        list_shipped()
    assert says in str(caught.value)


def test_show(shelf: Path):
    assert call("show", "second").stdout == (shelf / "second.yaml").read_text()
    shown = call("show", "second", "--resolved").stdout
    assert shown == resolved_yaml(recipes.load_recipe("second"))
    result = call("show", "nothing")
    assert isinstance(result.exception, RecipeError)
    assert result.stdout == ""


def test_validate(shelf: Path):
    Path("bad.yaml").write_text(GOOD + "fomat: x\nzzz: 1\n")
    result = call("validate", "plain", "bad.yaml", "none.yaml", "second")
    assert result.exit_code == RecipeError.exit_code
    assert result.stdout.split("\n") == ["plain: ok", "second: ok", ""]
    lines = result.stderr.strip().split("\n")
    assert [line.split(": ")[0] for line in lines] == [
        "bad.yaml:4",
        "bad.yaml:5",
        "recipe 'none.yaml'",
    ]
    assert call("validate", "plain").exit_code == 0


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["show", "fireq"]])
def test_recipes_are_listed_and_printed_without_torch(arguments: list[str]):
    heavy = ("torch", "transformers", "datasets", "quantize.methods")
    code = f"""
import sys
from quantize.cli.recipe import app
app({arguments}, standalone_mode=False)
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "fireq" in run.stdout
    assert run.stderr.strip() == "[]"


def test_schema_command():
    assert json.loads(call("schema").stdout) == recipe_schema()
