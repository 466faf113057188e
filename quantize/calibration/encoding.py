"""Text to one stream of token ids: what becomes of rows, chats and documents on the way."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantize.calibration.layouts import Row
from quantize.calibration.text_sources import Text

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
    """All rows as one text; none of them may be a chat."""
    return text.joiner.join(row for row in text.rows if isinstance(row, str))


def numbered(text: Text, seed: int | None) -> list[tuple[Row, int]]:
    """The rows and where each stands in its set; in an order that `seed` alone decides, or None:
    in theirs."""
    rows = list(zip(text.rows, text.numbers, strict=True))
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return rows


def pack(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    wanted: int | None,
    without: int | None = None,
) -> list[int]:
    """Return the documents one after the other, as many as give `wanted` tokens, or all; a token
    to leave out is none of theirs."""
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        document = [token for token in encode(tokenizer, text) if token != without]
        ids += document
        # A chat template may have written the EOS itself, and a line feed behind it.
        if document and eos is not None and not _ends(tokenizer, text, document):
            ids.append(eos)
        if wanted is not None and len(ids) >= wanted:
            break
    return ids


def _ends(tokenizer: PreTrainedTokenizerBase, text: str, document: list[int]) -> bool:
    """Whether EOS is the last thing that a document says."""
    eos = tokenizer.eos_token_id
    return document[-1] == eos or (
        eos in document and text.rstrip().endswith(str(tokenizer.eos_token))
    )


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
