"""What is said of a text, and warnings where it or the tokenizer does not suit the model: one line
each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantize.calibration.bos import Bos, adds_bos
from quantize.calibration.notes import Notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What config.json calls the context; the last two are older models' (GPT-2, GPT-J; MPT, DBRX)."""
_PADDING, _PADDING_ROWS = 0.01, 256
"""Share of a vocabulary, and rows, by which embeddings are made larger than the tokenizer for speed
and for tokens to come: at most half a percent in common models, and up to a multiple of 128."""


def context_of(config: Mapping[str, Any]) -> int | None:
    """Positions that a model was made for, by a parsed config.json or its text_config; None where
    neither says."""
    found = _context(config)
    return None if found is None else found[1]


def _context(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The context, and what it is called there."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for name in _CONTEXT:
            value = part.get(name)
            if type(value) is int and value > 0:
                return name, value
    return None


def warn_of_length(length: int, config: Mapping[str, Any]) -> None:
    """Warn of windows of `length` tokens that are longer than the model's context."""
    found = _context(config)
    if found is not None and length > found[1]:
        log.warning(
            "windows of %d tokens are longer than the model's context of %d (%s); "
            "what it says beyond that is not what it was trained for: lower seqlen",
            length,
            found[1],
            found[0],
        )


def warn_of_padding(own: int | None, used: int) -> None:
    """Warn of texts that are padded with another token than the tokenizer's own, None being none."""
    lacks = (
        "no pad token" if own is None else f"a pad token (id {own}) that the model has no row for"
    )
    log.warning(
        "the tokenizer has %s: texts of a batch are padded with id %d, which the attention mask "
        "hides; engines that pad need a pad_token in tokenizer_config.json",
        lacks,
        used,
    )


def warn_without_bos(tokenizer: PreTrainedTokenizerBase, choice: Bos) -> None:
    """Warn of texts that are to begin without BOS though the tokenizer adds it."""
    if choice == "never" and adds_bos(tokenizer):
        log.warning(
            "bos never: this model's tokenizer begins texts with BOS, and here they have none; "
            "figures may say little of the model (choose auto)"
        )


def say(notes: Notes) -> None:
    """Log what a text's reader found."""
    for level, line in notes:
        log.log(level, "%s", line)


def warn_of_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Warn of a tokenizer that does not fit a model's embedding of `vocab` rows, and of one that
    has lost its special tokens."""
    ids = tokenizer.get_vocab()
    largest = max(ids.values(), default=-1)
    if largest >= vocab:
        beyond = sorted((index, token) for token, index in ids.items() if index >= vocab)
        index, token = beyond[0]
        log.warning(
            "the tokenizer has %d tokens that the model's embedding of %d rows has no row for "
            "(the first: %r, id %d): text with one of them fails; use the tokenizer that belongs "
            "to the model",
            len(beyond),
            vocab,
            token,
            index,
        )
    if not tokenizer.special_tokens_map:
        log.warning(
            "the tokenizer names no special tokens at all, no BOS, EOS or pad token: if its "
            "tokenizer_config.json is missing beside the weights, put it there"
        )
    if vocab - largest - 1 > max(_PADDING_ROWS, _PADDING * vocab):
        log.warning(
            "the model's vocabulary of %d is larger than the tokenizer's %d ids by more than "
            "padding: check that the tokenizer belongs to the model",
            vocab,
            largest + 1,
        )


@contextmanager
def said_once() -> Iterator[None]:
    """Say each of these lines once however often it comes up inside."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in said
        said.add(text)
        return new

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)
