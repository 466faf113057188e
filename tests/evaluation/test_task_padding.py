"""Texts of tasks that are padded though the tokenizer has no token for it, or one too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("lm_eval")

from quantize.evaluation.task_model import TaskModel
from quantize.model.load import load_model

Maker = Callable[..., Path]
TEXTS = ["a", "a longer text than the first"]


def settle(folder: Path, change: Callable[[Any], object], bos: int | None = None) -> TaskModel:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    model = load_model(folder, torch.device("cpu"), torch.float32)
    return TaskModel(model, tokenizer, None, lambda what, done, total: None, bos=bos)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("quantize")]


def unset(tokenizer: Any) -> None:
    assert tokenizer.pad_token is None


def beyond(tokenizer: Any) -> None:
    """Tokens up to one that the embedding of 300 rows has no row for, as some fine-tunes add it."""
    missing = 301 - len(tokenizer)
    tokenizer.add_tokens([f"<more {index}>" for index in range(missing - 1)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 300


def nothing(tokenizer: Any) -> None:
    beyond(tokenizer)
    tokenizer.eos_token = tokenizer.bos_token = None


@pytest.mark.parametrize(
    ("change", "used", "lacks"),
    [
        (unset, 1, "has no pad token"),
        (beyond, 1, "a pad token (id 300) that the model has no row for"),
        (nothing, 0, "a pad token (id 300) that the model has no row for"),
    ],
)
@pytest.mark.parametrize("bos", [None, 0])
def test_padding_is_hidden_and_told_once(
    tiny: Maker,
    change: Callable[[Any], object],
    used: int,
    lacks: str,
    bos: int | None,
    caplog: pytest.LogCaptureFixture,
):
    lm = settle(tiny("llama"), change, bos)
    assert lm.tok_batch_encode(TEXTS[:1])[1].all()
    assert not told(caplog)
    ids, mask = lm.tok_batch_encode(TEXTS)
    assert (ids[mask == 0] == used).all()
    assert not mask.bool().all()
    assert int(ids.max()) < 300
    lm.tok_batch_encode(TEXTS)
    (line,) = told(caplog)
    assert lacks in line
    assert f"padded with id {used}" in line


def test_a_pad_token_that_the_model_has_is_used(tiny: Maker, caplog: pytest.LogCaptureFixture):
    lm = settle(tiny("llama"), lambda tokenizer: setattr(tokenizer, "pad_token", "<s>"))
    ids, mask = lm.tok_batch_encode(TEXTS)
    assert (ids[mask == 0] == 0).all()
    assert not told(caplog)
