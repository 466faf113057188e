"""`eval/gpu_session.py`: steps in order, each within its limit, and results that survive whatever happens."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "gpu_session.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "eval")
    module = importlib.import_module("gpu_session")
    monkeypatch.setattr(module, "GRACE", 0.3)
    return module


def shell(
    script: ModuleType, name: str, text: str, limit: float = 60, kind: str = "correctness"
) -> Any:
    return script.Step(name, ("sh", "-c", text), limit, kind)


def facts(folder: Path) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads((folder / "session.json").read_text())["steps"]
    return steps


def gone(pid: int) -> bool:
    """Whether a process has ended, waiting a little for that; zombies have."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_steps_run_in_order_and_leave_logs(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    journal = tmp_path / "journal"
    steps = [shell(script, name, f"echo {name} >> {journal}; echo says {name}") for name in "abc"]
    assert script.Session(tmp_path / "out", 60).run(steps)
    assert journal.read_text() == "a\nb\nc\n"
    assert [step["status"] for step in facts(tmp_path / "out")] == ["ok"] * 3
    assert (tmp_path / "out" / "02-b.log").read_text() == "says b\n"
    assert facts(tmp_path / "out")[1]["tail"] == "says b\n"
    assert not list((tmp_path / "out").glob("*.part"))
    assert [row.split()[:2] for row in capfd.readouterr().out.splitlines()] == [
        [n, "ok"] for n in "abc"
    ]


def test_the_limit_ends_a_step_with_all_that_it_started(script: ModuleType, tmp_path: Path):
    pids = tmp_path / "pids"
    # A grandchild in the background, and a shell that does not listen to a polite request.
    endless = f"trap '' TERM; sleep 600 & echo $! > {pids}; echo $$ >> {pids}; echo begun; wait; sleep 600"
    steps = [shell(script, "endless", endless, limit=1.5), shell(script, "next", "echo fine")]
    started = time.monotonic()
    assert not script.Session(tmp_path / "out", 300).run(steps)
    assert time.monotonic() - started < 60
    first, second = facts(tmp_path / "out")
    assert (first["status"], second["status"]) == ("timed out", "ok")
    assert "begun" in first["tail"]
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_what_a_good_step_leaves_running_is_ended(script: ModuleType, tmp_path: Path):
    pid = tmp_path / "pid"
    step = shell(script, "forks", f"sleep 600 >/dev/null 2>&1 & echo $! > {pid}")
    assert script.Session(tmp_path / "out", 60).run([step])
    assert gone(int(pid.read_text()))


@pytest.mark.parametrize(
    ("text", "limit", "kind", "speed"),
    [
        ("exit 3", 60, "correctness", "skipped"),
        ("sleep 60", 0.3, "correctness", "ok"),
        ("exit 3", 60, "preparation", "ok"),
        ("true", 60, "correctness", "ok"),
    ],
)
def test_speed_is_skipped_where_correctness_failed(
    script: ModuleType, tmp_path: Path, text: str, limit: float, kind: str, speed: str
):
    steps = [
        shell(script, "first", text, limit, kind),
        shell(script, "other", "true"),
        shell(script, "fast", "true", kind="speed"),
    ]
    script.Session(tmp_path / "out", 300).run(steps)
    found = facts(tmp_path / "out")
    assert found[1]["status"] == "ok"
    assert found[2]["status"] == speed
    if speed == "skipped":
        assert found[2]["reason"] == "first failed"
        assert found[0]["reason"] == "exit code 3"


def test_a_command_that_is_not_there_fails_its_step_alone(script: ModuleType, tmp_path: Path):
    steps = [script.Step("absent", ("/no/such/command",), 5), shell(script, "next", "true")]
    assert not script.Session(tmp_path / "out", 60).run(steps)
    assert [step["status"] for step in facts(tmp_path / "out")] == ["failed", "ok"]


def test_the_session_has_a_limit_too(script: ModuleType, tmp_path: Path):
    steps = [shell(script, "long", "sleep 60"), shell(script, "late", "true")]
    assert not script.Session(tmp_path / "out", 1.5).run(steps)
    assert [step["status"] for step in facts(tmp_path / "out")] == ["timed out", "skipped"]
    assert "seconds are over" in facts(tmp_path / "out")[1]["reason"]


def holder(output: Path) -> str:
    """A program that holds a session of a quick step and an endless one."""
    steps = "[g.Step('quick', ('true',), 9), g.Step('endless', ('sleep', '600'), 600), g.Step('z', ('true',), 9)]"
    return (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_session as g\n"
        f"from pathlib import Path\nsys.exit(not g.Session(Path({str(output)!r}), 600).run({steps}))"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_session_that_is_cut_short_keeps_what_it_has(tmp_path: Path, number: signal.Signals):
    process = subprocess.Popen([sys.executable, "-c", holder(tmp_path / "out")])
    try:
        while not (tmp_path / "out" / "02-endless.log").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        process.send_signal(number)
        code = process.wait(60)
        statuses = [step["status"] for step in facts(tmp_path / "out")]
        if number == signal.SIGTERM:
            assert code == 1
            assert statuses == ["ok", "stopped", "skipped"]
            assert all(gone(int(pid)) for pid in children)
        else:
            assert statuses == ["ok"]
            for pid in children:  # nobody was left to end them
                os.kill(int(pid), signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def test_the_steps_are_what_they_are_said_to_be(script: ModuleType, tmp_path: Path):
    steps = script.session_steps(tmp_path, tmp_path / "work")
    assert sum(step.limit for step in steps) <= 540
    kinds = [step.kind for step in steps]
    assert (
        kinds == sorted(kinds, key=["correctness", "preparation", "speed"].index)
        or kinds.index("speed") == 3
    )
    assert all(kind == "speed" for kind in kinds[kinds.index("speed") :])
    assert steps[-1].name == "decode-model"
    assert len({step.name for step in steps}) == len(steps)
    tests = script.gpu_tests()
    named = {Path(test).name for test in tests}
    for operator in ("int4", "bitvec", "attention", "experts", "hadamard"):
        assert any(operator in name for name in named), operator


def test_all_tests_for_a_gpu_are_among_them(script: ModuleType):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *script.gpu_tests()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::" in done.stdout


def test_the_commands_of_the_steps_have_these_options(script: ModuleType, tmp_path: Path):
    for step in script.session_steps(tmp_path, tmp_path):
        if step.kind == "speed":
            what = step.command[1:5]
            shown = subprocess.run([sys.executable, *what, "--help"], cwd=ROOT, capture_output=True, text=True,
                                   env={**os.environ, "COLUMNS": "200"})  # fmt: skip
            assert shown.returncode == 0, shown.stderr
            for option in (word for word in step.command[5:] if word.startswith("--")):
                assert option in shown.stdout, option


def test_the_recipes_write_every_layout(script: ModuleType):
    from quantize.recipe.recipe import load_recipe

    recipes = {name: load_recipe(name) for name in script.RECIPES}
    methods = {stage.method for recipe in recipes.values() for stage in recipe.stages}
    assert {recipe.format for recipe in recipes.values()} >= {"pq", "compressed-tensors"}
    assert {"sbvr", "fireq-attention", "ladimo"} <= methods


@pytest.mark.slow
def test_checkpoints_are_made_and_their_kernels_verified(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(script, "RECIPES", ("rtn", "no-such-recipe"))
    assert not script.convert_all(tmp_path, "cpu")
    assert script.verify_all(tmp_path, "cpu")
    out = capfd.readouterr().out
    assert "rtn: ok\nno-such-recipe: exit code 3" in out
    assert "no-such-recipe: not verified, for it was not converted" in out
    weights = next((tmp_path / "rtn").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert not script.verify_all(tmp_path, "cpu")
    assert not script.verify_all(tmp_path / "empty", "cpu")


def test_list_runs_nothing(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--list", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("01 kernel-tests (correctness, 120 s): ")
    assert len(lines) == 8
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_stops(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert (
        done.stderr
        == "gpu-session: there is no GPU that torch can use on this machine; nothing was run\n"
    )
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "NEEDED", ("json", "no_such_package", "nor_this"))
    assert "lacks no_such_package, nor_this" in script.obstacle()


def test_an_existing_interpreter_needs_no_environment():
    def dry(*arguments: str) -> str:
        command = ["make", "--dry-run", "--always-make", "gpu-session", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    given = dry("PYTHON=python3", "OUT=found")
    assert "pip install" not in given
    assert "python3 eval/gpu_session.py" in given
    assert "--output found" in given
    own = dry()
    assert "pip install" in own
    assert ".venv/bin/python eval/gpu_session.py" in own
    assert "--output out/gpu" in own
