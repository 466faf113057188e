"""Commands on Hub ids, against a small Hub: what is named in tables and JSON, exit codes, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ModelMaker
from hostile import Call
from hub_server import Hub, point_to, serve_hub

NAME = "org/tiny-llama"
CPU = ("--device", "cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as server:
        point_to(server, tmp_path / "cache", monkeypatch)
        yield server


def test_convert_eval_verify_inspect_report(
    pq: Call, hub: Hub, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    commit = hub.put(NAME, tiny("llama"), "v1")
    newer = hub.put(NAME, tiny("llama", rms_norm_eps=1e-3))
    short, out = f"{NAME}@{commit[:7]}", tmp_path / "out"
    text = ("--dataset", text_file, "--seqlen", "32", *CPU)

    code, _, err = pq("convert", "-m", NAME, "--revision", "v1", "-r", "rtn", "-o", out, *CPU)
    assert code == 0, err
    assert f"pq: {short}: fetches " in err
    assert json.loads((out / "pq.json").read_text())["origin"] == {"id": NAME, "commit": commit}

    code, shown, err = pq("eval", out, "--baseline", f"{NAME}@v1", "--max-windows", 2, *text)
    assert code == 0, err
    assert f"parent {short}" in shown
    (saved,) = (tmp_path / "out.eval").glob("*.json")
    figures = json.loads(saved.read_text())
    assert (figures["model"], figures["baseline"]) == ("out", short)
    assert (figures["model_commit"], figures["baseline_commit"]) == (None, commit)

    code, shown, err = pq("eval", NAME, "--revision", "v1", "--max-windows", 1, *text, "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert (found["model"], found["model_commit"]) == (short, commit)

    code, shown, err = pq("inspect", NAME, "--revision", commit)
    assert (code, shown.splitlines()[0].startswith(f"{short}: ")) == (0, True), err
    code, shown, _ = pq("inspect", out, "--json")
    assert json.loads(shown)["made"]["origin"] == {"id": NAME, "commit": commit}
    assert commit in pq("inspect", out)[1]

    assert pq("verify", out, "--parent", f"{NAME}@v1")[0] == 0
    code, _, err = pq("verify", out, "--parent", NAME)
    assert code == 7
    assert f"differ from those of {NAME}@{newer[:7]}: " in err
    assert f"it was made from {NAME}@{commit}" in err

    assert pq("report", out)[0] == 0
    page = (tmp_path / "out.report.html").read_text()
    assert f"parent {short}" in page
    assert f"commit {commit} of {NAME}" in page

    code, shown, err = pq(
        "estimate", "-m", NAME, "-r", "rtn", "--revision", "v1", "--no-time", *CPU
    )
    assert code == 0, err
    assert f"rtn on {short}" in shown


def test_results_never_go_into_the_cache(
    pq: Call, hub: Hub, converted: ModelMaker, text_file: Path, tmp_path: Path
):
    hub.put(NAME, converted("rtn", "llama"))
    text = ("--dataset", text_file, "--seqlen", "32", "--max-windows", "1", *CPU)
    assert pq("eval", NAME, *text)[0] == 0
    assert not list((tmp_path / "cache").rglob("*.eval"))
    assert pq("eval", NAME, *text, "--output-path", tmp_path / "results")[0] == 0
    assert list((tmp_path / "results").glob("*.json"))


@pytest.mark.parametrize("command", ["convert", "estimate", "eval", "inspect", "verify", "compare"])
def test_what_cannot_be_had_is_one_line_and_code_4(
    pq: Call, hub: Hub, tiny: ModelMaker, tmp_path: Path, command: str
):
    hub.put(NAME, tiny("llama"), gated=401)
    out = tmp_path / "below/out"
    out.parent.mkdir()
    arguments = {
        "convert": ["-m", NAME, "-r", "rtn", "-o", out, *CPU],
        "estimate": ["-m", NAME, "-r", "rtn", *CPU],
        "compare": [tiny("llama"), "--baseline", NAME, *CPU],
        "verify": [tiny("llama"), "--parent", NAME],
    }
    code, shown, err = pq(command, *arguments.get(command, [NAME]))
    assert (code, shown) == (4, "")
    errors = [line for line in err.splitlines() if "fetches" not in line]
    assert len(errors) == 1, err
    assert errors[0].startswith(f"pq: error: {NAME}: is gated; accept its terms at {hub.address}")
    assert list(out.parent.iterdir()) == []


def test_a_stopped_run_goes_on_from_another_cache(
    pq: Call, hub: Hub, tiny: ModelMaker, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    from quantize.conversion import loop

    commit = hub.put(NAME, tiny("llama"))
    out = tmp_path / "out"
    text = ("--dataset", text_file, "--nsamples", 4, "--seqlen", 32, *CPU)
    args = ("convert", "-m", NAME, "-r", "gptq", "-o", out, *text)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_finish", lambda *parts: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pq(*args)[0] == 130
    assert (tmp_path / "out.work").exists()
    point_to(hub, tmp_path / "another", monkeypatch)
    code, _, err = pq(*args, "--resume", "required")
    assert code == 0, err
    assert "goes on after block 2" in err
    assert json.loads((out / "pq.json").read_text())["origin"]["commit"] == commit


def test_with_the_environment_of_a_user(hub: Hub, tiny: ModelMaker, tmp_path: Path):
    """Once as a user has it: HF_ENDPOINT and HF_HOME, in a process of its own."""
    commit = hub.put(NAME, tiny("llama"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment = kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    code = "from quantize.cli import run; run()"
    command = [sys.executable, "-c", code, "inspect", NAME]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=environment | more,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=100,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}@{commit[:7]}: LlamaForCausalLM")
    assert done.stderr.count("\n") == 1
    asked = len(hub.asked)
    assert run(HF_HUB_OFFLINE="1").stdout == done.stdout
    assert len(hub.asked) == asked
