"""A loaded model as lm-eval sees it: its HFLM, with batches chosen by
tokens and nothing printed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from quantize.calibration.tokens import check_vocab
from quantize.errors import DataError, ModelError, UsageError
from quantize.evaluation.task_padding import Padding
from quantize.model.transformers_api import logits_of
from quantize.parallel.ranks import ALONE, Ranks

_ANY_NUMBER = 2**30  # batches are cut here, not by HFLM
# of all copies of the logits of a batch on a CPU: a bound that does not ask what is free
_CPU_LOGIT_BYTES = 2**30
_COPIES = 3  # of the logits, float32: as computed, as float32, as log-probabilities
# tokens of a batch, and texts generated together, where an accelerator takes 16384 and 32: fewer
# keep a CPU busy, and take less memory
_MAX_TOKENS = {"cpu": 4096}
_GENERATED_TOGETHER = {"cpu": 8}
_MAX_REQUESTS = 4096  # of one batch, however short they are

Scored = tuple[float, bool]
_Request = tuple[Any, list[int], list[int]]


class TaskModel(HFLM):  # type: ignore[misc]
    """HFLM around a model in memory. `batch_size` None: as many requests as
    the memory for logits holds.

    bos: a token that texts shall begin with though the tokenizer does not write it; lm-eval's
    `add_bos_token` does no more than let the tokenizer do what it does.
    Ranks divide the batches, not the documents, so that each batch is that of one process: every
    rank is to be given all requests and gets all answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | None,
        progress: Callable[[str, int, int], None],
        ranks: Ranks = ALONE,
        bos: int | None = None,
        **options: Any,
    ) -> None:
        self.bos = bos
        self.vocab: int = model.get_input_embeddings().weight.shape[0]
        own_pad = tokenizer.pad_token_id
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=_ANY_NUMBER,
            **options,
        )
        self._padding = Padding(own_pad, self.tokenizer, self.vocab)
        self.fixed_batch = batch_size
        self.progress = progress
        self.ranks = ranks
        self.truncated = 0
        """Requests that were longer than the model's window and were cut from the left."""
        kind = self.device.type
        affordable = min(ranks.gather(_logit_bytes(self.device))) // (self.vocab * 4 * _COPIES)
        self._tokens_at_once = min(_MAX_TOKENS.get(kind, 16384), affordable)
        self._generated_together = batch_size or _GENERATED_TOGETHER.get(kind, 32)
        self._generated = 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text."""
        token: int | None = super().prefix_token_id
        if token is None:
            raise DataError(
                "the tokenizer has neither a BOS nor an EOS token to put before a text; "
                "name one with the model argument prefix_token_id=ID"
            )
        if not 0 <= token < self.vocab:
            raise UsageError(
                f"prefix_token_id={token} is outside the model's vocabulary of {self.vocab}"
            )
        return token

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """The ids of a text, with special tokens unless `add_special_tokens` is False."""
        most = options.pop("left_truncate_len", None)
        ids = list(super().tok_encode(string, **options))
        if options.get("add_special_tokens") is not False:
            ids = self._begin(ids)
        return ids[-most:] if most else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts as ids and mask [B, T], with special tokens."""
        if self.bos is None:
            found: tuple[Tensor, Tensor] = super().tok_batch_encode(
                strings,
                padding_side=padding_side,
                left_truncate_len=left_truncate_len,
                truncation=truncation,
            )
            self._padding.tell(found[1])
            return found
        ids, mask = super().tok_batch_encode(
            strings, padding_side=padding_side, truncation=truncation
        )
        rows = [self._begin(row[seen.bool()].tolist()) for row, seen in zip(ids, mask, strict=True)]
        rows = [row[-left_truncate_len:] for row in rows] if left_truncate_len else rows
        T, empty = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.full((len(rows), T), empty, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(T - len(row), T) if padding_side == "left" else slice(len(row))
            ids[index, place], mask[index, place] = torch.tensor(row), 1
        self._padding.tell(mask)
        return ids, mask

    def _begin(self, ids: list[int]) -> list[int]:
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    @torch.no_grad()
    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """inps [B, T] → logits [B, T, V] in float32, so that no difference is
        lost in a rounded softmax."""
        return logits_of(self.model, inps).float()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        """Score continuations: (sum of log-probabilities, whether each token is the likeliest)."""
        scores: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, each token once, in windows of the model's length."""
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue each prompt until its stop strings."""
        self.progress("generating", 0, len(requests))
        self.batch_size_per_gpu, self._generated = self._generated_together, 0
        try:
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        except AssertionError as err:
            raise UsageError(
                f"{' '.join(str(err).split())}; these tasks need a longer max_length"
            ) from None
        finally:
            self.batch_size_per_gpu = _ANY_NUMBER
        texts = [
            next(filter(None, found), "") for found in zip(*self.ranks.gather(texts), strict=True)
        ]
        self.progress("generating", len(requests), len(requests))
        return texts

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """context [B, T] → tokens [B, T + …]; nothing is added to a batch of another rank."""
        batch, self._generated = self._generated, self._generated + 1
        # What is drawn at random depends on all that was drawn before: every rank makes it.
        drawn = options.get("do_sample") or options.get("temperature")
        if not drawn and batch % self.ranks.size != self.ranks.rank:
            return context
        tokens: Tensor = super()._model_generate(context, max_length, stop, **options)
        return tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = True, override_bs: Any = None
    ) -> list[Scored]:
        """Score (_, context, continuation) token lists, longest first, in
        batches that fit the memory."""
        self._check(requests)
        order = sorted(
            range(len(requests)),
            key=lambda i: (-_length(requests[i]), requests[i][1] + requests[i][2]),
        )
        scores: list[Scored] = [(0.0, False)] * len(requests)
        at = 0
        while at < len(order):
            self.progress("scoring", at, len(order))
            batches = self._batches(requests, order, at)
            mine = (
                [requests[i] for i in batches[self.ranks.rank]]
                if self.ranks.rank < len(batches)
                else []
            )
            for batch, found in zip(batches, self.ranks.gather(self._score(mine)), strict=False):
                if found is None:
                    self._shrink(len(batch), _length(requests[batch[0]]))
                    break
                for i, (score, greedy) in zip(batch, found, strict=True):
                    scores[i] = score, greedy
                at += len(batch)
        self.progress("scoring", len(order), len(order))
        if not all(math.isfinite(score) for score, _ in scores):
            raise ModelError(
                "the model's logits are not finite; its weights are damaged or the dtype is too "
                "narrow"
            )
        return scores

    def _batches(
        self, requests: Sequence[_Request], order: Sequence[int], at: int
    ) -> list[list[int]]:
        """The next batch of each rank, as indices, from order[at] on; fewer batches at the end."""
        batches: list[list[int]] = []
        while at < len(order) and len(batches) < self.ranks.size:
            count = self._fitting([requests[i] for i in order[at : at + _MAX_REQUESTS]])
            batches.append(list(order[at : at + count]))
            at += count
        return batches

    def _score(self, requests: Sequence[_Request]) -> list[Scored] | None:
        """Scores of one batch; None where the memory runs out."""
        try:
            found = super()._loglikelihood_tokens(requests, disable_tqdm=True) if requests else []
        except torch.OutOfMemoryError:
            return None
        return [(float(score), bool(greedy)) for score, greedy in found]

    def _shrink(self, count: int, length: int) -> None:
        """Make batches half of one of `count` requests of at most `length` tokens;
        UsageError for a single one."""
        if count == 1:
            raise self._too_long(length)
        self._tokens_at_once = max(1, length * count // 2)
        self.fixed_batch = None

    def _fitting(self, requests: Sequence[_Request]) -> int:
        """How many of `requests`, sorted, make the next batch.

        Those that differ in their last token alone are one sequence to HFLM, and count once.
        """
        if self.fixed_batch is not None:
            return self.fixed_batch
        width = min(_length(requests[0]), self.max_length)
        together = max(1, self._tokens_at_once // width)
        distinct: set[tuple[int, ...]] = set()
        for count, (_, context, continuation) in enumerate(requests):
            distinct.add((*context, *continuation[:-1]))
            if len(distinct) > together:
                return count
        return len(requests)

    def _check(self, requests: Sequence[_Request]) -> None:
        for _, context, continuation in requests:
            check_vocab(torch.tensor([context + continuation]), self.vocab)
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a text to score has {len(continuation)} tokens; 1 to {self.max_length} "
                    "(max_length) can be scored"
                )
        longest = min(self.max_length, max(map(_length, requests), default=1))
        if self.device.type == "cpu" and longest * self.vocab * 4 * _COPIES > _physical_memory():
            raise self._too_long(longest)
        self.truncated += sum(_length(request) > self.max_length + 1 for request in requests)

    def _too_long(self, tokens: int) -> UsageError:
        tokens = min(tokens, self.max_length)
        return UsageError(
            f"the logits of a window of {tokens} tokens "
            f"({tokens * self.vocab * 4 * _COPIES / 1e9:.0f} GB) do not fit the memory of "
            f"{self.device}; lower it with the model argument "
            f"max_length={max(1, min(2048, tokens // 4))}"
        )


def _length(request: _Request) -> int:
    return len(request[1]) + len(request[2])


def _logit_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 4
    return _CPU_LOGIT_BYTES


def _physical_memory() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # not every system tells
        return math.inf
