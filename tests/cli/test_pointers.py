"""Words of other tools get the right pointer, and shells know what may follow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from quantize.cli import app, complete
from quantize.cli.convert import convert
from quantize.cli.estimate import estimate
from quantize.cli.pointers import COMMANDS, OPTIONS
from quantize.recipe.files import shipped_recipes

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]
COMMAND = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("convert", "some/model", "-r", "rtn", "-o", "out"),
            "give the model as --model some/model",
        ),
        (("estimate", "some/model", "-r", "rtn"), "give the model as --model some/model"),
        (("convert", "a b", "-o", "x"), "give the model as --model 'a b'"),
        (("convert", "-m", "x", "y", "-o", "z"), "'y' is not expected here; every value follows"),
        (("convert", "-m", "x", "-o", "y", "--bits", "3"), "--set bits=3"),
        (("convert", "-m", "x", "-o", "y", "--bits=3"), "-r w4a16, w4a8, w3a16 or w2a16"),
        (("estimate", "-m", "x", "--format", "gguf"), "-r gguf-q4_0 for llama.cpp"),
        (("convert", "-m", "x", "--num-samples", "64"), "no option --num-samples; --nsamples 64"),
        (("convert", "-m", "x", "--num_samples", "64"), "no option --num-samples; --nsamples 64"),
        (("convert", "-m", "x", "--force"), "--overwrite"),
        (("quantize", "x"), "no command 'quantize'; it is pq convert (pq convert --help)"),
        (("recipes",), "it is pq recipe ls"),
        (("evaluate", "x"), "it is pq eval"),
    ],
)
def test_the_right_pointer_in_one_line(pq: Call, arguments: tuple[str, ...], says: str):
    code, out, err = pq(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert err.startswith("pq: error: ")


def test_a_recipe_without_its_option(pq: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("description: d\n")
    assert "a recipe is given as --recipe mine.yaml" in pq("convert", "mine.yaml", "-o", "x")[2]


def test_other_slips_are_told_of_as_before(pq: Call):
    code, _, err = pq("convert", "-m", "x", "-o", "y", "--recip", "rtn")
    assert code == 2
    assert "--recipe" in err  # what the parser itself offers
    assert pq("convert", "-m", "x")[0] == 2
    assert "No such command 'nonsense'" in pq("nonsense")[2]


def test_pointers_name_what_there_is():
    for wrong, meant in COMMANDS.items():
        assert wrong not in COMMAND.commands
        found = COMMAND
        for word in meant.split():
            found = found.commands[word]
    known = {option for p in COMMAND.commands["convert"].params for option in p.opts}
    for wrong, meant in OPTIONS.items():
        assert wrong not in known
        words = meant.replace(",", " ").replace(";", " ").split()
        assert {word for word in words if word.startswith("--")} <= known
        assert {*words} & known or "pq recipe ls" in meant


# `pq estimate` and `pq convert`


def test_estimate_takes_every_option_of_convert():
    """The same words with the same meaning; only the output may be left out, and time may be."""
    theirs, ours = COMMAND.commands["convert"].params, COMMAND.commands["estimate"].params
    by_name = {p.name: p for p in ours}
    assert set(by_name) - {p.name for p in theirs} == {"timed"}
    for option in theirs:
        found = by_name[option.name]
        assert found.opts == option.opts
        assert found.secondary_opts == option.secondary_opts
        assert found.default == option.default
    hints = (get_type_hints(f, include_extras=True) for f in (convert, estimate))
    here, there = hints
    differ = {name for name in here if get_args(here[name]) != get_args(there.get(name))}
    assert differ <= {"output", "as_json", "return", "ctx"}


# Completion


@pytest.fixture
def here(tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, a folder of models and a recipe."""
    (tmp_path / "mine").symlink_to(tiny("llama"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny("llama"))
    (tmp_path / "other.yaml").write_text("description: d\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes_and_models_are_offered(here: Path):
    offered = [word for word, _ in complete.recipes("")]
    assert {path.stem for path in shipped_recipes()} <= {*offered}
    assert {"w4a16", "w2a16", "other.yaml", "models/"} <= {*offered}
    assert [word for word, _ in complete.recipes("W4A8")] == ["w4a8", "w4a8kv4"]
    assert dict(complete.recipes("sbvr-3"))["sbvr-3bit"]
    assert [word for word, _ in complete.models("m")] == ["mine", "models/"]
    assert [word for word, _ in complete.models("models/")] == ["models/tiny"]
    assert complete.models("nowhere/") == []
    assert [word for word, _ in complete.models(f"{here}/mi")] == [f"{here}/mine"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pq convert --recipe w4a8", {"w4a8", "w4a8kv4"}),
        ("pq estimate -r sbvr-", {"sbvr-2bit", "sbvr-3bit"}),
        ("pq convert --resume ", {"auto", "required", "never"}),
        ("pq eval x --numerics ", {"kernel", "stock"}),
        ("pq convert --model mi", {"mine"}),
    ],
)
def test_a_shell_is_told(here: Path, line: str, expected: set[str]):
    words = line.split(" ")
    environment = os.environ | {
        "_PQ_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    start = "import sys; sys.argv[0] = 'pq'; from quantize.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start], env=environment, capture_output=True, text=True, check=False
    )
    assert {*done.stdout.split()} == expected, done.stderr
