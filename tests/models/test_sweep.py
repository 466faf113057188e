"""A sweep over types survives whatever one of them does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from models.checks import alive, round_trip
from models.subject import Item, Row, Subject
from models.sweep import all_items, sweep

GPT2, BERT = Item("gpt2", False), Item("bert", False)


def dies(subject: Subject) -> Row:
    os.write(2, b"first\nthe last words\n")
    os._exit(3)


def never_ends(subject: Subject) -> Row:
    time.sleep(1000)
    return {"ok": True}


def raises(subject: Subject) -> Row:
    raise ValueError("two\nlines")


def deadens(subject: Subject) -> Row:
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.zero_()
    return {"ok": True}


def test_a_row_says_what_a_type_is_and_what_checks_find(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    rows = sweep([GPT2, BERT], [raises, alive, round_trip, deadens, alive], out)
    assert [row["type"] for row in rows] == ["gpt2", "bert"]
    assert [row["kind"] for row in rows] == ["decoder-only", "not causal"]
    raised = rows[0]["checks"]["raises"]
    assert not raised["ok"]
    assert raised["why"] == "ValueError: two lines"
    assert raised["where"].endswith(f"{Path(__file__).name}:{raises.__code__.co_firstlineno + 1}")
    assert rows[0]["checks"]["round_trip"]["ok"]
    # The last word of `alive` is that on a model whose logits are all alike.
    assert not rows[0]["checks"]["alive"]["ok"]
    assert rows[0]["checks"]["alive"]["entropy"] > 6.2
    assert json.loads(out.read_text())["rows"] == rows


def test_a_crash_and_a_hang_cost_one_row_each(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    (crash,) = sweep([GPT2], [dies], out)
    assert crash["status"] == "crashes"
    assert crash["why"] == "ended with 3; the last words"
    (hang,) = sweep([GPT2], [never_ends], out, limit=1.5)
    assert hang["status"] == "hangs"
    assert hang["why"].startswith("took too long")


def test_a_type_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    (row,) = sweep([Item("no_such_type", False)], [], tmp_path / "rows.json")
    assert row["status"] == "does not build"
    assert "no_such_type" in row["why"]


def test_items_are_all_types_once() -> None:
    names = [str(item) for item in all_items()]
    assert len(set(names)) == len(names) > 250
    assert {"llama", "gemma3", "gemma3:image-text", "qwen2_5_vl:image-text"} <= set(names)
