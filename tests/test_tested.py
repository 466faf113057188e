"""One line, once, where a dependency is outside the releases that pq was tested with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from quantize import tested

RANGES = {
    "torch": ["2.11", "2.13.0"],
    "transformers": ["5.17", "5.24.0"],
    "triton": ["3.6", "3.7.1"],
}
INSTALLED = {"torch": "2.13.0+cpu", "transformers": "5.24.0"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that metadata gives, to be changed by a test; triton is not installed."""
    found = dict(INSTALLED)

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: json.dumps(RANGES))
    monkeypatch.setattr(tested, "_told", [])
    monkeypatch.delenv(tested.SILENCE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return found


def test_nothing_is_said_inside_the_range(installed: dict[str, str]):
    assert tested.version_notice() is None


@pytest.mark.parametrize("version", ["5.24.9", "5.17.0", "5.24.0.dev0", "5.20.1"])
def test_a_patch_release_is_inside(installed: dict[str, str], version: str):
    installed["transformers"] = version
    assert tested.version_notice() is None


@pytest.mark.parametrize("version", ["5.25.0", "6.0", "5.25.0.dev0", "5.16.3", "4.99"])
def test_what_is_outside_is_named_once(installed: dict[str, str], version: str):
    installed["transformers"] = version
    line = tested.version_notice()
    assert line
    assert f"transformers {version} (tested: 5.17 to 5.24.0)" in line
    assert "torch" not in line
    assert "\n" not in line
    assert tested.SILENCE in line
    assert tested.version_notice() is None


def test_all_of_them_stand_in_one_line(installed: dict[str, str]):
    installed |= {"torch": "2.14.1+cpu", "triton": "4.0.0"}
    line = tested.version_notice()
    assert line
    assert "torch 2.14.1+cpu (tested: 2.11 to 2.13.0), triton 4.0.0 (tested: 3.6 to 3.7.1)" in line


@pytest.mark.parametrize(("value", "said"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_it_can_be_silenced(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, value: str, said: bool
):
    installed["torch"] = "3.0"
    monkeypatch.setenv(tested.SILENCE, value)
    assert (tested.version_notice() is not None) == said


def test_the_first_process_of_a_launch_alone_says_it(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    installed["torch"] = "3.0"
    monkeypatch.setenv("RANK", "1")
    assert tested.version_notice() is None
    monkeypatch.setenv("RANK", "0")
    assert tested.version_notice() is not None


def test_python_gets_a_warning_once(installed: dict[str, str]):
    installed["torch"] = "3.0"
    with pytest.warns(UserWarning, match="not tested with torch 3.0"):
        tested.warn_untested()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tested.warn_untested()


# Whole processes: an installation whose torch claims to be of a later release.


@pytest.fixture
def later(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds such metadata first."""
    folder = tmp_path / "later" / "torch-9.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.1.0\n")
    root = Path(tested.__file__).parents[1]
    kept = {
        name: value for name, value in os.environ.items() if name not in (tested.SILENCE, "RANK")
    }
    return {**kept, "PYTHONPATH": f"{folder.parent}{os.pathsep}{root}"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_a_command_that_computes_says_it_on_stderr(later: dict[str, str], command: str):
    done = run(later, "-m", "quantize", command, "/no/such/model", "/nor/this")
    said = [line for line in done.stderr.splitlines() if "not tested with" in line]
    assert len(said) == 1
    assert (
        said[0].startswith("pq: note: not tested with torch 9.1.0 (tested: ")
        or ", torch 9.1.0" in said[0]
    )
    assert "not tested" not in done.stdout
    silent = run(
        later | {tested.SILENCE: "1"}, "-m", "quantize", command, "/no/such/model", "/nor/this"
    )
    assert silent.returncode == done.returncode
    assert "not tested" not in silent.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["verify", "--help"], ["--version"], ["recipe", "ls"]]
)
def test_help_and_recipes_say_nothing(later: dict[str, str], arguments: list[str]):
    done = run(later, "-m", "quantize", *arguments)
    assert done.returncode == 0
    assert "not tested" not in done.stderr


def test_a_python_program_is_warned_when_pq_registers_with_transformers(later: dict[str, str]):
    program = "import quantize\nfrom transformers import AutoModelForCausalLM, LlamaModel\n"
    done = run(later, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: pq: not tested with") == 1
    assert "torch 9.1.0" in done.stderr
    convert = run(later, "-c", "from quantize.conversion.loop import convert")
    assert convert.stderr.count("UserWarning: pq: not tested with") == 1


def test_looking_imports_no_library():
    program = (
        "import sys\nfrom quantize.tested import version_notice\nversion_notice()\n"
        "print({'torch', 'transformers', 'packaging'} & set(sys.modules))"
    )
    done = run(dict(os.environ), "-c", program)
    assert done.stdout.strip() == "set()", done.stderr
