"""`--bos` as a user types it: convert, estimate, eval, compare and the gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import with_added_bos
from gates import write_gate

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]
WITHOUT = "this model's tokenizer begins texts with BOS"
LONGER = "longer than the model's context of 256"


@pytest.fixture
def model(tiny: Maker, tmp_path: Path) -> Path:
    return with_added_bos(tiny("llama"), tmp_path / "model")


@pytest.fixture
def command(model: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """A small conversion into tmp_path / "out"."""
    what = ["--model", model, "--output", tmp_path / "out", "--recipe", "gptq", "--device", "cpu"]
    return ["convert", *what, "--dataset", text_file, "--nsamples", 6, "--seqlen", 32]


@pytest.mark.parametrize("choice", ["auto", "always", "never"])
def test_a_conversion_says_what_it_did(
    pq: Call, command: list[object], tmp_path: Path, choice: str
):
    code, out, err = pq(*command, "--bos", choice, "--json")
    assert code == 0, err
    begins, token = choice != "never", None if choice == "never" else 0
    summary = json.loads(out)
    assert (summary["bos"], summary["bos_token_id"]) == (begins, token)
    calibration = json.loads((tmp_path / "out" / "pq.json").read_text())["calibration"]
    assert (calibration["bos"], calibration["bos_token_id"]) == (begins, token)
    page = (tmp_path / "out.report.html").read_text()
    assert f"<td>bos</td><td>{begins}</td>" in page.replace("\n", "").replace(' class="num"', "")
    log = (tmp_path / "out.log").read_text()
    for text in (err, log):
        assert text.count(WITHOUT) == (choice == "never")
        assert LONGER not in text


def test_a_conversion_tells_people(pq: Call, command: list[object]):
    assert "windows began with BOS (token 0)" in pq(*command)[2]


def test_a_recipe_without_text_has_no_choice(pq: Call, command: list[object]):
    command[command.index("gptq")] = "rtn"
    summary = json.loads(pq(*command, "--json", "--bos", "never")[1])
    assert summary["bos"] is summary["bos_token_id"] is None


def test_another_choice_starts_anew(
    pq: Call, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from quantize.conversion import loop

    real = loop.Conversion.block

    def block(self: Any, index: int, streams: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return real(self, index, streams)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Conversion, "block", block)
        assert pq(*command)[0] == 130
    code, _, err = pq(*command, "--bos", "never", "--resume", "required")
    assert code == 2
    assert 'recipe.calibration.bos is "never", the state is of "auto"' in err
    # The choice is the same, what it comes to is not: the tokenizer has been changed.
    settings = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(settings))
    code, _, err = pq(*command)
    assert code == 0
    assert "calibration.bos is false, the state is of true; starts anew" in err


@pytest.mark.parametrize("name", ["convert", "estimate"])
def test_windows_that_do_not_suit_the_model_are_named_once(
    pq: Call, command: list[object], name: str, caplog: pytest.LogCaptureFixture
):
    command = command[1:]
    if name == "estimate":
        at = command.index("--output")
        command = [*command[:at], *command[at + 2 :], "--no-time"]
    command[command.index("--nsamples") + 1] = 1
    command[command.index("--seqlen") + 1] = 300
    # a limit, so that the text is read twice
    code, _, err = pq(name, *command, "--bos", "never", "--max-ram", "900GB")
    assert code == 0, err
    assert err.count(WITHOUT) == err.count(LONGER) == 1
    # nor is there one that nobody shows
    assert sum(WITHOUT in line or LONGER in line for line in caplog.messages) == 2
    for line in err.splitlines():
        assert line.startswith("pq: ") or not (WITHOUT in line or LONGER in line)


def test_choices_that_do_not_exist(pq: Call, command: list[object], model: Path, text_file: Path):
    estimate = ["estimate", "-m", model, "-r", "gptq", "--no-time"]
    measure = ["eval", model, "--dataset", text_file]
    compare = ["compare", model, "--baseline", model, "--dataset", text_file]
    for arguments in (command, estimate, measure, compare):
        code, out, err = pq(*arguments, "--bos", "perhaps")
        assert (code, out) == (2, "")
        assert "bos" in err
        assert err.count("pq: error:") == 1


def test_an_evaluation(pq: Call, model: Path, tiny: Maker, text_file: Path):
    args = ("--dataset", text_file, "--seqlen", 24, "--max-windows", 3)
    code, out, err = pq("eval", model, "--baseline", model, *args, "--json")
    figures = json.loads(out)
    assert (code, err) == (0, "")
    assert (figures["protocol"], figures["bos_token_id"]) == ("strided-24-bos", 0)
    assert figures["tokens"] == 3 * 23
    never = pq("eval", model, *args, "--bos", "never")
    assert "strided-24 on" in never[1]
    assert never[2].count(WITHOUT) == 1
    always = json.loads(pq("eval", tiny("llama"), *args, "--bos", "always", "--json")[1])
    assert always["perplexity"] == figures["perplexity"]
    compared = json.loads(
        pq("compare", model, "--baseline", model, *args, "--bos", "never", "--json")[1]
    )
    assert compared[0]["protocol"] == "strided-24"
    code, _, err = pq("eval", model, "--dataset", text_file, "--seqlen", 260, "--max-windows", 1)
    assert (code, err.count(LONGER)) == (0, 1)


def test_tasks_follow_the_choice(pq: Call, model: Path, text_file: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    (tmp_path / "last.jsonl").write_text('{"text": "The quick brown fox jumps"}\n')
    args = ("eval", model, "--baseline", model, "--tasks", f"lambada:{tmp_path / 'last.jsonl'}")
    seen = {}
    for choice in ("auto", "always", "never"):
        code, out, err = pq(*args, "--bos", choice, "--json")
        assert code == 0, err
        seen[choice] = json.loads(out)["tasks"]
        assert err.count(WITHOUT) == (choice == "never")  # once, of model and parent
    assert seen["auto"] == seen["always"]
    assert (seen["auto"]["bos_token_id"], seen["never"]["bos_token_id"]) == (0, None)
    assert seen["auto"]["tasks"] != seen["never"]["tasks"]
    code, _, err = pq(*args, "--bos", "never", "--model-args", "add_bos_token=true")
    assert code == 2
    assert "give one of them" in err


def test_the_gate(pq: Call, model: Path, text_file: Path, tmp_path: Path):
    settings = f"dataset: {json.dumps(str(text_file))}, seqlen: 24, max_windows: 2"
    entry = "rtn:\n  kld_mean: {value: 9, tolerance: 99%}\n  bits_per_weight: {value: 4.125, tolerance: 0}"
    path = write_gate(tmp_path / "gate.yaml", model, entry, f"evaluation: {{{settings}}}")
    code, out, err = pq("eval", "--gate", path)
    assert (code, out, err.count("pq: error:")) == (3, "", 1)
    assert "measured as strided-24 (the entry names no protocol" in err
    assert "this run measures strided-24-bos" in err
    code, _, err = pq("eval", "--gate", path, "--update-baselines", "--reason", "BOS")
    assert code == 0, err
    assert "rtn.protocol strided-24-bos" in err
    assert "    protocol: strided-24-bos\n" in path.read_text()
    code, out, err = pq("eval", "--gate", path)
    assert code == 0, err
    assert "strided-24-bos on" in out
    code, _, err = pq("eval", "--gate", path, "--bos", "never")
    assert code == 2
    assert "write bos: never under its evaluation" in err
    path.write_text(path.read_text().replace("seqlen: 24,", "seqlen: 24, bos: never,"))
    code, _, err = pq("eval", "--gate", path)
    assert code == 3
    assert "rtn.protocol: the values were measured as strided-24-bos, this run" in err
