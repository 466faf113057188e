"""`eval/smoke_newest.py`: what is newer, and who is to blame for a failure."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
AHEAD = ["transformers 5.24.0 -> 5.30.0"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "eval")
    return importlib.import_module("smoke_newest")


def test_the_lock_files_are_read_for_this_interpreter(script: ModuleType, tmp_path: Path):
    (tmp_path / "base.txt").write_text(
        "# made\nNumPy==2.2.6 ; python_full_version < '3.1' \\\n    --hash=sha256:aa\n    # via torch\n"
        "numpy==2.4.6 ; python_full_version >= '3.1' \\\n    --hash=sha256:bb\n"
        "lm-eval==0.4.13 \\\n    --hash=sha256:cc\n"
    )
    assert script.locked_versions(tmp_path) == {"numpy": "2.4.6", "lm-eval": "0.4.13"}
    shipped = script.locked_versions(ROOT / ".ci" / "locks")
    assert {"torch", "transformers", "pytest", "pip"} <= set(shipped)


def test_what_is_newer_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    installed = {
        "torch": "2.13.0+cpu",
        "transformers": "5.100.0",
        "numpy": "2.4.5",
        "triton": "3.9.0",
    }
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    locked = {"triton": "3.7.1", "torch": "2.13.0", "transformers": "5.24.0", "numpy": "2.4.6"}
    assert script.newer(locked) == ["transformers 5.24.0 -> 5.100.0", "triton 3.7.1 -> 3.9.0"]


def test_an_absent_package_is_not_newer(script: ModuleType):
    assert script.newer({"no-such-package-at-all": "1.0"}) == []


@pytest.mark.parametrize(
    ("ahead", "newest", "locked", "code", "told"),
    [
        ([], True, True, 0, "passed"),
        (AHEAD, True, True, 0, "passed"),
        (AHEAD, False, True, 0, "WARNING: pq works with the locked releases"),
        (AHEAD, False, False, 1, "the fault is pq's"),
        ([], False, True, 1, "the fault is pq's"),
    ],
)
def test_the_verdict(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    ahead: list[str],
    newest: bool,
    locked: bool,
    code: int,
    told: str,
):
    runs: list[Any] = []

    def run(python: Path | str) -> bool:
        runs.append(python)
        return newest if python == sys.executable else locked

    assert script.verdict(ahead, Path("locked-python"), run) == code
    out = capsys.readouterr().out
    assert told in out
    assert ("WARNING" in out) == (code == 0 and not newest)
    assert all(out.count(line) >= 1 for line in ahead)
    assert (Path("locked-python") in runs) == (bool(ahead) and not newest)


def test_a_failure_without_a_locked_environment_is_a_failure(script: ModuleType):
    assert script.verdict(AHEAD, None, lambda python: False) == 1


def test_a_warning_names_the_packages(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    script.verdict(AHEAD, Path("locked-python"), lambda python: python != sys.executable)
    out = capsys.readouterr().out
    assert "!   transformers 5.24.0 -> 5.30.0" in out


def test_a_step_that_fails_ends_the_smoke(script: ModuleType, tmp_path: Path):
    assert not script.smoke("false")
    with pytest.raises(SystemExit, match="pq eval ended with code 4"):
        script.pq("eval", tmp_path / "absent")


def test_an_endless_step_is_a_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    monkeypatch.setattr(script, "LIMIT", 0.2)
    assert not script.smoke(endless)


@pytest.mark.slow
def test_the_steps_pass_here(script: ModuleType):
    command = [sys.executable, str(ROOT / "eval" / "smoke_newest.py"), "--steps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in layers of Int4Layer" in done.stdout
