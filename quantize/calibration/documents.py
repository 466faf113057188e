"""Text to documents: each encoded by itself, for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantize.calibration import text_sources
from quantize.calibration.encoding import join_rows, numbered
from quantize.calibration.notes import Notes
from quantize.calibration.rendering import Renderer
from quantize.calibration.tokens import CHARACTERS_PER_TOKEN, MAX_TOKENS, sha256_of
from quantize.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """One document of an evaluation text, or its beginning."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class DocumentSet:
    """Documents in their original order."""

    documents: list[Document]
    sha256: str
    """Of all tokens as little-endian int64, document after document."""
    source: str
    notes: Notes = ()
    """What is to be said of the text."""


def evaluation_documents(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str,
    max_tokens: int | None = None,
    text_field: str | None = None,
    chat_template: bool | None = None,
) -> DocumentSet:
    """Return the documents of an evaluation text, encoded with the tokenizer's own special tokens;
    chats have those that their template writes.

    A .txt file, "builtin" and sets that are one running text are one
    document; otherwise each row is one.
    max_tokens: stop there; the document it falls into is cut, its text being
    what the kept tokens decode to.
    dataset, text_field, chat_template: as for `calibration_tokens`.
    Raises DataError when the text cannot be read or has no tokens.
    """
    limit = None if max_tokens is None else CHARACTERS_PER_TOKEN * max_tokens
    text = text_sources.load(dataset, "evaluation", text_field, limit)
    render = Renderer(tokenizer, text, chat_template)
    whole = text.packing == "stream"
    rows = iter([join_rows(text)]) if whole else render.rendered(numbered(text, None))
    special = not render.changes
    documents: list[Document] = []
    left = MAX_TOKENS if max_tokens is None else max_tokens
    for plain in rows:
        ids = list(tokenizer(plain, add_special_tokens=special, verbose=False)["input_ids"])
        if len(ids) > left:
            ids = ids[:left]
            plain = str(
                tokenizer.decode(
                    ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
                ),
            )
        left -= len(ids)
        documents.append(Document(ids, plain))
        if left <= 0:
            break
    render.require_few_odd()
    if not any(document.ids for document in documents):
        raise DataError(f"{text.source} holds no tokens; give more text")
    every = [token for document in documents for token in document.ids]
    sha256 = sha256_of(torch.tensor(every, dtype=torch.int64))
    return DocumentSet(documents, sha256, render.source(), render.notes())
