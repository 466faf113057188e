"""What `pq draft` prints: tables that fit 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.cli.common import titled_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantize.draft.analysis import Analysis, Drafted
    from quantize.draft.replay import Interval

_SHOWN = (2, 4, 8)
"""Lengths in the table; the page and JSON have all."""


def print_analysis(found: Analysis) -> None:
    """Print acceptance, what pays, and policies where they were replayed."""
    from rich.console import Console

    console = Console()
    m = found.measurement
    first = m.drafts[0].sampling[0]
    console.print(f"parent {m.parent}, prompts of {', '.join(m.sources)}", highlight=False)
    console.print(_acceptance(found, f"{first.texts} prompts, {first.tokens} tokens written"))
    console.print(_payment(found))
    for drafted in found.drafts:
        for entry in drafted.by_temperature:
            if entry.policies:
                console.print(_policies(drafted.figures.name, entry))
                _say_fit(console, entry)
            if entry.bursts is not None:
                console.print(_flips(drafted.figures.name, entry))
        if drafted.figures.shared_ids is not None and drafted.figures.shared_ids.note:
            console.print(f"{drafted.figures.name}: {drafted.figures.shared_ids.note}")
    _say_best(console, found)


def _say_best(console: Console, found: Analysis) -> None:
    """The answer, last: where a terminal stops scrolling."""
    from quantize.draft.analysis import best_of

    for index, entry in enumerate(found.drafts[0].by_temperature):
        best = best_of(found, index)
        said = "no draft is faster than the parent alone"
        if best is not None:
            draft, paid = best
            tokens = f"{paid.gamma} token{'s' if paid.gamma > 1 else ''} ahead"
            said = f"{draft.figures.name}, {tokens}: {paid.speed_up.value:.2f} times as fast"
        console.print(f"best at batch 1, T = {_temperature(entry)}: {said}", highlight=False)
    if any(draft.config for draft in found.drafts):
        console.print("--emit FILE writes what vLLM is told of the first draft", highlight=False)


def _table(title: str, *columns: str, texts: int = 1) -> Table:
    table = titled_table(title)
    for i, column in enumerate(columns):
        left = i < texts
        table.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=not left
        )
    return table


def _plus(found: Interval | None, digits: int) -> str:
    if found is None:
        return "-"
    error = "" if found.half is None else f"±{found.half:.{digits}f}"
    return f"{found.value:.{digits}f}{error}"


def _temperature(entry: Drafted) -> str:
    return "0" if entry.sampling.temperature == 0 else f"{entry.sampling.temperature:g}"


def _acceptance(found: Analysis, title: str) -> Table:
    table = _table(
        f"{title} at each temperature\ntokens per step of the parent at length γ",
        "draft",
        "bits",
        "T",
        "accepted",
        "KL",
        *(f"γ {g}" for g in _SHOWN),
    )
    for drafted in found.drafts:
        f = drafted.figures
        for i, entry in enumerate(drafted.by_temperature):
            s = entry.sampling
            kl = "-" if s.kl is None else f"{s.kl.value:.4f}"
            lengths = {x.gamma: x.tokens_per_step for x in s.lengths}
            steps = [_plus(lengths[g], 2) if g == 4 else f"{lengths[g].value:.2f}" for g in _SHOWN]
            bits = "-" if f.bits_per_weight is None else f"{f.bits_per_weight:.2f}"
            name = (f.name, bits) if i == 0 else ("", "")
            table.add_row(*name, _temperature(entry), _plus(s.alpha, 3), kl, *steps)
    table.caption = "accepted: of drafted tokens, each by itself. KL(parent ‖ draft): nats a token"
    table.caption_justify = "left"
    return table


def _payment(found: Analysis) -> Table:
    place = found.place
    where = (
        f"At a cost ratio of {found.cost:g}"
        if place is None
        else f"On {place.gpu.name}{f' x {place.tp}' if place.tp > 1 else ''}, {place.context} tokens "
        "a sequence (latency model)"
    )
    pays = found.drafts[0].by_temperature[0].pays
    table = _table(
        f"{where}:\nspeed-up at the best length; + does not fit the memory",
        "draft",
        "T",
        *(f"batch {pay.batch}" for pay in pays),
        *(["c", "MB", "fit"] if place is not None else ["c"]),
    )
    for drafted in found.drafts:
        for i, entry in enumerate(drafted.by_temperature):
            cells = [
                (f"{p.speed_up.value:.2f} γ{p.gamma}" if p.gamma else "none")
                + ("" if p.fits else "+")
                for p in entry.pays
            ]
            room = drafted.room
            space = (
                []
                if room is None
                else [f"{room.weights / 1e6:,.0f}", f"{room.sequences}/{room.parent_sequences}"]
            )
            shown = [f"{entry.pays[0].cost:.2f}", *space]
            name = drafted.figures.name if i == 0 else ""
            table.add_row(
                name, _temperature(entry), *cells, *(shown if i == 0 else [""] * len(shown))
            )
    if place is not None:
        table.caption = (
            "c: draft over parent step at batch 1. fit: sequences with / without the draft"
        )
        table.caption_justify = "left"
    return table


def _policies(name: str, entry: Drafted) -> Table:
    batches = [outcome.batch for outcome in entry.policies[0].batches]
    table = _table(
        f"{name}, T = {_temperature(entry)}: policies on the same outcomes",
        "policy",
        "tokens/step",
        "drafted",
        "speed-up",
        *(f"batch {b}" for b in batches),
    )
    for row in entry.policies:
        table.add_row(
            row.name,
            _plus(row.tokens_per_step, 2),
            f"{row.drafted_per_step:.2f}",
            _plus(row.speed_up, 3),
            *(f"{outcome.speed_up:.3f}" for outcome in row.batches),
        )
    return table


def _say_fit(console: Console, entry: Drafted) -> None:
    if entry.fit is None:
        console.print("fewer than 8 prompts: no policy was fitted")
        return
    f = entry.fit
    verdict = "offered" if f.wins else "not offered"
    console.print(
        f"fitted policy on prompts it was not fitted on: {_plus(f.fitted_speed_up, 3)}, "
        f"{f.static.name} {_plus(f.static_speed_up, 3)}, gain {_plus(f.gain, 3)}: {verdict}",
        highlight=False,
    )


def _flips(name: str, entry: Drafted) -> Table:
    b = entry.bursts
    assert b is not None
    table = _table(
        f"{name}, T = {_temperature(entry)}: finding flips ({b.flips:.1%} of {b.tokens} tokens)",
        "signal",
        "ROC area",
        "precision",
        "recall",
        "next token",
    )
    for x in b.detectors:
        table.add_row(
            x.name, f"{x.area:.3f}", f"{x.precision:.3f}", f"{x.recall:.3f}", f"{x.ahead:.3f}"
        )
    if b.cache_correlation is not None:
        table.caption = (
            f"KL of the parent on an INT4 cache: correlation {b.cache_correlation:+.3f} with the "
            f"draft's, area {b.cache_flip_area:.3f}"
        )
        table.caption_justify = "left"
    return table
