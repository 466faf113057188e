"""A data set of chats as a user gives it: convert, estimate, eval and compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SENTENCES, with_added_bos

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]
RENDERED = "chats.jsonl: chats (messages), rendered with the model's chat template"
PLAINLY = "chats.jsonl: chats (messages), written as 'role: content'"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


@pytest.fixture
def model(tiny: Maker, tmp_path: Path) -> Path:
    folder = with_added_bos(tiny("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    asked, answer = " ".join(SENTENCES), " ".join(reversed(SENTENCES))
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": said}) + "\n") * 9)
    return path


@pytest.fixture
def command(model: Path, chats: Path, tmp_path: Path) -> list[object]:
    """A small conversion into tmp_path / "out"."""
    what = ["--model", model, "--output", tmp_path / "out", "--recipe", "gptq", "--device", "cpu"]
    return ["convert", *what, "--dataset", chats, "--nsamples", 4, "--seqlen", 32]


def calibration(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pq.json").read_text())["calibration"]
    return found


def test_a_conversion_renders_chats_and_says_so(pq: Call, command: list[object], tmp_path: Path):
    code, _, err = pq(*command)
    assert code == 0, err
    assert err.count(RENDERED) == (tmp_path / "out.log").read_text().count(RENDERED) == 1
    told = calibration(tmp_path / "out")
    assert (told["chat_template"], told["text_field"]) == (True, "messages")
    sha256 = hashlib.sha256(json.dumps(TEMPLATE).encode()).hexdigest()
    assert told["chat_template_sha256"] == sha256
    assert told["rows"] == 9
    page = (tmp_path / "out.report.html").read_text()
    assert sha256 in page
    command[command.index(tmp_path / "out")] = tmp_path / "plain"
    code, _, err = pq(*command, "--no-chat-template")
    assert code == 0, err
    assert err.count(PLAINLY) == 1
    plain = calibration(tmp_path / "plain")
    assert plain["chat_template"] is False
    assert plain["sha256"] != told["sha256"]
    assert plain["text_sha256"] == told["text_sha256"]


def test_another_template_starts_anew(
    pq: Call, command: list[object], model: Path, monkeypatch: pytest.MonkeyPatch
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
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("|>", "|>:"))
    code, _, err = pq(*command, "--resume", "required")
    assert code == 2
    assert "calibration.chat_template_sha256 is" in err


def test_all_commands_read_the_same(pq: Call, model: Path, chats: Path, tmp_path: Path):
    estimate = ["estimate", "-m", model, "-r", "gptq", "--no-time", "--nsamples", 2]
    measure = ["eval", model, "--max-windows", 2, "--json"]
    compare = ["compare", model, "--baseline", model, "--max-windows", 2, "--json"]
    for arguments in (estimate, measure, compare):
        how = (*arguments, "--dataset", chats, "--seqlen", 24)
        code, out, err = pq(*how)
        assert code == 0, err
        # a limit, or several models: the text is read more than once
        assert err.count(RENDERED) == 1
        code, plain, err = pq(*how, "--no-chat-template", "--text-field", "messages")
        assert code == 0, err
        assert (err.count(RENDERED), err.count(PLAINLY)) == (0, 1)
        if "--json" in arguments:
            figures, others = json.loads(out), json.loads(plain)
            if arguments is compare:
                (figures,), (others,) = figures, others
            assert figures["data"] == "chats.jsonl (chat template)"
            assert others["data"] == "chats.jsonl (chats without template)"
            assert figures["data_sha256"] != others["data_sha256"]
        code, _, err = pq(*how, "--text-field", "message")
        assert code == 5
        assert "has no field 'message'; choose a text field among: messages" in err
    (model / "chat_template.jinja").unlink()
    for arguments in (estimate, measure):
        how = (*arguments, "--dataset", chats, "--seqlen", 24)
        code, _, err = pq(*how)
        assert code == 0, err
        assert err.count(PLAINLY) == err.count("put its chat_template.jinja beside it") == 1
        code, _, err = pq(*how, "--chat-template")
        assert code == 5
        assert "no chat template; turn chat_template off" in err


def test_results_of_both_ways_stand_side_by_side(
    pq: Call, model: Path, chats: Path, tmp_path: Path
):
    how = ("eval", model, "--dataset", chats, "--seqlen", 24, "--max-windows", 1)
    for choice in ("--chat-template", "--no-chat-template"):
        code, _, err = pq(*how, choice, "--output-path", tmp_path / "results")
        assert code == 0, err
    name = "strided-24-bos-chats.jsonl"
    assert {path.name for path in (tmp_path / "results").glob("*.json")} == {
        f"{name}-chat-template-kernel.json",
        f"{name}-chats-without-template-kernel.json",
    }


def test_text_is_read_as_ever(pq: Call, model: Path, text_file: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in SENTENCES * 9))
    for dataset in (text_file, rows):
        how = ("eval", model, "--dataset", dataset, "--seqlen", 24, "--max-windows", 2, "--json")
        code, out, err = pq(*how)
        assert (code, err) == (0, "")
        assert json.loads(out)["data"] == dataset.name
