from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gates import GOOD, Maker, write_gate

from quantize.errors import RecipeError
from quantize.files.resources import data_dir
from quantize.gate.file import load_gate
from quantize.recipe.recipe import load_recipe


@pytest.fixture
def gate_file(tmp_path: Path, tiny: Maker) -> Callable[..., Path]:
    """Write a gate file on a tiny model: gate_file("fireq: {...}", "tasks: [...]")."""
    return functools.partial(write_gate, tmp_path / "gate.yaml", tiny("llama"))


def problems_of(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_gate(path)
    assert caught.value.exit_code == 3
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        (
            "kld_maen: {value: 1, tolerance: 0}",
            ".kld_maen: unknown metric; did you mean 'kld_mean'? the metrics are ",
        ),
        ("kld_mean: {value: 1}", ".kld_mean: 'tolerance' is missing; add"),
        ("kld_mean: {tolerance: 1}", ".kld_mean: 'value' is missing; write"),
        ("kld_mean: {}", ".kld_mean: 'value' is missing; write"),
        ("kld_mean: 0.02", ".kld_mean: must be a mapping (value 0.02); write"),
        ("kld_mean: {value: .nan, tolerance: 0}", ".kld_mean.value: .nan is not a finite"),
        ("kld_mean: {value: '1', tolerance: 0}", ".kld_mean.value: must be a number (value '1')"),
        ("kld_mean: {value: true, tolerance: 0}", ".kld_mean.value: must be a number (value true)"),
        (
            "kld_mean: {value: 1, tolerance: -1}",
            ".kld_mean.tolerance: must be a number >= 0, a percentage",
        ),
        (
            "kld_mean: {value: 1, tolerance: 5pct}",
            ".kld_mean.tolerance: must be a number >= 0, a percentage",
        ),
        (
            "kld_mean: {value: 1, tolerence: 5}",
            ".kld_mean.tolerence: unknown field; did you mean 'tolerance'? ",
        ),
        (
            "kld_mean: {recovery: 0.9}",
            ".kld_mean.recovery: kld_mean is no figure of the parent; write value",
        ),
        (
            "perplexity: {recovery: 95}",
            ".perplexity.recovery: must be a number > 0 and <= 1, such as 0.95 (value 95)",
        ),
        (
            "word_perplexity: {recovery: 0.9}",
            ".word_perplexity: only the rolling protocol gives it; write",
        ),
        (
            "arc_easy/acc: {recovery: 0.9}",
            ".'arc_easy/acc': is a task's metric, but the file names no tasks; add",
        ),
        ("set: [bits=2]", ": checks nothing; add a metric"),
        ("set: [bits=99], kld_mean: {}", ".set: --set: rtn.bits: "),
        ("set: [bitz=3], kld_mean: {}", ".set: --set bitz=3: no stage of recipe 'rtn' has"),
        ("set: bits=3, kld_mean: {}", ".set: must be a list of texts (value 'bits=3')"),
        ("recipe: no.yaml, kld_mean: {}", ".recipe: recipe 'no.yaml': no such file"),
    ],
)
def test_every_mistake_in_an_entry_is_a_line(
    gate_file: Callable[..., Path], checks: str, expected: str
):
    found = problems_of(gate_file(f"rtn: {{{checks}}}"))
    assert [line for line in found if line.startswith(f"3: recipes.rtn{expected}")], found


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ("calibration: {nsamples: 0}", "calibration.nsamples: must be an integer >= 1 (value 0)"),
        (
            "calibration: {nsample: 4}",
            "calibration.nsample: unknown field; did you mean 'nsamples'? ",
        ),
        ("calibration: {dataset: 4}", "calibration.dataset: must be a text (value 4)"),
        ("evaluation: {seqlen: 4}", "evaluation.seqlen: must be an integer >= 8 (value 4)"),
        (
            "evaluation: {numerics: fast}",
            "evaluation.numerics: must be kernel or stock (value 'fast')",
        ),
        ("evaluation: {seqlen: 16, context: 16}", "evaluation.context: context 16 must be"),
        ("evaluation: 5", "evaluation: must be a mapping (value 5)"),
        ("tasks: arc_easy", "tasks: must be a list of texts (value 'arc_easy')"),
        ("task_limit: 0", "task_limit: must be an integer >= 1 (value 0)"),
        ("recipies: {}", "recipies: unknown field; did you mean 'recipes'? "),
        ("model: twice", "model: duplicate key, first on line 1"),
        ("history: none", "history: must be a list"),
    ],
)
def test_every_mistake_above_the_entries_is_a_line(
    gate_file: Callable[..., Path], top: str, expected: str
):
    assert problems_of(gate_file(GOOD, top))[0].startswith(f"2: {expected}")
    assert len(problems_of(gate_file(GOOD, top))) == 1


def test_a_recipe_that_is_not_there(gate_file: Callable[..., Path]):
    (line,) = problems_of(
        gate_file("fierq: {perplexity: {recovery: 0.9}}\nrtn: {perplexity: {recovery: 0.9}}")
    )
    assert line.startswith("3: recipes.fierq: recipe 'fierq': no such file and no shipped recipe")
    assert "did you mean 'fireq'?" in line
    assert line.endswith("or name a file with 'recipe: FILE'")
    assert problems_of(gate_file("rtn: 5")) == [
        "3: recipes.rtn: must be a mapping (value 5); write 'METRIC: {recovery: 0.95}'"
    ]


def test_all_mistakes_are_found_at_once(gate_file: Callable[..., Path]):
    path = gate_file(
        "fireq: {kld: {}}\ngptq: {perplexity: {recovery: 2}}",
        "calibration: {seqlen: 1}",
        "modle: x",
    )
    assert [line.split(":")[0] for line in problems_of(path)] == ["2", "3", "5", "6"]


def test_no_file_no_mapping_no_recipes(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    with pytest.raises(RecipeError, match=r"gate\.yaml: cannot be read"):
        load_gate(path)
    for text, message in (
        ("", "the file is empty"),
        ("- 1", "must be a mapping"),
        ("model: x", "'recipes' is missing"),
    ):
        path.write_text(text)
        assert message in problems_of(path)[0]
    path.write_text("recipes: {}")
    assert "one entry or more" in problems_of(path)[0]


def test_names_of_files_start_from_the_gate_file(
    gate_file: Callable[..., Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(data_dir("recipes") / "rtn.yaml", tmp_path / "mine.yaml")
    shutil.copy(text_file, tmp_path / "text.txt")
    path = gate_file(
        "a: {recipe: mine.yaml, set: [bits=3], perplexity: {recovery: 0.5}}\nfireq: {t/acc: {recovery: 0.5}}",
        "calibration: {dataset: text.txt, nsamples: 3}",
        "evaluation: {dataset: text.txt}",
        "tasks: [multiple_choice:text.txt, arc_easy]",
    )
    monkeypatch.chdir(tmp_path.parent)
    gate = load_gate(path)
    ours, fireq = gate.entries
    assert (ours.recipe.name, ours.recipe.stages[0].bits) == ("mine", 3)  # type: ignore[attr-defined]
    assert fireq.recipe.calibration.dataset == gate.evaluation.dataset == str(tmp_path / "text.txt")
    assert fireq.recipe.calibration.nsamples == 3
    assert gate.tasks == (f"multiple_choice:{tmp_path / 'text.txt'}", "arc_easy")


def test_a_scheme_names_the_best_recipe_for_it(gate_file: Callable[..., Path]):
    checks = "{kld_mean: {value: 1, tolerance: 1}}"
    path = gate_file(f"W4A16: {checks}\nmine: {{recipe: w4a8, {checks[1:]}")
    by_name = {entry.name: entry.recipe for entry in load_gate(path).entries}
    for name, scheme in (("W4A16", "w4a16"), ("mine", "w4a8")):
        assert by_name[name].stages == load_recipe(scheme).stages
    assert by_name["W4A16"].stages != by_name["mine"].stages
