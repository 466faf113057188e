"""Everything `pq draft` says of a measurement: what pays, which policy, where divergence bursts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.draft.bursts import Bursts, bursts
from quantize.draft.emit import (
    accepted_at,
    length_notes,
    lengths_by_batch,
    serve_line,
    speculative_config,
)
from quantize.draft.figures import Sampling
from quantize.draft.fit import Fit, fit, signals
from quantize.draft.pays import (
    BATCHES,
    GivenCost,
    Pay,
    Place,
    Room,
    Times,
    pays,
    room,
    times,
)
from quantize.draft.policies import BatchOutcome, Costs, Outcome, play, play_batch, stories
from quantize.draft.replay import Interval
from quantize.draft.run import CACHE, DraftFigures, Measurement
from quantize.draft.trace import Trace
from quantize.plan.checkpoint import served_model
from quantize.plan.served import ServedModel
from quantize.serving.speculation.names import NAMED
from quantize.serving.speculation.policy import Policy, Static

_BATCHED = (8, 32)
"""Batch sizes that policies are replayed in."""
_TOKENS = 6000
"""Written in each such replay: its speed-up is then known to about one in a hundred."""
_COST_AT = 4
"""Length that the cost of a check is linearized at."""


@dataclass(frozen=True)
class PolicyRow:
    """One policy."""

    name: str
    tokens_per_step: Interval
    drafted_per_step: float
    speed_up: Interval
    """One sequence at a time, at the cost ratio of batch 1."""
    batches: tuple[BatchOutcome, ...]


@dataclass(frozen=True)
class Drafted:
    """One draft at one temperature."""

    sampling: Sampling
    pays: tuple[Pay, ...]
    policies: tuple[PolicyRow, ...] = ()
    fit: Fit | None = None
    """None with few texts, for prompt lookup, and where policies were not asked for."""
    signals: dict[str, tuple[float, float]] | None = None
    """See `fit.signals`."""
    bursts: Bursts | None = None
    rates: tuple[float, ...] = ()
    """Acceptance by position at the best length of batch 1."""


@dataclass(frozen=True)
class Analysed:
    """One draft."""

    figures: DraftFigures
    by_temperature: tuple[Drafted, ...]
    room: Room | None
    """None where a cost ratio was given."""
    command: str
    """`vllm serve` with the draft; empty where no length pays."""
    config: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    """What to heed when it is served so."""


@dataclass(frozen=True)
class Analysis:
    """A measurement and what follows from it."""

    measurement: Measurement
    place: Place | None
    """None where a cost ratio was given."""
    cost: float | None
    drafts: tuple[Analysed, ...]


def analyse(
    found: Measurement,
    parent: Path,
    *,
    place: Place | None = None,
    cost: float | None = None,
    policies: bool = False,
    cache: int | None = None,
    paths: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Analysis:
    """Draw the conclusions of a measurement.

    place: GPU whose times are taken, or cost: a known cost ratio of all drafts; one of them.
    policies: replay policies and look for bursts, which takes a while. cache: which draft of the
    measurement is the parent on an INT4 cache (`Settings.kv_int4`). paths: name of a draft → what
    engines are to load it from, where not from the folder that was measured.
    """
    theirs = None if place is None else served_model(parent)
    drafts = []
    for number, figures in enumerate(found.drafts):
        traces = found.traces[number] if number < len(found.traces) else ()
        folder = figures.folder
        served = None
        if folder is not None and place is not None:
            served = served_model(folder)
        by_batch, space = _times(theirs, served, folder is None, place, cost)
        most = None if space is None else space.sequences
        entries = []
        for index, sampling in enumerate(figures.sampling):
            done = number * len(figures.sampling) + index
            progress("replaying", done, len(found.drafts) * len(figures.sampling))
            paid = pays(sampling, by_batch, most)
            trace = traces[index] if traces else None
            if trace is None or not policies:
                entries.append(Drafted(sampling, paid, rates=_rates(trace, paid)))
                continue
            beside = None if cache is None or cache == number else found.traces[cache][index]
            entries.append(_drafted(sampling, paid, trace, by_batch, beside))
        drafts.append(_analysed(figures, tuple(entries), space, found, paths or {}))
    return Analysis(found, place, cost, tuple(drafts))


def _times(
    parent: ServedModel | None,
    draft: ServedModel | None,
    free: bool,
    place: Place | None,
    cost: float | None,
) -> tuple[dict[int, Times], Room | None]:
    if place is None or parent is None:
        given = GivenCost(0.0 if free or cost is None else cost)
        return {1: given}, None
    by_batch: dict[int, Times] = {b: times(parent, draft, place, b) for b in BATCHES}
    return by_batch, room(parent, draft, place)


def _rates(trace: Trace | None, paid: tuple[Pay, ...]) -> tuple[float, ...]:
    if trace is None or not paid or not paid[0].gamma:
        return ()
    return tuple(accepted_at(trace["accept"], paid[0].gamma))


def _drafted(
    sampling: Sampling,
    paid: tuple[Pay, ...],
    trace: Trace,
    by_batch: Mapping[int, Times],
    cache: Trace | None,
) -> Drafted:
    costs = {batch: t.costs(_COST_AT) for batch, t in by_batch.items()}
    one = costs[1]
    fitted = fit(trace, one)
    told = stories(trace, 2)
    statics = [Static(length.gamma) for length in sampling.lengths]
    best = max(statics, key=lambda p: play(p, told).speed_up(one).value)
    chosen: list[Policy | None] = [Static(1), best, *NAMED]
    if fitted is not None:
        chosen.append(fitted.policy)
    rows = []
    seen = set()
    for policy in (*chosen, None):
        outcome = play(policy, told)
        if outcome.name not in seen:
            seen.add(outcome.name)
            rows.append(_row(outcome, policy, told, costs))
    return Drafted(
        sampling,
        paid,
        tuple(rows),
        fitted,
        signals(trace),
        bursts(trace, cache),
        _rates(trace, paid),
    )


def _row(
    outcome: Outcome, policy: Policy | None, told: Any, costs: Mapping[int, Costs]
) -> PolicyRow:
    batched = tuple(
        play_batch(policy, told, b, costs.get(b, costs[1]), tokens=_TOKENS) for b in _BATCHED
    )
    return PolicyRow(
        outcome.name,
        outcome.per_step,
        outcome.drafted_per_step,
        outcome.speed_up(costs[1]),
        batched,
    )


def _analysed(
    figures: DraftFigures,
    entries: tuple[Drafted, ...],
    space: Room | None,
    found: Measurement,
    paths: Mapping[str, str],
) -> Analysed:
    # what is sampled is served; greedy figures where nothing else was measured
    last = entries[-1]
    ranges, most = lengths_by_batch(last.pays)
    # the parent on an INT4 cache says what the cache costs, and is nothing to serve
    if figures.name == CACHE or not any(pay.gamma for pay in last.pays):
        return Analysed(figures, entries, space, "", None)
    config = speculative_config(
        None if figures.folder is None else Path(paths.get(figures.name, figures.folder)),
        most,
        by_batch=ranges if len(ranges) > 1 else (),
        same_vocabulary=figures.same_vocabulary,
    )
    notes = tuple(length_notes(most, figures.context, found.context))
    return Analysed(figures, entries, space, serve_line(found.parent, config), config, notes)


def best_of(found: Analysis, index: int, batch: int = 1) -> tuple[Analysed, Pay] | None:
    """The draft that pays most at one batch size and the temperature of this index; None where none
    is faster than the parent alone. The parent on an INT4 cache is nothing to serve and not among
    them."""
    pairs = [
        (draft, pay)
        for draft in found.drafts
        if draft.figures.name != CACHE
        for pay in draft.by_temperature[index].pays
        if pay.batch == batch and pay.gamma
    ]
    return max(pairs, key=lambda pair: pair[1].speed_up.value, default=None)


def as_json(found: Analysis) -> dict[str, Any]:
    """JSON data of an analysis, without texts and traces."""
    m = found.measurement
    how = asdict(m.settings) | {
        "device": str(m.settings.device),
        "dtype": str(m.settings.dtype).removeprefix("torch."),
        "attention": None if m.settings.attention is None else str(m.settings.attention),
    }
    return {
        "parent": m.parent,
        "prompts": list(m.sources),
        "prompts_sha256": m.sha256,
        "vocabulary": m.vocab,
        "settings": how,
        "gpu": None
        if found.place is None
        else {
            "name": found.place.gpu.name,
            "tp": found.place.tp,
            "context": found.place.context,
        },
        "cost": found.cost,
        "drafts": [_draft_json(draft) for draft in found.drafts],
    }


def _draft_json(draft: Analysed) -> dict[str, Any]:
    f = draft.figures
    return {
        "name": f.name,
        "bits_per_weight": f.bits_per_weight,
        "kv_cache": f.kv_cache,
        "tokenizer": None if f.shared_ids is None else asdict(f.shared_ids),
        "same_vocabulary": f.same_vocabulary,
        "memory": None if draft.room is None else asdict(draft.room),
        "temperatures": [asdict(entry) for entry in draft.by_temperature],
        "speculative_config": draft.config,
        "command": draft.command,
        "notes": list(draft.notes),
    }
