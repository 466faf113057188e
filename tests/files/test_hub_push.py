"""`pq push`: what goes to the Hub and what does not, and what is said where it cannot go."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from hub_server import Hub, point_to, serve_hub
from huggingface_hub import constants

from quantize.files import strict_yaml
from quantize.files.provenance import read_provenance

NAME = "org/some-model"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as server:
        point_to(server, tmp_path / "cache", monkeypatch)
        server.writers["org"] = "hf_writes"
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield server


@pytest.fixture
def output(converted: ModelMaker, tmp_path: Path) -> Path:
    """An output with all that lies in and beside one, and what people leave there."""
    folder = Path(shutil.copytree(converted("rtn", "llama"), tmp_path / "out"))
    (folder / ".cache").mkdir()
    (folder / ".cache/scratch").write_text("x")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "out.log").write_text("x")
    (tmp_path / "out.work").mkdir()
    return folder


def weights_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def head_of(hub: Hub, name: str = NAME) -> Path:
    found = hub.repositories[name]
    return found.commits[found.names["main"]]


def test_exactly_what_was_written_goes(pq: Call, hub: Hub, output: Path):
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    code, out, err = pq("push", output, NAME, "--private")
    assert (code, err.count("\n")) == (0, err.count("\n"))
    record = read_provenance(output)
    assert record is not None
    there = {path.name: path for path in head_of(hub).iterdir()}
    assert set(there) == {*record["files"], "pq.json", ".gitattributes"}
    for name in set(record["files"]) - {"README.md"}:
        assert there[name].read_bytes() == (output / name).read_bytes()
        assert name in out
    assert hub.repositories[NAME].private
    large = [name for name in there if there[name].read_bytes() in hub.objects.values()]
    assert sorted(large) == weights_of(output)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert f"{hub.address}/{NAME}: " in err
    assert "private" in err


def test_what_is_fetched_is_verified(pq: Call, hub: Hub, output: Path):
    assert pq("push", output, NAME)[0] == 0
    (head_of(hub) / ".gitattributes").unlink()
    code, out, err = pq("verify", head_of(hub))
    assert (code, "FAIL" in out + err) == (0, False)


def test_the_card_is_told_its_name_and_what_was_measured(pq: Call, hub: Hub, output: Path):
    beside = output.with_name("out.eval")
    beside.mkdir()
    figures: dict[str, Any] = {
        "kind": "perplexity",
        "data": "wiki | text",
        "protocol": "strided-512",
        "numerics": "kernel",
        "tokens": 4096,
        "kld_mean": 0.0123,
        "kld_stderr": 0.001,
        "top1_agreement": 0.93,
        "perplexity": 12.5,
        "baseline_perplexity": 12.25,
    }
    (beside / "a.json").write_text(json.dumps(figures))
    (beside / "old.json").write_text(json.dumps(figures | {"tokens": 77}))
    os.utime(beside / "old.json", (1, 1))
    soon = time.time() + 60
    os.utime(beside / "a.json", (soon, soon))
    code, _, err = pq("push", output, NAME)
    assert code == 0
    assert "1 evaluations beside it are older than the output and left out" in err
    card = (head_of(hub) / "README.md").read_text(encoding="utf-8")
    assert (
        r"| wiki \| text, strided-512, kernel numerics | 4,096 | 0.0123 ± 0.001 | 93.0 % | 12.5 | 12.25 |"
        in card
    )
    assert " 77 |" not in card
    assert f"vllm serve {NAME} --max-model-len 256" in card
    assert f"pq verify {NAME}" in card
    assert "DIR" not in card.partition("## The parent's card")[0]
    front = strict_yaml.load(card.split("---\n")[1].encode(), "card").data
    assert isinstance(front, dict)
    assert front["library_name"] == "transformers"


def test_a_dry_run_sends_nothing(pq: Call, hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = pq("push", output, NAME, "--dry-run")
    assert code == 0
    assert not hub.asked
    assert weights_of(output)[0] in out
    assert "notes.txt" not in out
    assert "dry run, nothing was sent: " in err
    code, out, _ = pq("push", output, NAME, "--dry-run", "--json")
    record = read_provenance(output)
    assert record is not None
    assert set(json.loads(out)["files"]) == {*record["files"], "pq.json"}


def test_an_update_replaces_weights_and_leaves_others(pq: Call, hub: Hub, output: Path):
    first = hub.root / NAME / "0"
    first.mkdir(parents=True)
    for name in ("model-00001-of-00099.safetensors", "old.safetensors.index.json", "photo.png"):
        (first / name).write_text("old")
    hub.put(NAME, first)
    code, _, err = pq("push", output, NAME)
    assert code == 6
    assert "exists and holds 3 files (model-00001-of-00099.safetensors, …)" in err
    assert len(hub.repositories[NAME].commits) == 1
    code, _, err = pq("push", output, NAME, "--update")
    assert code == 0
    assert (head_of(hub) / "photo.png").exists()
    assert weights_of(head_of(hub)) == weights_of(output)
    assert not (head_of(hub) / "old.safetensors.index.json").exists()
    assert err.count("removed of an earlier upload: ") == 2


def test_one_that_broke_off_goes_on(pq: Call, hub: Hub, output: Path):
    empty = hub.root / NAME / "0"
    empty.mkdir(parents=True)
    (empty / ".gitattributes").write_text("")
    hub.put(NAME, empty)
    assert pq("push", output, NAME)[0] == 0


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("pq: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_refusals_of_the_hub(pq: Call, hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch):
    code, _, err = pq("push", output, "another/model")
    assert code == 6
    assert "the token may not write there, or you are no member of another" in one_line(err)
    hub.token = "hf_other"
    assert "does not accept the token" in one_line(pq("push", output, NAME)[2])
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token; log in with `hf auth login`" in one_line(pq("push", output, NAME)[2])
    assert NAME not in hub.repositories


def test_no_network(pq: Call, hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    code, _, err = pq("push", output, NAME)
    assert code == 6
    assert "cannot be reached from here" in one_line(err)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids the network" in one_line(pq("push", output, NAME)[2])


def test_refusals_before_the_network(pq: Call, hub: Hub, output: Path, tmp_path: Path):
    for name in ("no-owner", "a/b/c", "org/with space", ""):
        code, _, err = pq("push", output, name)
        assert (code, "write org/name" in one_line(err)) == (2, True)
    code, _, err = pq("push", tmp_path / "absent", NAME)
    assert (code, "no such folder" in one_line(err)) == (4, True)
    code, _, err = pq("push", tmp_path, NAME)
    assert (code, "pq did not write it" in one_line(err)) == (4, True)
    weights = output / weights_of(output)[-1]
    with weights.open("ab") as file:
        file.write(b"x")
    code, _, err = pq("push", output, NAME)
    told = f"{weights.name}: is not the file that was written"
    assert (code, told in one_line(err)) == (7, True)
    weights.unlink()
    assert "is missing" in one_line(pq("push", output, NAME)[2])
    assert not hub.asked


def test_an_edited_card_goes_as_it_is(pq: Call, hub: Hub, output: Path):
    (output / "README.md").write_text("---\ntags:\n- mine\n---\n\n# My own\n", encoding="utf-8")
    assert pq("push", output, NAME)[0] == 0
    assert (head_of(hub) / "README.md").read_text(encoding="utf-8").endswith("# My own\n")
    (output / "README.md").write_text("no front matter\n", encoding="utf-8")
    err = pq("push", output, "org/second")[2]
    assert "refuses the card" in one_line(err)


def test_a_process_of_its_own(hub: Hub, output: Path, tmp_path: Path):
    """Where nothing has loaded the Hub's library before."""
    told = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "quantize", "push", str(output), NAME, "--dry-run"]
    done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model" in done.stdout + done.stderr
    assert NAME not in hub.repositories
