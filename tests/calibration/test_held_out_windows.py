"""Windows set apart from calibration: of the same text, no part of it, and without a trace in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, ModelMaker
from transformers import AutoTokenizer

from quantize.calibration.tokens import TokenSet, calibration_tokens


def drawn(folder: Path, text: Path, held_out: int, **how: object) -> TokenSet:
    settings: dict[str, object] = {"nsamples": 3, "seqlen": 32, "seed": 5} | how
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return calibration_tokens(tokenizer, dataset=str(text), held_out=held_out, **settings)  # type: ignore[arg-type]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{number:03d} {SENTENCES[number % 4]}"} for number in range(80)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("bos", ["never", "always"])
def test_one_text_goes_on(tiny: ModelMaker, text_file: Path, bos: str):
    plain, more = (drawn(tiny("llama"), text_file, n, bos=bos) for n in (0, 2))
    assert plain.held_out is None
    assert more.held_out is not None
    assert torch.equal(plain.tokens, more.tokens)
    assert (plain.sha256, plain.origin) == (more.sha256, more.origin)
    longer = drawn(tiny("llama"), text_file, 0, bos=bos, nsamples=5)
    assert torch.equal(longer.tokens[3:], more.held_out)


@pytest.mark.parametrize("bos", ["never", "always"])
def test_documents_are_others(tiny: ModelMaker, documents: Path, bos: str):
    folder = tiny("llama")
    plain, more = (drawn(folder, documents, n, bos=bos) for n in (0, 2))
    assert more.held_out is not None
    assert more.held_out.shape == (2, 32)
    assert torch.equal(plain.tokens, more.tokens)
    assert (plain.origin, plain.notes) == (more.origin, more.notes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read, apart = (tokenizer.decode(one.flatten().tolist()) for one in (more.tokens, more.held_out))
    numbers = [f"{number:03d} " for number in range(80)]
    assert {n for n in numbers if n in read}.isdisjoint(n for n in numbers if n in apart)
    if bos == "always":
        assert (more.held_out[:, 0] == tokenizer.bos_token_id).all()


def test_fewer_where_the_text_ends(tiny: ModelMaker, text_file: Path):
    folder = tiny("llama")
    whole = len(AutoTokenizer.from_pretrained(folder)(text_file.read_text())["input_ids"]) // 32
    almost = drawn(folder, text_file, 4, nsamples=whole - 1).held_out
    assert almost is not None
    assert almost.shape == (1, 32)
    assert drawn(folder, text_file, 4, nsamples=whole).held_out is None
