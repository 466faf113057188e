"""Text to tokens: windows of equal length for calibration and for evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantize.calibration import text_sources
from quantize.calibration.bos import Bos, bos_of
from quantize.calibration.encoding import (
    begin_windows,
    encode,
    first_tokens,
    join_rows,
    pack,
    plain_text,
    shuffled,
)
from quantize.calibration.text_sources import Text
from quantize.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SEQLEN = 2**20
"""Longer than the context of any model there is: a typing error, not a wish."""
MAX_TOKENS = 2**28
"""Most tokens of one set: 2 GiB as int64, far above what any method gains from."""

_POOL_CHARACTERS = 2**25
"""A large Hub set is shuffled within at least so many characters, about 10,000 web pages: enough
that neighbours in the set are not neighbours in the sample, little enough to download."""
_CHARACTERS_PER_TOKEN = 16
"""Well above what text gives (4 to 6), so that what is read of a stream
suffices for the tokens wanted."""


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token windows and where they came from."""

    tokens: torch.Tensor
    """[B, T] int64, on the CPU."""
    sha256: str
    """Of the tokens as little-endian int64, row by row."""
    source: str
    """For people: which text this is."""
    origin: dict[str, object]
    """For provenance: data set, split, licence, text_sha256, nsamples, seqlen,
    seed, packing, chat_template, bos (whether windows begin with it) and bos_token_id
    (that token, else None).

    A file is known by its name; paths are left out. `nsamples` counts the windows there are.
    """

    @property
    def bos(self) -> int | None:
        """The BOS token that every window begins with; None where they have none."""
        bos = self.origin["bos_token_id"]
        return bos if isinstance(bos, int) else None


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool = False,
    text_field: str | None = None,
    bos: Bos = "auto",
) -> TokenSet:
    """Return `nsamples` windows [nsamples, seqlen] of calibration tokens.

    dataset: "builtin", a .txt, .jsonl or .parquet file, a name of calib_data/, or
    org/name[:config[:split]] on the Hub.
    One text (.txt, "builtin") gives its first windows in order and `seed` is not used; documents
    are shuffled by `seed` and packed, an EOS token after each where the tokenizer has one. No
    other special tokens are added.
    bos: whether each window is BOS and `seqlen` - 1 tokens of the text instead.
    chat_template: render each row's messages, or its text as one user turn, with
    the tokenizer's chat template.
    Raises DataError when the text cannot be read or gives fewer windows ("builtin"
    may give fewer, at least one).
    """
    _check_sizes(nsamples, seqlen)
    prefix = bos_of(tokenizer, bos)
    wanted = nsamples * seqlen
    pool = max(_POOL_CHARACTERS, _CHARACTERS_PER_TOKEN * wanted)
    text = text_sources.load(dataset, "calibration", text_field, pool)
    if text.packing == "stream":
        if chat_template:
            raise DataError(
                f"{text.source} is one text without chat turns; "
                "turn chat_template off, or give a .jsonl or .parquet file with one chat per row"
            )
        ids = encode(tokenizer, join_rows(text))
    else:
        ids = pack(tokenizer, shuffled(text.rows, seed), wanted, chat_template)
    found = len(ids)
    if prefix is not None:
        ids = begin_windows(ids, seqlen, prefix, nsamples)
    windows = min(nsamples, len(ids) // seqlen)
    if windows < nsamples and (dataset != text_sources.BUILTIN or not windows):
        problem = f"{text.source} holds {found} tokens, {windows} windows of {seqlen}"
        fewer = f"lower nsamples to {windows}, " if windows else ""
        remedy = f"{fewer}lower seqlen or give more text"
        raise DataError(f"{problem}, and {nsamples} are wanted; {remedy}")
    use: dict[str, object] = {"seed": seed, "packing": text.packing, "chat_template": chat_template}
    return _token_set(text, ids, windows, seqlen, use | _bos_facts(prefix))


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str,
    seqlen: int,
    max_windows: int | None = None,
    text_field: str | None = None,
    overlap: int = 0,
    bos: int | None = None,
) -> TokenSet:
    """Return the first `max_windows` (None: all) windows [B, seqlen] of one
    continuous token stream, in order.

    Rows of a set are joined by a blank line, or as calib_data/ says. No BOS or other special
    tokens; the remainder that fills no window is dropped.
    dataset, text_field: as for `calibration_tokens`.
    overlap: tokens of the text that a window shares with the one before.
    bos: the id that each window begins with, before `seqlen` - 1 tokens of the text.
    Raises DataError when the text cannot be read or is shorter than one window.
    """
    _check_sizes(1 if max_windows is None else max_windows, seqlen, count="max_windows")
    limit = None if max_windows is None else _CHARACTERS_PER_TOKEN * max_windows * seqlen
    text = text_sources.load(dataset, "evaluation", text_field, limit)
    own = seqlen - (bos is not None)
    stride = own - overlap
    wanted = None if max_windows is None else (max_windows - 1) * stride + own
    ids = first_tokens(tokenizer, join_rows(text), wanted)
    if len(ids) < own:
        problem = f"{text.source} holds {len(ids)} tokens, not one window of {own}"
        raise DataError(f"{problem}; lower seqlen or give more text")
    windows = 1 + (len(ids) - own) // stride
    if max_windows is not None:
        windows = min(windows, max_windows)
    use: dict[str, object] = {"seed": None, "packing": "stream", "chat_template": False}
    use |= _bos_facts(bos)
    _check_sizes(windows, seqlen, count="windows")
    used = ids[: (windows - 1) * stride + own]
    if bos is not None:
        starts = range(0, windows * stride, stride)
        used = [token for at in starts for token in (bos, *used[at : at + own])]
        stride = seqlen
    return _token_set(text, used, windows, seqlen, use, stride)


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


def evaluation_documents(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str,
    max_tokens: int | None = None,
    text_field: str | None = None,
) -> DocumentSet:
    """Return the documents of an evaluation text, encoded with the tokenizer's own special tokens.

    A .txt file, "builtin" and sets that are one running text are one
    document; otherwise each row is one.
    max_tokens: stop there; the document it falls into is cut, its text being
    what the kept tokens decode to.
    Raises DataError when the text cannot be read or has no tokens.
    """
    limit = None if max_tokens is None else _CHARACTERS_PER_TOKEN * max_tokens
    text = text_sources.load(dataset, "evaluation", text_field, limit)
    rows = [join_rows(text)] if text.packing == "stream" else text.rows
    documents: list[Document] = []
    left = MAX_TOKENS if max_tokens is None else max_tokens
    for row in rows:
        if left <= 0:
            break
        plain = plain_text(tokenizer, row, chat_template=False)
        ids = list(tokenizer(plain, verbose=False)["input_ids"])
        if len(ids) > left:
            ids = ids[:left]
            plain = str(
                tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            )
        left -= len(ids)
        documents.append(Document(ids, plain))
    if not any(document.ids for document in documents):
        raise DataError(f"{text.source} holds no tokens; give more text")
    every = [token for document in documents for token in document.ids]
    sha256 = _sha256(torch.tensor(every, dtype=torch.int64))
    return DocumentSet(documents, sha256, text.source)


def check_vocab(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise DataError, naming the id, unless every token of `tokens`
    [B, T] lies in [0, vocab_size)."""
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        window, position = (int(index) for index in outside.nonzero()[0])
        token = f"token id {int(tokens[window, position])} (window {window}, position {position})"
        problem = f"{token} is outside the model's vocabulary of {vocab_size}"
        raise DataError(f"{problem}; use the tokenizer that belongs to the model")


def _check_sizes(nsamples: int, seqlen: int, count: str = "nsamples") -> None:
    if nsamples < 1 or seqlen < 1:
        raise DataError(f"{count} {nsamples} and seqlen {seqlen} must both be at least 1")
    if seqlen > MAX_SEQLEN:
        raise DataError(f"seqlen {seqlen} is above {MAX_SEQLEN}; lower seqlen")
    if nsamples * seqlen > MAX_TOKENS:
        raise DataError(
            f"{count} {nsamples} × seqlen {seqlen} is above {MAX_TOKENS} tokens; lower one of them",
        )


def _bos_facts(bos: int | None) -> dict[str, object]:
    return {"bos": bos is not None, "bos_token_id": bos}


def _token_set(
    text: Text,
    ids: list[int],
    windows: int,
    seqlen: int,
    use: dict[str, object],
    stride: int | None = None,
) -> TokenSet:
    stride = seqlen if stride is None else stride
    used = torch.tensor(ids[: (windows - 1) * stride + seqlen], dtype=torch.int64)
    tokens = used.unfold(0, seqlen, stride).contiguous()
    origin = text.origin | {"nsamples": windows, "seqlen": seqlen} | use
    return TokenSet(tokens, _sha256(tokens), text.source, origin)


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8", copy=False).tobytes()).hexdigest()
