"""Methods that other distributions bring: found by name, used like our own, refused in one line
where broken."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from autoround_like import AutoRoundLike
from conftest import CPU, BlockMaker, ModelMaker
from resumed import files_of, kept, stopped_after, whole

from quantize.block.block import Block
from quantize.block.teacher import freeze_layer, teacher_outputs
from quantize.conversion.loop import convert
from quantize.errors import RecipeError
from quantize.evaluation import evaluate
from quantize.methods import STAGES
from quantize.methods.rtn import Rtn
from quantize.recipe.recipe import (
    Recipe,
    allow_methods,
    parse_recipe,
    recipe_schema,
    resolved_yaml,
)
from quantize.recipe.stages import METHODS

Installer = Callable[..., None]
RECIPE = "format: compressed-tensors, stages: [{method: autoround-like, bits: 3, steps: 40}]"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Put a distribution on the path: what pip leaves of one that names methods. What was loaded is
    forgotten after."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def put(name: str, entries: dict[str, str], **modules: str) -> None:
        info = site / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "\n".join(f"{method} = {target}" for method, target in entries.items())
        (info / "entry_points.txt").write_text(f"[pq.methods]\n{lines}\n")
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
        importlib.invalidate_caches()

    yield put
    for method in set(METHODS) - {cls.model_fields["method"].default for cls in STAGES}:
        del METHODS[method]
    allow_methods()


@pytest.fixture
def installed(install: Installer) -> None:
    install("autoround-like", {"autoround-like": "autoround_like:AutoRoundLike"})


def recipe(stages: str) -> Recipe:
    return parse_recipe(f"description: d\nstages: {stages}\n", "r.yaml")


def error_of_outputs(block: Block, stage: Any) -> float:
    """Relative squared error of the block's outputs against its teacher's."""
    with torch.no_grad():
        freeze_layer(block)
        wanted = torch.cat(list(teacher_outputs(block)))
        stage.apply(block)
        found = torch.cat([block.forward(block.module, hidden) for hidden in block.inputs])
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_it_fits_one_short_file():
    assert len(Path(str(sys.modules["autoround_like"].__file__)).read_text().splitlines()) <= 60


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("with_parent", [True, False])
def test_it_errs_less_than_rounding(make_block: BlockMaker, model_type: str, with_parent: bool):
    tuned = error_of_outputs(make_block(model_type, with_parent=with_parent), AutoRoundLike(bits=3))
    rounded = error_of_outputs(make_block(model_type, with_parent=True), Rtn(bits=3, clip="mse"))
    assert tuned < 0.8 * rounded


@pytest.mark.usefixtures("installed")
def test_a_recipe_names_it(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    assert "autoround-like" not in METHODS
    asked = kept(tiny, text_file, tmp_path, RECIPE)
    assert METHODS["autoround-like"] is AutoRoundLike
    assert parse_recipe(resolved_yaml(asked.recipe), "r.yaml") == asked.recipe
    stopped_after(asked, 2)
    summary = convert(asked)
    assert summary.quantized_linears == 21
    files = files_of(asked.output)
    assert files == whole(asked)
    assert json.loads(files["pq.json"])["versions"]["autoround-like"] == "1.2"
    text = {"dataset": str(text_file), "seqlen": 32, "max_windows": 8}
    by_rtn = kept(tiny, text_file, tmp_path / "rtn", "stages: [{method: rtn, bits: 3, clip: mse}]")
    convert(by_rtn)
    figures = [
        evaluate(folder, asked.model, device=CPU, **text)
        for folder in (asked.output, by_rtn.output)
    ]
    assert figures[0].kld_mean < figures[1].kld_mean


@pytest.mark.usefixtures("installed")
def test_the_schema_has_it():
    schema = recipe_schema()
    assert schema["$defs"]["AutoRoundLike"]["properties"]["steps"]["default"] == 100
    assert "method" in schema["$defs"]["AutoRoundLike"]["required"]


@pytest.mark.usefixtures("installed")
def test_it_is_named_where_a_name_is_wrong():
    with pytest.raises(
        RecipeError,
        match=r"did you mean 'autoround-like'\? the methods are ladimo, .*autoround-like",
    ):
        recipe("[{method: autoround-lik}]")
    assert "autoround-like" not in METHODS  # and was not loaded


def test_nothing_is_looked_for_without_need(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quantize.methods.plugins.entry_points", None)
    assert [stage.method for stage in recipe("[{method: cas}, {method: rtn}]").stages] == [
        "cas",
        "rtn",
    ]


BROKEN = {
    "import": (
        {"odd": "odd_module:Odd"},
        "import absent_package",
        r"cannot be loaded \(ModuleNotFoundError: .*absent",
    ),
    "attribute": ({"odd": "odd_module:Odd"}, "", r"cannot be loaded \(AttributeError: "),
    "class": ({"odd": "odd_module:Odd"}, "Odd = dict", r"odd_module:Odd is no stage class"),
    "name": ({"odd": "quantize.methods.rtn:Rtn"}, "", r"no kind or another method's name"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_is_refused_in_one_line(install: Installer, case: str):
    entries, text, says = BROKEN[case]
    sys.modules.pop("odd_module", None)
    install("odd-methods", entries, odd_module=text)
    with pytest.raises(
        RecipeError,
        match=rf"^r\.yaml:2: stages\[0\]\.method: method 'odd' of odd-methods 1\.2: .*{says}",
    ) as e:
        recipe("[{method: odd}]")
    assert "\n" not in str(e.value)
    with pytest.raises(RecipeError, match=rf"^method 'odd' of odd-methods 1\.2: .*{says}"):
        recipe_schema()


def test_a_name_that_comes_twice_is_refused(install: Installer):
    for name in ("one", "two"):
        install(name, {"autoround-like": "autoround_like:AutoRoundLike"})
    with pytest.raises(
        RecipeError,
        match=r"method 'autoround-like' of (one|two) 1\.2: comes with (one|two) 1\.2, too",
    ):
        recipe("[{method: autoround-like}]")


def test_a_name_of_ours_is_refused(install: Installer):
    install("theirs", {"rtn": "autoround_like:AutoRoundLike"})
    with pytest.raises(
        RecipeError, match=r"method 'rtn' of theirs 1\.2: pq has a method of that name itself"
    ):
        recipe_schema()


def test_a_class_of_a_known_name_is_refused(install: Installer):
    text = (
        "from typing import Literal\nfrom quantize.methods.rtn import Rtn as Ours\n"
        "class Rtn(Ours):\n    method: Literal['other'] = 'other'\n"
    )
    install("theirs", {"other": "same_class:Rtn"}, same_class=text)
    with pytest.raises(
        RecipeError, match=r"method 'other': its class is called Rtn as that of 'rtn'; rename one"
    ):
        recipe("[{method: other}]")


@pytest.mark.usefixtures("installed")
def test_the_command_line_finds_it(tmp_path: Path):
    paths = [str(tmp_path / "site"), str(Path(__file__).parent), str(Path(__file__).parents[2])]
    (tmp_path / "r.yaml").write_text("description: d\nstages: [{method: autoround-like}]\n")
    command = [sys.executable, "-m", "quantize", "recipe", "validate", str(tmp_path / "r.yaml")]
    done = subprocess.run(
        command, env={"PYTHONPATH": ":".join(paths)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
