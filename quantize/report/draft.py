"""Draft models on one page: acceptance, what it pays, policies, where divergence bursts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantize.draft.analysis import Analysed, Analysis, Drafted, best_of
from quantize.draft.run import CACHE, LOOKUP
from quantize.pictures import Bars, Lines, Table
from quantize.report.draft_policies import (
    bursts_of,
    named,
    policies_of,
    temperature,
    with_error,
)
from quantize.report.model import Headline, Listing, Note, Passages, Report, Section, Token

_SHOWN = 12
"""Of the worst places: as many as a person reads."""


def draft_page(found: Analysis, version: str) -> Report:
    """Make a page of an analysis."""
    m = found.measurement
    first = m.drafts[0].sampling[0]
    where = _where(found)
    entries = found.drafts[0].by_temperature
    count = sum(d.name not in (LOOKUP, CACHE) for d in m.drafts)
    headlines = [
        Headline("Drafts", str(count), f"of {m.parent}, beside {LOOKUP}", count),
        *(_best(found, index, entry, where) for index, entry in enumerate(entries)),
    ]
    basis = (
        f"{first.texts} prompts of {', '.join(m.sources)}; the parent wrote {first.tokens} tokens at "
        f"{temperature(entries[0]) if len(entries) == 1 else 'each temperature'}; "
        f"{m.settings.numerics} numerics; intervals are 95 %, prompts being independent"
    )
    sections = [
        _acceptance(found),
        _payment(found, where),
        *policies_of(found),
        *bursts_of(found),
        _places(found),
        _served(found),
    ]
    return Report("Draft models", f"of {m.parent}", version, headlines, basis, (), sections)


def _best(found: Analysis, index: int, entry: Drafted, where: str) -> Headline:
    name = f"Best at batch 1, {temperature(entry)}"
    best = best_of(found, index)
    if best is None:
        return Headline(name, "none", f"no draft is faster than the parent alone; {where}", None)
    draft, paid = best
    value = paid.speed_up.value
    tokens = f"{paid.gamma} token{'s' if paid.gamma > 1 else ''} ahead"
    return Headline(name, f"{value:.2f}x", f"{draft.figures.name}, {tokens}; {where}", value)


def _where(found: Analysis) -> str:
    if found.place is None:
        return f"at a cost ratio of {found.cost:g}"
    several = f" x {found.place.tp}" if found.place.tp > 1 else ""
    return f"{found.place.gpu.name}{several}, {found.place.context} tokens a sequence"


def _acceptance(found: Analysis) -> Section:
    entries = [(d, e) for d in found.drafts for e in d.by_temperature]
    gammas = [length.gamma for length in entries[0][1].sampling.lengths]
    rows = [
        (
            d.figures.name,
            d.figures.bits_per_weight,
            temperature(e),
            with_error(e.sampling.alpha),
            with_error(e.sampling.kl, 4),
            with_error(e.sampling.top1),
            *(e.sampling.length(g).tokens_per_step.value for g in gammas if g in (1, 2, 4, 8)),
        )
        for d, e in entries
    ]
    shown = [g for g in gammas if g in (1, 2, 4, 8)]
    table = Table(
        "Acceptance",
        "Acceptance is Σ min(p, q), greedy the share of equal likeliest tokens; KL(parent ‖ draft) in "
        "nats; then tokens per step of the parent.",
        ("draft", "bits", "text", "acceptance", "KL", "same top-1", *(f"γ {g}" for g in shown)),
        rows,
        ("", ".3f", "", "", "", "", *[".2f"] * len(shown)),
    )
    curves = [
        Lines(
            f"Tokens per step, {how}",
            "Replayed on the parent's own text; one token is what the parent gives without a draft.",
            gammas,
            {
                d.figures.name: [x.tokens_per_step.value for x in e.sampling.lengths]
                for d, e in alike
            },
            "γ, drafted tokens of a step",
            "tokens per step",
        )
        for how, alike in _by_temperature(found)
    ]
    positions = [
        Lines(
            f"Acceptance by position, {how}",
            "Means over stretches of the written text.",
            known[0][1].sampling.by_position["start"],
            {d.figures.name: e.sampling.by_position["alpha"] for d, e in known},
            "tokens written before",
            "acceptance",
        )
        for how, alike in _by_temperature(found)
        if (known := [(d, e) for d, e in alike if e.sampling.by_position])
    ]
    domains = Table(
        "By data set",
        "",
        ("draft", "text", "data", "prompts", "acceptance", "KL", "γ 4"),
        [
            (
                d.figures.name,
                temperature(e),
                x.name,
                x.texts,
                with_error(x.alpha),
                with_error(x.kl, 4),
                next((with_error(n.tokens_per_step, 2) for n in x.lengths if n.gamma == 4), None),
            )
            for d, e in entries
            for x in e.sampling.domains
        ],
    )
    lead = (
        "Speculative decoding gives text distributed as the parent's, whatever the draft: one text of "
        "the parent and one pass of each draft over it say how many drafted tokens are accepted."
    )
    several = any(len(e.sampling.domains) > 1 for _, e in entries)
    items: list[Any] = [*curves, *positions, table, *([domains] if several else [])]
    return Section("acceptance", "Acceptance", lead, items)


def _by_temperature(found: Analysis) -> list[tuple[str, list[tuple[Analysed, Drafted]]]]:
    """What belongs in one picture: all drafts on the same text, whose curves can be told apart."""
    return [
        (temperature(entry), [(d, d.by_temperature[index]) for d in found.drafts])
        for index, entry in enumerate(found.drafts[0].by_temperature)
    ]


def _payment(found: Analysis, where: str) -> Section:
    entries = [(d, e) for d in found.drafts for e in d.by_temperature]
    batches = [pay.batch for pay in entries[0][1].pays]
    rows = [
        (
            d.figures.name,
            temperature(e),
            pay.batch,
            pay.gamma if pay.gamma else "none",
            f"{pay.speed_up.value:.2f} ({pay.speed_up.low:.2f} to {pay.speed_up.high:.2f})",
            pay.cost,
            "yes" if pay.fits else "no",
        )
        for d, e in entries
        for pay in e.pays
    ]
    table = Table(
        "What it pays",
        "c is a step of the draft over one of the parent. The range holds the interval of tokens per "
        "step and the error of the latency model.",
        ("draft", "text", "batch", "best γ", "speed-up", "c", "fits"),
        rows,
        ("", "", "", "", "", ".3f", ""),
    )
    items: list[Any] = []
    if len(batches) > 1:
        items += [
            Lines(
                f"Speed-up over batch, {how}",
                "At the best length of each batch size; below 1 a draft costs time.",
                batches,
                {d.figures.name: [pay.speed_up.value for pay in e.pays] for d, e in alike},
                "sequences at once",
                "speed-up",
                log_x=True,
            )
            for how, alike in _by_temperature(found)
        ]
    spaces = [(d.figures.name, d.room) for d in found.drafts if d.room is not None]
    if spaces:
        items.append(
            Bars(
                "Sequences that fit",
                "A draft keeps weights and a cache of its own beside the parent's.",
                [name for name, _ in spaces],
                {
                    "alone": [space.parent_sequences for _, space in spaces],
                    "with the draft": [space.sequences for _, space in spaces],
                },
                "sequences",
            )
        )
        columns = ("draft", "weights, MB", "KV bytes a token", "parent's", "fit", "without it")
        items.append(
            Table(
                "Memory of a GPU",
                "",
                columns,
                [
                    (
                        name,
                        s.weights / 1e6,
                        s.kv_token,
                        s.parent_kv_token,
                        s.sequences,
                        s.parent_sequences,
                    )
                    for name, s in spaces
                ],
                ("", ",.1f", ",.0f", ",.0f", "", ""),
            )
        )
    return Section("pays", "What it pays", where, [table, *items])


def _places(found: Analysis) -> Section:
    items: list[Any] = []
    for d in found.drafts:
        for e in d.by_temperature:
            if e.sampling.worst:
                items.append(
                    Passages(
                        named(d, e),
                        "Tokens of the parent where the draft is furthest from it.",
                        [_token(place) for place in e.sampling.worst[:_SHOWN]],
                        folded=True,
                    )
                )
    return Section("places", "Where the draft fails", "", items or [Note("No draft was run.")])


def _token(place: dict[str, Any]) -> Token:
    return Token(
        place["text"],
        place["position"],
        place["before"],
        place["token"],
        place["after"],
        place["kl"],
        place["probability"],
        place["parent_probability"],
        place["draft_choice"],
        place["parent_choice"],
    )


def _served(found: Analysis) -> Section:
    listings: Sequence[Any] = [
        Listing(d.figures.name, f"For vLLM 0.32: {'; '.join(d.notes)}.", d.command)
        for d in found.drafts
        if d.command
    ]
    none = Note("No draft is faster than the parent alone here; there is nothing to serve.")
    return Section("serve", "Serve it", "", listings or [none])
