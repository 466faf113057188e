"""Tokenizers that do not suit the model they stand beside."""

from __future__ import annotations

import pytest
from test_calib import byte_tokenizer

from quantize.calibration.fit import warn_of_tokenizer


def said(caplog: pytest.LogCaptureFixture, tokenizer: object, vocab: int) -> list[str]:
    caplog.clear()
    warn_of_tokenizer(tokenizer, vocab)  # type: ignore[arg-type]
    return caplog.messages


def test_vocabularies_of_other_sizes(caplog: pytest.LogCaptureFixture):
    tokenizer = byte_tokenizer()
    largest = max(tokenizer.get_vocab().values())
    assert said(caplog, tokenizer, largest + 1) == []
    assert said(caplog, tokenizer, largest + 1 + 256) == []
    (line,) = said(caplog, tokenizer, largest + 1 + 257)
    assert f"vocabulary of {largest + 258} is larger than the tokenizer's {largest + 1} ids" in line
    (line,) = said(caplog, tokenizer, largest)
    token = next(token for token, index in tokenizer.get_vocab().items() if index == largest)
    assert f"1 tokens that the model's embedding of {largest} rows has no row for" in line
    assert f"{token!r}, id {largest}" in line
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    (line,) = said(caplog, tokenizer, largest + 1)
    assert f"'<pad>', id {largest + 1}" in line


def test_special_tokens_that_nobody_named(caplog: pytest.LogCaptureFixture):
    tokenizer = byte_tokenizer(bos=False, eos=False)
    (line,) = said(caplog, tokenizer, 258)
    assert "no special tokens at all" in line
    assert said(caplog, byte_tokenizer(bos=False), 258) == []
