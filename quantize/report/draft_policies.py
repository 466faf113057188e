"""The part of a page of drafts that is about policies of lengths and bursts of divergence."""

from __future__ import annotations

from typing import Any

from quantize.draft.analysis import Analysed, Analysis, Drafted
from quantize.draft.replay import Interval
from quantize.pictures import Lines, Table
from quantize.report.model import Section


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


def named(draft: Analysed, entry: Drafted) -> str:
    """A draft on one text."""
    return f"{draft.figures.name}, {temperature(entry)}"


def policies_of(found: Analysis) -> list[Section]:
    """How policies of lengths compare; nothing where they were not replayed."""
    entries = [(d, e) for d in found.drafts for e in d.by_temperature if e.policies]
    if not entries:
        return []
    items: list[Any] = []
    for d, e in entries:
        batches = [outcome.batch for outcome in e.policies[0].batches]
        items.append(
            Table(
                named(d, e),
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
                    f"What foretells acceptance: {named(d, e)}",
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


def bursts_of(found: Analysis) -> list[Section]:
    """Where divergence bursts, and whether that finds flips; nothing where it was not looked for."""
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
                f"Flips found: {named(d, e)}",
                f"Of {b.tokens} tokens {b.flips:.1%} flip, which is the precision of chance.{said}",
                ("signal", "ROC area", "precision", "recall", "area, next token"),
                [(x.name, x.area, x.precision, x.recall, x.ahead) for x in b.detectors],
                ("", ".3f", ".3f", ".3f", ".3f"),
            )
        )
        curves = {name: values for name, values in b.curves.items() if name != "wvir"}
        items.append(
            Lines(
                f"One text: {named(d, e)}",
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
