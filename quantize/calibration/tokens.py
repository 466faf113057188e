"""Text to tokens: windows of equal length for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from quantize.calibration import text_sources
from quantize.calibration.bos import Bos, bos_of
from quantize.calibration.encoding import (
    begin_windows,
    encode,
    first_tokens,
    join_rows,
    numbered,
    pack,
)
from quantize.calibration.notes import Notes, joined
from quantize.calibration.rendering import Renderer
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
CHARACTERS_PER_TOKEN = 16
"""Well above what text gives (4 to 6), so that what is read of a stream
suffices for the tokens wanted."""

_NO_EOS = (
    "the tokenizer has no EOS token, so that documents follow one another without a mark between "
    "them; if the model has one, name it as eos_token in tokenizer_config.json"
)


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
    seed, packing, chat_template (whether rows were rendered with one), bos (whether windows begin
    with it) and bos_token_id (that token, else None); of rows text_field, rows, and where there
    were any rows_left_out, rows_refused and system_turns_folded; chat_template_sha256.

    A file is known by its name; paths are left out. `nsamples` counts the windows there are.
    """
    notes: Notes = ()
    """What is to be said of the text."""
    held_out: torch.Tensor | None = None
    """[N, T] int64: windows of the same text that are no part of `tokens`; None where none were
    asked for, or the text has no more."""

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
    chat_template: bool | None = None,
    text_field: str | None = None,
    bos: Bos = "auto",
    held_out: int = 0,
) -> TokenSet:
    """Return `nsamples` windows [nsamples, seqlen] of calibration tokens.

    dataset: "builtin", a .txt, .json, .jsonl (also .gz) or .parquet file, a name of calib_data/,
    or org/name[:config[:split]] on the Hub.
    One text (.txt, "builtin") gives its first windows in order and `seed` is not used; documents
    are shuffled by `seed` and packed, an EOS token after each where the tokenizer has one. No
    other special tokens are added.
    bos: whether each window is BOS and `seqlen` - 1 tokens of the text instead.
    chat_template: True: render each row's messages, or its text as one user turn, with the
    tokenizer's chat template; None: messages alone, and plainly where it has no template; False:
    messages plainly.
    held_out: how many more windows to set apart, as far as the text has them. They follow on those
    of calibration, which are the same without them; of documents, they are made of others.
    Raises DataError when the text cannot be read or gives fewer windows ("builtin"
    may give fewer, at least one).
    """
    _check_sizes(nsamples, seqlen)
    prefix = bos_of(tokenizer, bos)
    wanted = nsamples * seqlen
    pool = max(_POOL_CHARACTERS, CHARACTERS_PER_TOKEN * wanted)
    text = text_sources.load(dataset, "calibration", text_field, pool)
    render = Renderer(tokenizer, text, chat_template)
    documents: Iterator[str] | None = None
    if text.packing == "stream":
        ids = encode(tokenizer, join_rows(text))
    else:
        documents = render.rendered(numbered(text, seed))
        ids = pack(tokenizer, documents, wanted)
        render.require_few_odd()
    found = len(ids)
    spare = ids[wanted:]
    if prefix is not None:
        spare = begin_windows(ids, seqlen, prefix, nsamples + held_out)[wanted:]
        ids = begin_windows(ids, seqlen, prefix, nsamples)
    windows = min(nsamples, len(ids) // seqlen)
    if windows < nsamples and (dataset != text_sources.BUILTIN or not windows):
        problem = f"{text.source} holds {found} tokens, {windows} windows of {seqlen}"
        fewer = f"lower nsamples to {windows}, " if windows else ""
        remedy = f"{fewer}lower seqlen or give more text"
        raise DataError(f"{problem}, and {nsamples} are wanted; {remedy}")
    use = {"seed": seed, "packing": text.packing} | render.facts() | _bos_facts(prefix)
    made = _token_set(text, render, ids, windows, seqlen, use)
    if documents is not None:  # after all that is said of the rows which calibration reads
        spare = _further(tokenizer, documents, held_out, seqlen, prefix)
    return replace(made, held_out=_windows(spare, held_out, seqlen))


def _further(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterator[str],
    windows: int,
    seqlen: int,
    bos: int | None,
) -> list[int]:
    """Tokens of documents that calibration did not come to; none where they cannot be rendered."""
    if not windows:
        return []
    try:
        ids = pack(tokenizer, documents, windows * seqlen)
    except DataError:
        return []
    return ids if bos is None else begin_windows(ids, seqlen, bos, windows)


def _windows(ids: list[int], most: int, seqlen: int) -> torch.Tensor | None:
    """Whole windows of a stream, `most` at most; None where there is none."""
    windows = min(most, len(ids) // seqlen)
    if not windows:
        return None
    return torch.tensor(ids[: windows * seqlen], dtype=torch.int64).view(windows, seqlen)


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str,
    seqlen: int,
    max_windows: int | None = None,
    text_field: str | None = None,
    chat_template: bool | None = None,
    overlap: int = 0,
    bos: int | None = None,
) -> TokenSet:
    """Return the first `max_windows` (None: all) windows [B, seqlen] of one
    continuous token stream, in order.

    Rows of a set are joined by a blank line, or as calib_data/ says. No BOS or other special
    tokens; the remainder that fills no window is dropped. Chats follow one another as in
    calibration, in their order; where windows begin with BOS their own is left out.
    dataset, text_field, chat_template: as for `calibration_tokens`.
    overlap: tokens of the text that a window shares with the one before.
    bos: the id that each window begins with, before `seqlen` - 1 tokens of the text.
    Raises DataError when the text cannot be read or is shorter than one window.
    """
    _check_sizes(1 if max_windows is None else max_windows, seqlen, count="max_windows")
    limit = None if max_windows is None else CHARACTERS_PER_TOKEN * max_windows * seqlen
    text = text_sources.load(dataset, "evaluation", text_field, limit)
    own = seqlen - (bos is not None)
    stride = own - overlap
    wanted = None if max_windows is None else (max_windows - 1) * stride + own
    render = Renderer(tokenizer, text, chat_template)
    if not render.changes:
        ids = first_tokens(tokenizer, join_rows(text), wanted)
    else:
        ids = pack(tokenizer, render.rendered(numbered(text, None)), wanted, without=bos)
        render.require_few_odd()
    if len(ids) < own:
        problem = f"{text.source} holds {len(ids)} tokens, not one window of {own}"
        raise DataError(f"{problem}; lower seqlen or give more text")
    windows = 1 + (len(ids) - own) // stride
    if max_windows is not None:
        windows = min(windows, max_windows)
    packing = "packed" if render.changes else "stream"
    use = {"seed": None, "packing": packing} | render.facts() | _bos_facts(bos)
    _check_sizes(windows, seqlen, count="windows")
    used = ids[: (windows - 1) * stride + own]
    if bos is not None:
        starts = range(0, windows * stride, stride)
        used = [token for at in starts for token in (bos, *used[at : at + own])]
        stride = seqlen
    return _token_set(text, render, used, windows, seqlen, use, stride)


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
    render: Renderer,
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
    if use["packing"] == "packed" and render.eos is None:
        notes = joined(render.notes(), ((logging.WARNING, f"{text.source}: {_NO_EOS}"),))
    else:
        notes = render.notes()
    return TokenSet(tokens, sha256_of(tokens), render.source(), origin, notes)


def sha256_of(tokens: torch.Tensor) -> str:
    """Of tokens as little-endian int64."""
    return hashlib.sha256(tokens.numpy().astype("<i8", copy=False).tobytes()).hexdigest()
