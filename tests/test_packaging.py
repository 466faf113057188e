"""What is shipped, and where it is found."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import quantize
from quantize import errors
from quantize.files import resources
from quantize.files.resources import data_dir
from quantize.recipe.files import shipped_recipes
from quantize.recipe.recipe import load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# The wheel


def test_the_wheel_takes_folders_that_exist(project: dict[str, Any]):
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        assert (ROOT / source).is_dir(), source
        assert any((ROOT / source).iterdir()), source
        assert target == f"quantize/_data/{source}"


def test_the_wheel_takes_every_folder_that_the_code_asks_for(project: dict[str, Any]):
    asked = {
        node.args[0].value
        for path in (ROOT / "quantize").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name | ast.Attribute)
        and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) == "data_dir"
        and isinstance(node.args[0], ast.Constant)
    }
    assert "recipes" in asked
    assert asked <= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"])


def test_data_stays_out_of_the_package_in_the_repository():
    assert not (ROOT / "quantize" / "_data").exists(), (
        "a copy there would hide the folders beside the package"
    )
    assert not list((ROOT / "eval").glob("__init__.py")), (
        "a package called eval would hide the builtin"
    )


def test_the_command_is_declared(project: dict[str, Any]):
    assert project["project"]["scripts"] == {"pq": "quantize.cli:run"}
    assert project["tool"]["hatch"]["version"]["path"] == "quantize/version.py"


# Finding data


def test_extras_that_messages_name_are_declared(project: dict[str, Any]):
    declared = set(project["project"]["optional-dependencies"])
    sources = [
        *(ROOT / "quantize").rglob("*.py"),
        *(ROOT / "eval").rglob("*.py"),
        ROOT / "README.md",
    ]
    for path in sources:
        named = re.findall(r"pq-quantize\[(\w+)\]", path.read_text(encoding="utf-8"))
        assert set(named) <= declared, path


@pytest.mark.parametrize("name", ["recipes", "calib_data", "eval"])
def test_data_is_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / name).mkdir()  # a namesake in the working directory is not ours
    monkeypatch.chdir(tmp_path)
    folder = data_dir(name)
    assert folder.is_absolute()
    assert folder == ROOT / name
    assert any(folder.iterdir())


def test_recipes_load_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("fireq").name == load_recipe("fireq.yaml").name == "fireq"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty installation; returns the package's folder."""
    package = tmp_path / "site-packages" / "quantize"
    package.mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", package)
    return package


def test_the_installed_copy_wins_over_a_neighbour(installed: Path):
    beside = installed.parent / "recipes"
    beside.mkdir()
    assert data_dir("recipes") == beside
    inside = installed / "_data" / "recipes"
    inside.mkdir(parents=True)
    assert data_dir("recipes") == inside


def test_a_file_of_that_name_is_no_folder(installed: Path):
    (installed / "_data").mkdir()
    (installed / "_data" / "recipes").write_text("")
    (installed.parent / "recipes").mkdir()
    assert data_dir("recipes") == installed.parent / "recipes"


def test_data_that_is_absent_is_told_with_the_remedy(installed: Path):
    with pytest.raises(FileNotFoundError) as caught:
        data_dir("recipes")
    message = str(caught.value)
    assert message.startswith("recipes/ ")
    assert str(installed / "_data") in message
    assert "reinstall" in message
    with pytest.raises(errors.RecipeError, match="reinstall"):
        load_recipe("fireq")


# Recipes and version


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipes_validate_and_say_what_they_are_for(path: Path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert 20 < len(recipe.description) <= 120
    assert "\n" not in recipe.description
    assert any(stage.kind in ("restructure", "cache", "encode") for stage in recipe.stages)


def test_descriptions_differ():
    descriptions = [load_recipe(path.stem).description for path in shipped_recipes()]
    assert len(set(descriptions)) == len(descriptions) >= 5


def test_the_version_is_one():
    assert str(Version(quantize.__version__)) == quantize.__version__


def test_the_command_prints_the_version():
    commands = [
        c for c in importlib.metadata.entry_points(group="console_scripts") if c.name == "pq"
    ]
    assert commands, "pq is not installed; pip install -e ."
    # In a process of its own, which the command ends.
    code = f"import sys, {commands[0].module} as m; sys.argv = ['pq', '--version']; m.{commands[0].attr}()"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"pq {quantize.__version__}\n"
