"""`pq gate init`: what it writes is what the gate then passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gates import Maker, evaluation

from quantize.errors import DataError
from quantize.gate.entries import Settings
from quantize.gate.file import load_gate, parse_gate
from quantize.gate.write import Candidate, gate_text

Pq = Callable[..., tuple[int, str, str]]


def candidate(name: str, **changes: Any) -> Candidate:
    figures = vars(
        evaluation(
            windows=4,
            data_sha256="ab" * 32,
            dtype="float32",
            kld_stderr=0.00071234,
            delta_nll_stderr=0.002,
            top1_stderr=0.003,
            **{key: value for key, value in changes.items() if key not in ("folder", "recipe")},
        )
    )
    return Candidate(name, figures, changes.get("folder"), changes.get("recipe"))


def test_the_text_says_what_was_measured_in_standard_errors(tmp_path: Path):
    found = [
        candidate("w4", folder="out/w4", kld_mean=0.0212345),
        candidate("rtn", recipe="rtn"),
        candidate("gptq", recipe="gptq"),
    ]
    settings = Settings(dataset="held out: #1.txt", seqlen=2048, max_windows=4, chat_template=False)
    text = gate_text(found, "../parent model", settings, 2.5, "pq gate init out/w4")
    gate = parse_gate(text.encode(), tmp_path / "gate.yaml")
    assert gate.evaluation == settings
    assert gate.model == tmp_path / "../parent model"
    w4, rtn, _ = gate.entries
    assert (w4.checkpoint, w4.recipe, rtn.checkpoint) == ("out/w4", None, None)
    checks = {check.metric: check for check in w4.checks}
    assert (checks["kld_mean"].tolerance, checks["kld_mean"].unit) == (2.5, "se")
    assert checks["kld_mean"].stderr == 0.00071
    assert abs(checks["kld_mean"].expected - 0.0212345) <= 0.0000072
    assert checks["bits_per_weight"].margin == 0
    assert {"kld_mean", "delta_nll", "top1_agreement", "bits_per_weight"} == set(checks)
    assert "# KL(parent || model), nats per token; less is better; passes <= 0.02301" in text
    assert "more is better; passes >= 0.8925" in text
    assert "pq gate init out/w4" in text


@pytest.mark.parametrize("name", ["4bit", "true", "a: b", "a #b", "null", "1e3", "x{y}", "é"])
def test_any_name_can_be_read_back(tmp_path: Path, name: str):
    text = gate_text([candidate(name, folder=name + "/w4")], name, Settings(dataset=name), 3)
    gate = parse_gate(text.encode(), tmp_path / "gate.yaml")
    assert [entry.name for entry in gate.entries] == [name]
    assert (gate.entries[0].checkpoint, gate.evaluation.dataset) == (name + "/w4", name)


def test_one_window_has_no_standard_error():
    figures = {**candidate("w4").figures, "kld_stderr": None, "windows": 1}
    with pytest.raises(DataError, match="w4: kld_mean has no standard error on 1 window"):
        gate_text([Candidate("w4", figures, "w4")], "p", Settings())


def test_from_nothing_to_a_gate_that_passes_and_fails(
    pq: Pq,
    converted: Maker,
    tiny: Maker,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    theirs = shutil.copytree(converted("rtn", "llama"), tmp_path / "out" / "theirs")
    (theirs / "pq.json").unlink()
    shutil.copy(text_file, tmp_path / "text.txt")
    how = ["--baseline", tiny("llama"), "--dataset", "text.txt", "--seqlen", 32, "--max-windows", 4]
    code, out, err = pq("gate", "init", "out/theirs", converted("gptq", "llama"), *how)
    assert code == 0, err
    assert "gate.yaml written" in out
    gate = load_gate(tmp_path / "gate.yaml")
    assert gate.entries[0].checkpoint == "out/theirs"
    assert gate.document.data["evaluation"]["dataset"] == "text.txt"

    code, out, err = pq(
        "gate", "run", "gate.yaml", "--junit", "g.xml", "--summary-file", "s.md", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["ok"], found["failed"], found["parent_runs"]) == (True, 0, "2 kept, 0 new")
    assert len(found["checks"]) == 8
    assert (tmp_path / "g.xml").read_text().count("<testcase") == 8
    assert (tmp_path / "s.md").read_text().startswith("### pq gate: 8 checks passed")

    code, _, err = pq("gate", "init", "out/theirs", *how)
    assert code == 2
    assert "gate.yaml exists; give another --output, or --overwrite" in err
    # a worse checkpoint takes the place of the one that was measured
    shutil.rmtree(theirs)
    shutil.copytree(converted("rtn", "llama", "bits=3"), theirs)
    code, out, err = pq("eval", "--gate", "gate.yaml", "--only", "theirs", "--summary-file", "s.md")
    assert code == 9
    assert "theirs.kld_mean must be <= " in err
    assert "**FAIL**" in (tmp_path / "s.md").read_text()


def test_recipes_are_converted_and_measured(pq: Pq, tiny: Maker, text_file: Path, tmp_path: Path):
    how = ["--dataset", text_file, "--seqlen", 32, "--max-windows", 3, "--numerics", "stock"]
    path = tmp_path / "g.yaml"
    code, out, err = pq(
        "gate", "init", "rtn", "--baseline", tiny("llama"), "-o", path, *how, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["entries"]["rtn"]["bits_per_weight"] == 4.125
    (entry,) = load_gate(path).entries
    assert entry.checkpoint is None
    assert load_gate(path).evaluation.numerics == "stock"
    assert "Each is converted anew" in path.read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "'nowhere': no such folder and no recipe; give checkpoint folders"),
        (["fierq"], "did you mean 'fireq'?"),
        (["rtn", "rtn"], "rtn is given twice"),
        (["rtn", "-o", "no/folder/g.yaml"], "no/folder: no such folder"),
        (["rtn", "--dtype", "int8"], "--dtype int8"),
    ],
)
def test_bad_arguments_are_one_line(
    pq: Pq, tiny: Maker, tmp_path: Path, args: list[str], says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = pq("gate", "init", *args, "--baseline", tiny("llama"))
    assert code in (2, 6)
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_cache_is_shown_and_cleared(pq: Pq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PQ_CACHE", str(tmp_path))
    (tmp_path / "parents").mkdir()
    (tmp_path / "parents" / "x.safetensors").write_bytes(b"x" * 3_000_000)
    assert "1 run of parents, 3.0 MB of at most 17.2 GB" in pq("gate", "cache")[1]
    assert json.loads(pq("gate", "cache", "--json")[1])["bytes"] == 3_000_000
    assert "1 run of parents removed, 3.0 MB" in pq("gate", "cache", "--clear")[1]
    assert "0 runs" in pq("gate", "cache")[1]


def test_options_that_the_file_decides_are_refused(pq: Pq, tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text("recipes: {rtn: {kld_mean: {value: 1, tolerance: 0}}}\n")
    for args, says in (
        (["--dataset", "x.txt"], "write dataset: x.txt under"),
        (["--no-chat-template"], "write chat_template: false under"),
        (["--dtype", "bfloat16"], "write dtype: bfloat16 under"),
    ):
        code, _, err = pq("eval", "--gate", path, *args)
        assert code == 2
        assert says in err
