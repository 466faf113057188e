"""Tokenizers that are absent, of another kind or half there: the cause and the cure."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.errors import DataError
from quantize.model.tokenizer import load_tokenizer

Maker = Callable[..., Path]
CONFIG = "tokenizer_config.json"


@pytest.fixture
def bare(tiny: Maker, tmp_path: Path) -> Path:
    """A model without a tokenizer."""
    folder = Path(shutil.copytree(tiny("mistral"), tmp_path / "model"))
    for name in ("tokenizer.json", CONFIG):
        (folder / name).unlink()
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{folder}: no usable tokenizer: ")
    return text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no tokenizer.json", "put tokenizer.json and tokenizer_config.json"]),
        ({CONFIG: b"{}"}, ["no tokenizer.json"]),
        ({"tekken.json": b"{}"}, ["tekken.json is read by", "pip install mistral-common"]),
        ({"tokenizer.model": b"\x0a\x0e\x0a\x05<unk>"}, ["pip install sentencepiece protobuf"]),
        ({"tokenizer.model": base64.b64encode(b"a") + b" 0\n"}, ["pip install tiktoken"]),
        ({"tokenizer.model.v3": b"\x0a"}, ["copy it to tokenizer.model"]),
        ({"vocab.json": b'{"a": 0}'}, ["vocab.json is there without merges.txt"]),
        ({"tokenizer.json": b"{"}, ["tokenizer.json cannot be read", "fetch it anew"]),
        (
            {"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
            ["tokenizer.json is a Git LFS pointer", "git lfs pull"],
        ),
        (
            {CONFIG: json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}).encode()},
            ["code of its own (auto_map in tokenizer_config.json)"],
        ),
    ],
)
def test_the_cause_and_the_cure(
    bare: Path, files: dict[str, bytes], words: list[str], monkeypatch: pytest.MonkeyPatch
):
    real = importlib.util.find_spec
    absent = ("mistral_common", "sentencepiece", "google.protobuf", "tiktoken")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name in absent else real(name, *more),
    )
    for name, data in files.items():
        (bare / name).write_bytes(data)
    text = refusal(bare)
    assert not [word for word in words if word not in text], text


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_tokenizer_made_from_nothing_is_none(tiny: Maker, tmp_path: Path, family: str):
    """transformers makes one that gives every text no token, or the unknown one."""
    folder = Path(shutil.copytree(tiny(family), tmp_path / "model"))
    assert len(load_tokenizer(folder)("a text")["input_ids"]) > 1
    for name in ("tokenizer.json", CONFIG):
        (folder / name).unlink()
    assert "no tokenizer.json" in refusal(folder)


def test_what_panics_is_an_error_too(bare: Path):
    (bare / "config.json").write_text((bare / "config.json").read_text().replace("mistral", "gpt2"))
    (bare / "vocab.json").write_text('{"a": 0, "b": 1}')
    (bare / "merges.txt").write_text("#version: 0.2\na b\n")
    assert "put tokenizer.json" in refusal(bare)


def test_the_template_of_an_older_processor(tiny: Maker, tmp_path: Path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    own = load_tokenizer(folder).chat_template
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(folder).chat_template == own
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": ["no text"]}))
    assert load_tokenizer(folder).chat_template is None
