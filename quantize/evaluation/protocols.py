"""Perplexity protocols: which tokens a model reads, and which of them it must predict.

`strided-N` (the GPTQ literature's): all text is one token stream without special tokens, cut into
windows of N tokens that do not overlap; each predicts its tokens 2 … N. The remainder is dropped.

`strided-N-context-C`: windows of N tokens that overlap by C; each predicts all but its first C
tokens (the first window all but its first token), so every token but the first is predicted once,
with C … N − 1 tokens before it.

`strided-N-bos`, `strided-N-context-C-bos`: every window of N positions is BOS and N − 1 tokens of
the stream. BOS is never predicted; the tokens all are, the first of them from BOS alone (with a
context all but the first C, save in the first window).

`rolling-N` (lm-eval's `loglikelihood_rolling`): each document is encoded with the tokenizer's own
special tokens and preceded by its BOS (else EOS) token; the model reads N tokens at a time and
predicts every token of the document once.
The last window of a document reaches back so that it is full. Log-likelihoods are also given per
word (separated by white space) and per UTF-8 byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quantize.calibration.bos import BOS as BOS
from quantize.calibration.bos import Bos as Bos
from quantize.calibration.bos import bos_of
from quantize.calibration.documents import evaluation_documents
from quantize.calibration.fit import said_once as said_once
from quantize.calibration.notes import Notes
from quantize.calibration.tokens import check_vocab, evaluation_tokens
from quantize.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ProtocolName = Literal["strided", "rolling"]
PROTOCOLS: tuple[ProtocolName, ...] = ("strided", "rolling")

UNSCORED = -1


@dataclass(frozen=True)
class Protocol:
    """A named way to measure perplexity."""

    kind: ProtocolName = "strided"
    seqlen: int = 512
    """Tokens that the model reads at once."""
    context: int = 0
    """Tokens at the start of a strided window that are read but not predicted again."""
    bos: bool = False
    """Whether strided windows begin with BOS; rolling ones always have a token in front."""

    def __post_init__(self) -> None:
        if self.kind not in PROTOCOLS:
            raise UsageError(f"protocol {self.kind!r}: choose one of {', '.join(PROTOCOLS)}")
        if self.seqlen < 2:
            raise UsageError(f"seqlen {self.seqlen}: a window needs at least 2 tokens")
        if self.context and self.kind != "strided":
            raise UsageError(
                "context belongs to the strided protocol; rolling windows carry their own"
            )
        if self.bos and self.kind != "strided":
            raise UsageError("bos belongs to the strided protocol; rolling windows carry their own")
        if not 0 <= self.context < self.seqlen - self.bos:
            own = f" - 1 ({self.seqlen - 1}), BOS being one" if self.bos else f" {self.seqlen}"
            raise UsageError(f"context {self.context} must be at least 0 and below seqlen{own}")

    @property
    def name(self) -> str:
        """What every printed perplexity carries: strided-2048,
        strided-2048-context-1024, strided-2048-bos, rolling-2048."""
        context = f"-context-{self.context}" if self.context else ""
        return f"{self.kind}-{self.seqlen}{context}" + ("-bos" if self.bos else "")

    def with_bos(self, tokenizer: PreTrainedTokenizerBase, choice: Bos) -> Protocol:
        """Return the protocol with BOS as `choice` says for this tokenizer; UsageError for what
        it lacks, and for a choice about rolling windows, whose definition leaves none."""
        if self.kind == "strided":
            return replace(self, bos=bos_of(tokenizer, choice) is not None)
        if choice != "auto":
            raise UsageError(
                f"bos {choice} belongs to the strided protocol; rolling windows always begin "
                "with BOS, else EOS"
            )
        return self


@dataclass(frozen=True, eq=False)
class Windows:
    """What a model reads and what it must predict."""

    inputs: Tensor
    """[B, T] int64; short windows are padded at the end, which a causal model cannot see."""
    targets: Tensor
    """[B, T] int64: the token that follows each input, or UNSCORED. Scored positions of
    a window are consecutive."""
    source: str
    sha256: str
    words: int | None = None
    """Words of the predicted text (rolling protocol)."""
    utf8_bytes: int | None = None
    notes: Notes = ()
    """What is to be said of the text, which the rank that read it knows."""

    def spans(self) -> list[tuple[int, int, int]]:
        """(window, first, end) of the scored positions of every window."""
        scored = self.targets != UNSCORED
        first = scored.int().argmax(dim=1).tolist()
        return [
            (w, f, f + n)
            for w, (f, n) in enumerate(zip(first, scored.sum(dim=1).tolist(), strict=True))
            if n
        ]


def windows_of(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    max_windows: int | None,
    vocab: int,
    text_field: str | None = None,
    chat_template: bool | None = None,
) -> Windows:
    """Read `dataset` and cut it as the protocol says; DataError when the text
    cannot be read or does not fit."""
    how = {"text_field": text_field, "chat_template": chat_template}
    if protocol.kind == "strided":
        windows = _strided_windows(protocol, tokenizer, dataset, max_windows, how)
    else:
        windows = _rolling(protocol, tokenizer, dataset, max_windows, how)
    check_vocab(windows.inputs, vocab)
    return windows


def _strided_windows(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    max_windows: int | None,
    how: Mapping[str, Any],
) -> Windows:
    text = evaluation_tokens(
        tokenizer,
        dataset=dataset,
        seqlen=protocol.seqlen,
        max_windows=max_windows,
        overlap=protocol.context,
        bos=tokenizer.bos_token_id if protocol.bos else None,
        **how,
    )
    tokens = text.tokens
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, :-1] = tokens[:, 1:]
    if protocol.context:
        # without BOS no position predicts the first token
        targets[1:, : protocol.context - 1 + protocol.bos] = UNSCORED
    return Windows(tokens, targets, text.source, text.sha256, notes=text.notes)


def _rolling(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    max_windows: int | None,
    how: Mapping[str, Any],
) -> Windows:
    prefix = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if prefix is None:
        raise DataError(
            "the rolling protocol needs a tokenizer with a BOS or EOS token; use the strided "
            "protocol"
        )
    limit = None if max_windows is None else max_windows * protocol.seqlen
    text = evaluation_documents(tokenizer, dataset=dataset, max_tokens=limit, **how)
    rows: list[tuple[list[int], list[int]]] = []
    words = utf8_bytes = 0
    for document in text.documents:
        for read, wanted in rolling_windows(document.ids, int(prefix), protocol.seqlen):
            rows.append((read, wanted))
        words += len(re.split(r"\s+", document.text))
        utf8_bytes += len(document.text.encode("utf-8"))
    T = max(len(read) for read, _ in rows)
    inputs = torch.full((len(rows), T), int(prefix), dtype=torch.int64)
    targets = torch.full((len(rows), T), UNSCORED, dtype=torch.int64)
    for row, (read, wanted) in enumerate(rows):
        inputs[row, : len(read)] = torch.tensor(read)
        targets[row, len(read) - len(wanted) : len(read)] = torch.tensor(wanted)
    return Windows(inputs, targets, text.source, text.sha256, words, utf8_bytes, text.notes)


def rolling_windows(ids: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(tokens read, tokens predicted after the last of them) so that every token of
    a document is predicted once.

    Every window reads at most `length` tokens; the last one is filled up with
    tokens that were predicted before.
    """
    stream = [prefix, *ids]
    out = []
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = max(0, end - length)
        out.append((stream[first:end], ids[start:end]))
    return out
