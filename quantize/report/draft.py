"""Draft models on one page: acceptance, what it pays, policies, where divergence bursts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantize.draft.analysis import Analysed, Analysis, Drafted
from quantize.draft.replay import Interval
from quantize.pictures import Bars, Lines, Table
from quantize.report.model import Headline, Listing, Note, Passages, Report, Section, Token

_SHOWN = 12
"""Of the worst places: as many as a person reads."""


def draft_page(found: Analysis, version: str) -> Report:
    """Make a page of an analysis."""
    m = found.measurement
    first = m.drafts[0].sampling[0]
    pairs = [(draft, entry) for draft in found.drafts for entry in draft.by_temperature]
    best = max(pairs, key=lambda pair: pair[1].pays[0].speed_up.value)
    paid = best[1].pays[0]
    where = _where(found)
    headlines = [
        Headline("Drafts", str(len(m.drafts)), f"of {m.parent}", len(m.drafts)),
        Headline(
            "Best at batch 1",
            f"{paid.speed_up.value:.2f}x" if paid.gamma else "none",
            f"{best[0].figures.name}, {temperature(best[1])}, {paid.gamma} tokens; {where}",
            paid.speed_up.value,
        ),
    ]
    basis = (
        f"{first.texts} prompts of {', '.join(m.sources)}; the parent wrote {first.tokens} tokens at "
        f"{temperature(best[1]) if len(m.settings.temperatures) == 1 else 'each temperature'}; "
        f"{m.settings.numerics} numerics; intervals are 95 %, prompts being independent"
    )
    sections = [
        _acceptance(found),
        _payment(found, where),
        *_policies(found),
        *_bursts(found),
        _places(found),
        _served(found),
    ]
    return Report("Draft models", f"of {m.parent}", version, headlines, basis, (), sections)


def temperature(entry: Drafted) -> str:
    """How the text was written."""
    t = entry.sampling.temperature
    return "greedy" if t == 0 else f"T = {t:g}"


def with_error(found: Interval | None, digits: int = 3) -> str | None:
    """A figure and half its interval."""
    if found is None:
        return None
    error = "" if found.half is None else f" ± {found.half:.{digits}f}"
    return f"{found.value:.{digits}f}{error}"


def _where(found: Analysis) -> str:
    if found.place is None:
        return f"at a cost ratio of {found.cost:g}"
    several = f" x {found.place.tp}" if found.place.tp > 1 else ""
    return f"{found.place.gpu.name}{several}, {found.place.context} tokens a sequence"


def _named(draft: Analysed, entry: Drafted) -> str:
    return f"{draft.figures.name}, {temperature(entry)}"


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
    curves = Lines(
        "Tokens per step",
        "Replayed on the parent's own text; one token is what the parent gives without a draft.",
        gammas,
        {_named(d, e): [x.tokens_per_step.value for x in e.sampling.lengths] for d, e in entries},
        "γ, drafted tokens of a step",
        "tokens per step",
    )
    known = [(d, e) for d, e in entries if e.sampling.by_position]
    starts = known[0][1].sampling.by_position["start"] if known else []
    alike = [(d, e) for d, e in known if e.sampling.by_position["start"] == starts]
    positions = Lines(
        "Acceptance by position",
        "Means over stretches of the written text.",
        starts,
        {_named(d, e): e.sampling.by_position["alpha"] for d, e in alike},
        "tokens written before",
        "acceptance",
    )
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
    items: list[Any] = [curves, *([positions] if alike else []), table, domains]
    return Section("acceptance", "Acceptance", lead, items)


def _payment(found: Analysis, where: str) -> Section:
    entries = [(d, e) for d in found.drafts for e in d.by_temperature]
    batches = [pay.batch for pay in entries[0][1].pays]
    rows = [
        (
            d.figures.name,
            temperature(e),
            pay.batch,
            pay.cost,
            pay.gamma if pay.gamma else "none",
            f"{pay.speed_up.value:.2f} ({pay.speed_up.low:.2f} to {pay.speed_up.high:.2f})",
            "yes" if pay.fits else "no",
        )
        for d, e in entries
        for pay in e.pays
    ]
    table = Table(
        "What it pays",
        "c is a step of the draft over one of the parent. The range holds the interval of tokens per "
        "step and the error of the latency model.",
        ("draft", "text", "batch", "c", "best γ", "speed-up", "fits"),
        rows,
        ("", "", "", ".3f", "", "", ""),
    )
    items: list[Any] = []
    if len(batches) > 1:
        items.append(
            Lines(
                "Speed-up over batch",
                "At the best length of each batch size; below 1 a draft costs time.",
                batches,
                {_named(d, e): [pay.speed_up.value for pay in e.pays] for d, e in entries},
                "sequences at once",
                "speed-up",
                log_x=True,
            )
        )
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
    return Section("pays", "What it pays", where, [*items, table])


def _policies(found: Analysis) -> list[Section]:
    entries = [(d, e) for d in found.drafts for e in d.by_temperature if e.policies]
    if not entries:
        return []
    items: list[Any] = []
    for d, e in entries:
        batches = [outcome.batch for outcome in e.policies[0].batches]
        items.append(
            Table(
                _named(d, e),
                _fit_said(e),
                ("policy", "tokens/step", "drafted", "speed-up", *(f"batch {b}" for b in batches)),
                [
                    (
                        row.name,
                        with_error(row.tokens_per_step, 2),
                        row.drafted_per_step,
                        with_error(row.speed_up),
                        *(outcome.speed_up for outcome in row.batches),
                    )
                    for row in e.policies
                ],
                ("", "", ".2f", "", *[".3f"] * len(batches)),
            )
        )
        if e.signals:
            items.append(
                Table(
                    f"What foretells acceptance: {_named(d, e)}",
                    "Correlation with the acceptance of the very token, and with the number accepted "
                    "of the next six.",
                    ("signal", "this token", "next 6"),
                    [(name, *values) for name, values in e.signals.items()],
                    ("", "+.3f", "+.3f"),
                )
            )
    lead = (
        "All policies meet the same outcomes. In a batch a step lasts as long as its longest draft, so "
        "that sequences with unequal lengths wait for one another."
    )
    return [Section("policies", "How far to look ahead", lead, items)]


def _fit_said(entry: Drafted) -> str:
    f = entry.fit
    if f is None:
        return "Too few prompts to fit a policy."
    verdict = "it is offered" if f.wins else "it is not offered"
    return (
        f"On prompts that it was not fitted on the fitted policy gains "
        f"{with_error(f.gain)} over {f.static.name} ({f.static_speed_up.value:.3f}): {verdict}."
    )


def _bursts(found: Analysis) -> list[Section]:
    entries = [(d, e) for d in found.drafts for e in d.by_temperature if e.bursts is not None]
    if not entries:
        return []
    items: list[Any] = []
    for d, e in entries:
        b = e.bursts
        assert b is not None
        said = (
            ""
            if b.cache_correlation is None
            else (
                f" KL of the parent on an INT4 cache correlates {b.cache_correlation:+.3f} with it, token "
                f"by token (area against flips {b.cache_flip_area:.3f})."
            )
        )
        items.append(
            Table(
                f"Flips found: {_named(d, e)}",
                f"Of {b.tokens} tokens {b.flips:.1%} flip, which is the precision of chance.{said}",
                ("signal", "ROC area", "precision", "recall", "area, next token"),
                [(x.name, x.area, x.precision, x.recall, x.ahead) for x in b.detectors],
                ("", ".3f", ".3f", ".3f", ".3f"),
            )
        )
        curves = {name: values for name, values in b.curves.items() if name != "wvir"}
        items.append(
            Lines(
                f"One text: {_named(d, e)}",
                "The text of the largest burst; flips are 1.",
                list(range(len(b.curves["kl"]))),
                curves | {"WVIR / 10": [value / 10 for value in b.curves["wvir"]]},
                "tokens written before",
                "nats",
            )
        )
    lead = (
        "A signal flags the tenth of tokens where it is largest. ROC area .5 is chance. KL is known "
        "only where both models ran; margin and entropy are the draft's own."
    )
    return [Section("bursts", "Bursts of divergence", lead, items)]


def _places(found: Analysis) -> Section:
    items: list[Any] = []
    for d in found.drafts:
        for e in d.by_temperature:
            if e.sampling.worst:
                items.append(
                    Passages(
                        _named(d, e),
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
        Listing(d.figures.name, "For vLLM 0.32.", d.command) for d in found.drafts if d.command
    ]
    none = Note("No draft is faster than the parent alone here; there is nothing to serve.")
    return Section("serve", "Serve it", "", listings or [none])
