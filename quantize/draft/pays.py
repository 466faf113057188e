"""What a draft pays on a GPU: its cost beside the parent's, its memory, the best length.

Times are those of `quantize.plan.latency`, bytes those of the checkpoints. A step of speculative
decoding is γ steps of the draft and one of the parent that reads γ + 1 tokens of each sequence: its
weights and caches once, its multiplications γ + 1 times. Drafts pay the host's time as the parent
does, as engines run them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from quantize.draft.figures import Sampling
from quantize.draft.policies import Costs
from quantize.draft.replay import Interval
from quantize.plan.gpus import Gpu
from quantize.plan.latency import ERRORS, Batch, StepTime
from quantize.plan.memory import engine_for, fit
from quantize.plan.served import ServedModel

BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Place:
    """Where both models run."""

    gpu: Gpu
    tp: int = 1
    context: int = 2048
    """Tokens that a sequence holds in the mean."""


@dataclass(frozen=True)
class Pay:
    """One batch size at one temperature."""

    batch: int
    cost: float
    """c: a step of the draft over a plain step of the parent."""
    gamma: int
    """The best length; 0 where none is faster than no draft."""
    speed_up: Interval
    """At that length, or of the least bad; its range is of the measurement and of the latency
    model, whose error of a step is taken to fall on the draft's cost."""
    fits: bool
    """Whether so many sequences of the context fit beside both models."""


@dataclass(frozen=True)
class Room:
    """Memory of one GPU."""

    weights: int
    """Bytes of the draft's weights."""
    kv_token: float
    """Bytes that the draft keeps of each token, beside the parent's."""
    parent_kv_token: float
    sequences: int
    """Of the context that fit with the draft."""
    parent_sequences: int
    """Without it."""


class Times(Protocol):
    """How long steps of one batch size take, in any unit."""

    @property
    def plain(self) -> float:
        """The parent, one token of each sequence."""
        ...

    @property
    def draft(self) -> float:
        """The draft, the same."""
        ...

    def speculative(self, gamma: int) -> float:
        """One step at a length."""
        ...

    def costs(self, gamma: int) -> Costs:
        """For replay of policies: the check linearized from none to γ drafted tokens."""
        ...


@dataclass(frozen=True)
class GivenCost:
    """A cost ratio that the user knows; a check takes as long as a plain step."""

    draft: float
    plain: float = 1.0

    def speculative(self, gamma: int) -> float:
        """One step at a length."""
        return gamma * self.draft + 1.0

    def costs(self, gamma: int) -> Costs:
        """For replay of policies."""
        return Costs(self.draft)


@dataclass(frozen=True)
class GpuTimes:
    """Seconds of one batch size; all sequences hold `context` tokens."""

    plain: float
    """The parent, one token of each sequence."""
    draft: float
    """The draft, the same."""
    parent: StepTime
    place: Place
    batch: int

    def speculative(self, gamma: int) -> float:
        """One step at a length."""
        return gamma * self.draft + check_seconds(self.parent, self.place, self.batch, gamma + 1)

    def costs(self, gamma: int) -> Costs:
        """For replay of policies: the check linearized from none to γ drafted tokens."""
        one, all_of_them = (
            check_seconds(self.parent, self.place, self.batch, tokens) for tokens in (1, gamma + 1)
        )
        slope = (all_of_them - one) / gamma / self.plain
        return Costs(self.draft / self.plain, one / self.plain, slope)


def check_seconds(parent: StepTime, place: Place, batch: int, tokens: int) -> float:
    """A step of the parent that reads `tokens` tokens of each sequence and gives logits of all."""
    m, n = parent.model, batch * tokens
    moved = m.read_bytes(place.tp, n) + batch * m.kv_bytes(place.context, place.tp)
    matrices = 2.0 * n * (m.parameters_per_token + m.head_parameters) / parent.rate
    scores = n * m.attention_flops(place.context, decode=True) / parent.attention_rate
    host = parent.host + parent.constants.sequence * batch
    return max(moved / parent.bandwidth, matrices + scores) + parent.link_token * n + host


def times(parent: ServedModel, draft: ServedModel | None, place: Place, batch: int) -> GpuTimes:
    """Times of a batch; draft None: one that costs nothing (prompt lookup)."""
    theirs = StepTime(parent, place.gpu, place.tp)
    work = Batch(decode_sequences=batch, decode_context_total=float(batch * place.context))
    return GpuTimes(
        theirs.seconds(work),
        0.0 if draft is None else StepTime(draft, place.gpu, place.tp).seconds(work),
        theirs,
        place,
        batch,
    )


def pays(
    sampling: Sampling, by_batch: Mapping[int, Times], most: int | None = None
) -> tuple[Pay, ...]:
    """The best length and its speed-up at each batch size.

    by_batch: times of each size. most: sequences that fit beside both models; None: not known.
    """
    return tuple(_pay(sampling, batch, t, most) for batch, t in by_batch.items())


def _pay(sampling: Sampling, batch: int, t: Times, most: int | None) -> Pay:
    best = max(sampling.lengths, key=lambda x: x.tokens_per_step.value / t.speculative(x.gamma))
    tokens, gamma = best.tokens_per_step, best.gamma
    error = ERRORS["tpot"]

    def speed(given: float | None, scale: float) -> float:
        whole = t.speculative(gamma) + (scale - 1) * gamma * t.draft
        return (tokens.value if given is None else given) * t.plain / whole

    value = speed(tokens.value, 1.0)
    around = Interval(value, speed(tokens.low, error.high), speed(tokens.high, error.low))
    fits = most is None or batch <= most
    return Pay(batch, t.draft / t.plain, gamma if value > 1 else 0, around, fits)


def room(parent: ServedModel, draft: ServedModel | None, place: Place) -> Room:
    """Memory with and without the draft; its cache stands in blocks beside the parent's."""
    engine = engine_for(place.gpu)
    alone = fit(parent, place.gpu, place.tp, engine, place.context).sequences
    theirs = parent.kv_bytes_per_token(place.tp)
    if draft is None:
        return Room(0, 0.0, theirs, alone, alone)
    both = replace(parent, parts=parent.parts + draft.parts, kv=parent.kv + draft.kv)
    together = fit(both, place.gpu, place.tp, engine, place.context).sequences
    return Room(
        draft.weights(place.tp),
        draft.kv_bytes_per_token(place.tp),
        theirs,
        together,
        alone,
    )
