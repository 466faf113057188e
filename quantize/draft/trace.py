"""Both models' distributions at every token that the parent wrote, taken in one teacher-forced pass
of each.

Both are streamed block by block as `pq eval` streams them, and logits exist for a few positions at a
time, so that neither the models nor the vocabulary must fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantize.draft.rollout import Rollout
from quantize.errors import DataError, ModelError
from quantize.evaluation.model import Model, Span
from quantize.evaluation.streamed import windows_of_a_pass
from quantize.model.logits import log_probs

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
_LOGIT_BYTES = 1 << 26
"""Of the float32 logits compared at once; what is computed of them takes several times as much."""
_HIDDEN_BYTES = 1 << 29
"""Of the hidden states of one model held at once."""
_TIE = 1e-4
"""Gap of the two largest logits below which the parent's cached and uncached passes may differ in
which is the largest."""

COLUMNS = (
    "kl",
    "overlap",
    "accept",
    "top1",
    "entropy",
    "confidence",
    "margin",
    "parent_confidence",
    "nll",
    "draft_nll",
)
"""What is kept of every token, float64 [n] for each text:
kl: KL(p ‖ q) in nats; overlap: Σ min(p, q), the chance that a token drawn from q is accepted;
accept: the chance that the token which the parent wrote came from the draft: min(1, q/p), at T = 0
whether the draft finds likeliest what the parent wrote or finds likeliest on reading; top1: whether
both have the same likeliest token; entropy, confidence, margin of q (nats; likeliest; less the
second); parent_confidence: the likeliest of p; nll, draft_nll: −ln p and −ln q of the token.
p and q are at the rollout's temperature, at T = 0 at 1."""


@dataclass(frozen=True)
class Trace:
    """One draft on one rollout."""

    rollout: Rollout
    columns: dict[str, list[Array]]
    """Name → one array for each text, in the order of the rollout."""
    choice: list[NDArray[np.int64]]
    """The draft's likeliest token."""
    parent_choice: list[NDArray[np.int64]]

    @property
    def temperature(self) -> float:
        """Of the rollout."""
        return self.rollout.temperature

    def __getitem__(self, name: str) -> list[Array]:
        """A column, an array for each text."""
        return self.columns[name]

    def only(self, texts: Sequence[int]) -> Trace:
        """The same of some of the texts."""
        rollout = Rollout(
            self.rollout.temperature,
            tuple(self.rollout.prompts[i] for i in texts),
            tuple(self.rollout.tokens[i] for i in texts),
        )
        columns = {name: [values[i] for i in texts] for name, values in self.columns.items()}
        return Trace(
            rollout,
            columns,
            [self.choice[i] for i in texts],
            [self.parent_choice[i] for i in texts],
        )


def trace(
    parent: Model,
    drafts: Sequence[Model],
    rollouts: Sequence[Rollout],
    vocab: int,
    progress: Progress = lambda what, done, total: None,
) -> list[list[Trace]]:
    """One trace for each draft and rollout, [drafts][rollouts].

    vocab: ids that parent and drafts share, logits behind which are left out (padding of embeddings).
    DataError for a rollout without text, or at T = 0 not of this parent; ModelError for logits that
    are not finite.
    """
    texts = [(r, i) for r, rollout in enumerate(rollouts) for i in range(len(rollout.tokens))]
    texts = [(r, i) for r, i in texts if rollouts[r].tokens[i]]
    if not texts:
        raise DataError("the parent wrote nothing after any prompt; give other prompts")
    lengths = [len(rollouts[r].prompts[i].ids) + len(rollouts[r].tokens[i]) for r, i in texts]
    for model in (parent, *drafts):
        model.require_positions(max(lengths) - 1)
    # texts of much the same length together, so that little is padded
    order = sorted(range(len(texts)), key=lambda n: lengths[n])
    groups = list(_groups([lengths[n] - 1 for n in order], (parent, *drafts)))
    found: list[dict[tuple[int, int], dict[str, Tensor]]] = [{} for _ in drafts]
    done, total = 0, len(groups) * sum(m.units for m in (parent, *drafts))

    def tick() -> None:
        nonlocal done
        done += 1
        progress("both read", done, total)

    for start, end in groups:
        members = [texts[n] for n in order[start:end]]
        rows = [[*rollouts[r].prompts[i].ids, *rollouts[r].tokens[i]] for r, i in members]
        inputs = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, ids in enumerate(rows):
            if max(ids) >= vocab or min(ids) < 0:
                raise DataError(
                    f"token id {max(ids)} of a text is outside the {vocab} that parent and draft "
                    "share; use texts of this parent"
                )
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        spans = list(_spans(members, rollouts, vocab))
        theirs = parent.read(inputs, tick)
        for draft, into in zip(drafts, found, strict=True):
            ours = draft.read(inputs, tick)
            pairs = zip(spans, theirs(spans), ours(spans), strict=True)
            for (window, first, last), p, q in pairs:
                r, i = members[window]
                written = torch.tensor(rows[window][first + 1 : last + 1])
                part = _compare(p[:, :vocab], q[:, :vocab], written, rollouts[r].temperature)
                have = into.setdefault((r, i), {})
                for name, values in part.items():
                    have[name] = torch.cat([have[name], values]) if name in have else values
            del ours
    return [_traces(into, rollouts) for into in found]


def _groups(lengths: Sequence[int], models: Sequence[Model]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of texts, in ascending order of length, whose hidden states fit."""
    start = 0
    while start < len(lengths):
        end = start + 1
        while end < len(lengths):
            tokens = lengths[end] * (end + 1 - start)
            held = max(model.hidden_bytes(tokens) for model in models)
            padded = lengths[end] > 2 * lengths[start] and end - start >= windows_of_a_pass(
                lengths[end]
            )
            if held > _HIDDEN_BYTES or padded:
                break
            end += 1
        yield start, end
        start = end


def _spans(
    members: Sequence[tuple[int, int]], rollouts: Sequence[Rollout], vocab: int
) -> Iterator[Span]:
    most = max(1, _LOGIT_BYTES // (4 * vocab))
    for window, (r, i) in enumerate(members):
        first = len(rollouts[r].prompts[i].ids) - 1
        last = first + len(rollouts[r].tokens[i])
        for at in range(first, last, most):
            yield window, at, min(last, at + most)


def _compare(p: Tensor, q: Tensor, written: Tensor, temperature: float) -> dict[str, Tensor]:
    """Logits p and q [n, V] and the tokens [n] that the parent wrote → columns [n]."""
    scale = temperature if temperature > 0 else 1.0
    log_p, log_q = log_probs(p.float() / scale), log_probs(q.float() / scale)
    written = written.to(log_p.device)
    if not bool(torch.isfinite(log_p).all() and torch.isfinite(log_q).all()):
        raise ModelError("logits of the parent or of a draft are not finite")
    probability, drafted = log_p.exp(), log_q.exp()
    at = written[:, None]
    two = drafted.topk(2, -1)
    wanted, mine = log_p.gather(1, at)[:, 0], log_q.gather(1, at)[:, 0]
    # not two.indices: of equals, common in bfloat16, topk puts first whichever it likes
    choice, parents = log_q.argmax(-1), log_p.argmax(-1)
    best = log_p.gather(1, parents[:, None])[:, 0]
    # at T = 0 the text decides: which of two equals the parent took, it wrote. Where the parent's own
    # choice is another here, rounding made the difference (bfloat16), and to agree with it is no fault
    greedy = ((choice == written) | (choice == parents)).double()
    accept = (mine - wanted).clamp_max(0).exp() if temperature > 0 else greedy
    found = {
        "kl": (probability * (log_p - log_q)).sum(-1).clamp_min(0),
        "overlap": torch.minimum(probability, drafted).sum(-1),
        "accept": accept,
        "top1": (choice == parents).double(),
        "entropy": -(drafted * log_q).sum(-1),
        "confidence": two.values[:, 0],
        "margin": two.values[:, 0] - two.values[:, 1],
        "parent_confidence": best.exp(),
        "nll": -wanted,
        "draft_nll": -mine,
        "choice": choice,
        "parent_choice": parents,
        "strange": (best - wanted > _TIE).double(),
    }
    return {name: values.cpu() for name, values in found.items()}


def _traces(
    found: dict[tuple[int, int], dict[str, Tensor]], rollouts: Sequence[Rollout]
) -> list[Trace]:
    traces = []
    for r, rollout in enumerate(rollouts):
        kept = [i for i, tokens in enumerate(rollout.tokens) if tokens]
        columns = {
            name: [found[r, i][name].double().numpy() for i in kept]
            for name in (*COLUMNS, "strange")
        }
        strange = float(np.mean(np.concatenate(columns.pop("strange")))) if kept else 0.0
        if rollout.temperature == 0 and strange > 0.01:
            raise DataError(
                f"{strange:.0%} of the tokens of the greedy rollout are not what this parent finds "
                "likeliest: it is another model's; let this parent write one"
            )
        choices = [
            [found[r, i][name].numpy() for i in kept] for name in ("choice", "parent_choice")
        ]
        used = Rollout(
            rollout.temperature,
            tuple(rollout.prompts[i] for i in kept),
            tuple(rollout.tokens[i] for i in kept),
        )
        traces.append(Trace(used, columns, *choices))
    return traces


def perplexity(values: Sequence[Array]) -> float:
    """e to the mean of NLL columns."""
    return math.exp(float(np.mean(np.concatenate(values))))
