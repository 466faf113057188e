"""Text to one stream of token ids: what becomes of rows, chats and documents on the way."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantize.calibration import text_sources
from quantize.calibration.text_sources import Row, Text
from quantize.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEAR_THE_CUT = 256
"""Tokens that a cut in the text may have changed, generously."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text without special tokens."""
    # Whole, never in pieces: a tokenizer may merge across any cut. verbose=False: the
    # model never sees all at once.
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    return list(encoding["input_ids"])


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, wanted: int | None) -> list[int]:
    """At least the first `wanted` tokens of the text (None: all), the same as
    if all of it were encoded."""
    characters = len(text) if wanted is None else 6 * wanted  # most texts have fewer a token
    while True:
        ids = encode(tokenizer, text[:characters])
        # What stands far behind the last window cannot change its tokens; a
        # few next to the cut may differ.
        if characters >= len(text) or (wanted is not None and len(ids) >= wanted + _NEAR_THE_CUT):
            return ids
        characters *= 2


def join_rows(text: Text) -> str:
    """All rows as one text; DataError where one holds chat messages."""
    rows = [row for row in text.rows if isinstance(row, str)]
    if len(rows) < len(text.rows):
        problem = f"{text.source} holds chat messages where plain text is read"
        raise DataError(f"{problem}; name a text field with strings")
    return text.joiner.join(rows)


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """The rows in an order that `seed` alone decides."""
    rows = rows.copy()
    random.Random(seed).shuffle(rows)
    return rows


def pack(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    wanted: int,
    chat_template: bool,
) -> list[int]:
    """Return the documents one after the other, as many as give `wanted` tokens, or all."""
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    for row in rows:
        if len(ids) >= wanted:
            break
        document = encode(tokenizer, plain_text(tokenizer, row, chat_template))
        ids += document
        # A chat template may have written the EOS itself.
        if document and eos is not None and document[-1] != eos:
            ids.append(eos)
    return ids


def begin_windows(ids: list[int], seqlen: int, bos: int, most: int) -> list[int]:
    """Return up to `most` whole windows of the stream, one after the other, each beginning with
    BOS: its own where the stream has one there (chat templates write them), else one added."""
    out: list[int] = []
    at = 0
    while len(out) < most * seqlen and at < len(ids):
        added = int(ids[at] != bos)
        window = ids[at : at + seqlen - added]
        if len(window) + added < seqlen:
            break
        out += [bos] * added + window
        at += len(window)
    return out


def plain_text(tokenizer: PreTrainedTokenizerBase, row: Row, chat_template: bool) -> str:
    """A row as text, through the tokenizer's chat template where that is wanted; DataError where
    one of them does not take the other."""
    if not chat_template:
        if isinstance(row, str):
            return row
        raise DataError(
            "rows hold chat messages; turn chat_template on, or name a text field with strings",
        )
    if isinstance(row, str) and not row.strip():
        return ""
    if not getattr(tokenizer, "chat_template", None):
        remedy = "turn chat_template off, or use the chat model's tokenizer"
        raise DataError(f"the tokenizer has no chat template; {remedy}")
    messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    # Templates are programs of the model's author and raise what they like (say,
    # when roles do not alternate).
    except Exception as error:
        start = str(messages[0]["content"])[:40]
        reason = text_sources.first_line(error)
        problem = f"the tokenizer's chat template refuses the row that starts {start!r}"
        raise DataError(f"{problem}: {reason}") from error
