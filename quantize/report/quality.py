"""Sections on what evaluations found: perplexity, divergence from the
parent, tasks, the worst tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from quantize.evaluation.held_out import sentence
from quantize.pictures import Cell, Histogram, Lines, Table
from quantize.report.evaluations import evaluation_tables, with_error
from quantize.report.model import (
    Group,
    Item,
    Note,
    Passages,
    Section,
    Token,
    items,
    mapping,
    number,
    text,
)
from quantize.report.sources import Sources

Data = Mapping[str, Any]

_EVALUATE = "pq eval {} --baseline {}"
_RUN_TASKS = "pq eval {} --baseline {} --tasks arc_easy,piqa"
_PICTURED = 6  # evaluations whose curves are drawn; the table has all of them
_TOKENS = 10  # of an evaluation's worst; more would hide the tables below them
_GLOSSARY = (
    "Perplexity is exp of the mean negative log-likelihood (NLL) of a token. KLD is KL(parent ‖ "
    "model) of the next-token distributions, in nats, and same top-1 the share of tokens where "
    "both models' likeliest token is the same; both need no reference text to be right and see "
    "damage long before perplexity does. ± is one standard error."
)
_TASKS = (
    "Recovery is the model's value over the parent's, or the parent's over the model's where less "
    "is better; 1 is no loss. Errors of comparison are those of differences paired by document. ± "
    "is one standard error."
)


def basis(data: Data) -> str:
    """Protocol, data, tokens and numerics of one evaluation, in one line."""
    tokens, windows = number(data, "tokens"), number(data, "windows")
    parts = [text(data, "protocol"), text(data, "data")]
    parts += [f"{windows:,.0f} windows" if windows is not None else ""]
    parts += [f"{tokens:,.0f} predicted tokens" if tokens is not None else ""]
    parts += [
        f"{text(data, 'numerics')} numerics" if text(data, "numerics") else "",
        text(data, "dtype"),
    ]
    parts += [f"parent {text(data, 'baseline')}" if text(data, "baseline") else "no parent"]
    return ", ".join(part for part in parts if part)


def headline_evaluation(evaluations: Mapping[str, Data]) -> Data | None:
    """The evaluation that speaks for the conversion: against the parent, in the kernel's
    numerics, on most tokens."""
    return next(iter(_leading_first(evaluations)), None)


def _leading_first(evaluations: Mapping[str, Data]) -> list[Data]:
    def rank(data: Data) -> tuple[bool, bool, float]:
        return (
            bool(text(data, "baseline")),
            text(data, "numerics") == "kernel",
            number(data, "tokens") or 0.0,
        )

    return sorted(evaluations.values(), key=rank, reverse=True)


def quality(sources: Sources) -> Section:
    """Table of all saved evaluations, and perplexity and divergence by position."""
    found = sources.evaluations
    shown: list[Item] = list(_look(mapping(sources.provenance, "held_out")))
    if found:
        shown += evaluation_tables(_leading_first(found))
        if any(number(data, "bits_per_byte") is not None for data in found.values()):
            shown.append(_by_text(_leading_first(found)))
        for i, data in enumerate(_leading_first(found)[:_PICTURED]):
            shown += _distribution(data)
            shown += _by_position(data, folded=i > 0)
    if not any(text(data, "baseline") for data in found.values()):
        what = "comparison with the parent" if found else "evaluation"
        command = _EVALUATE.format(sources.command_path, sources.parent_path)
        shown.append(Note(f"No {what} has been saved.", command))
    return Section("quality", "Quality", _GLOSSARY if found else "", shown)


def _look(data: Data) -> Iterator[Note]:
    """What the conversion itself saw on windows that calibration did not use."""
    if reason := text(data, "not_measured"):
        yield Note(f"When it was made: quality was not measured, {reason}.")
        return
    names = ("kld_mean", "top1_agreement", "tokens", "windows", "seqlen")
    if any(number(data, name) is None for name in names):
        return
    error = number(data, "kld_stderr")
    told: dict[str, Any] = {name: number(data, name) for name in names}
    told |= {"kld_stderr": error, "size": text(data, "size")}
    told["tokens"] = int(told["tokens"])
    where = f"{told['windows']:.0f} windows of {told['seqlen']:.0f}, {text(data, 'text')}"
    yield Note(f"When it was made: {sentence(told)}. {where}; {text(data, 'measured')}.")


def _by_text(found: Sequence[Data]) -> Table:
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    columns = ["protocol", "data", "numerics"]
    for name in ("word perplexity", "byte perplexity", "bits per byte"):
        columns += [name, "parent"]
    rows: list[list[Cell]] = []
    for data in found:
        if number(data, "bits_per_byte") is not None:
            row: list[Cell] = [text(data, key) for key in ("protocol", "data", "numerics")]
            for name in names:
                row += [number(data, name), number(data, f"baseline_{name}")]
            rows.append(row)
    formats = ("", "", "", ".3f", ".3f", ".4f", ".4f", ".4f", ".4f")
    caption = (
        "Rolling protocol only: the same log-likelihoods per word and per UTF-8 byte, in which the "
        "tokenizer plays no part."
    )
    return Table("Per word and per byte", caption, columns, rows, formats)


def _distribution(data: Data) -> Iterator[Histogram]:
    """How the divergences of tokens are spread, where the evaluation says it."""
    found = mapping(data, "kld_histogram")
    edges = [number({"": edge}, "") for edge in items(found, "edges")]
    counts = [number({"": count}, "") for count in items(found, "counts")]
    known = [edge for edge in edges if edge is not None and edge > 0]
    if not counts or len(known) != len(counts) + 1 or known != sorted(set(known)):
        return
    used = [i for i, count in enumerate(counts) if count]
    if not used:
        return
    first, end = used[0], used[-1] + 1
    marks = [number(data, key) for key in ("kld_median", "kld_mean", "kld_p99")]
    points = [mark for mark in marks if mark is not None and mark > 0]
    yield Histogram(
        "KL divergence of single tokens",
        f"{basis(data)}. Dashed from the left: median, mean and 99th percentile, by size.",
        known[first : end + 1],
        counts[first:end],
        sorted(points),
        "KL(parent ‖ model) of a token, nats",
        "tokens",
        log_x=True,
    )


def _by_position(data: Data, folded: bool) -> Iterator[Group]:
    curves = mapping(data, "by_position")
    start = [number({"": x}, "") or 0.0 for x in items(curves, "start")]

    def curve(key: str) -> list[float | None] | None:
        values = items(curves, key)
        if len(values) != len(start) or not values:
            return None
        found = [number({"": value}, "") for value in values]
        return found if any(value is not None for value in found) else None

    perplexity = {
        name: [None if v is None else math.exp(min(v, 700.0)) for v in values]
        for name, key in (("model", "nll"), ("parent", "baseline_nll"))
        if (values := curve(key)) is not None
    }
    drawn: list[Lines] = []
    gaps = [b - a for a, b in pairwise(start)]
    # stretches that grow; equal ones would crowd at the end
    log = bool(gaps) and max(gaps) > 4 * min(gaps)
    label = "position in the window (start of a stretch)"
    if perplexity:
        drawn.append(Lines("Perplexity", "", start, perplexity, label, "perplexity", log, True))
    if (kld := curve("kld")) is not None:
        drawn.append(Lines("KLD", "", start, {"model": kld}, label, "KLD, nats", log))
    if drawn:
        yield Group(
            "By position in the window",
            basis(data) + ". Means over stretches.",
            drawn,
            folded,
        )


def tokens(sources: Sources) -> Section:
    """Tokens of the largest divergence in their context."""
    found = [data for data in _leading_first(sources.evaluations) if items(data, "worst")]
    lead = (
        "Where model and parent disagree most. The marked token is the text's own; probabilities "
        "are those that each model gave to it."
    )
    shown: list[Item] = []
    for i, data in enumerate(found[:_PICTURED]):
        entries = items(data, "worst")[:_TOKENS]
        worst = [_token(entry) for entry in entries if isinstance(entry, dict)]
        shown.append(Passages("Largest KLD", basis(data) + ".", worst, folded=i > 0))
    if not found:
        lead = ""
        shown.append(
            Note(
                "No comparison with the parent has been saved.",
                _EVALUATE.format(sources.command_path, sources.parent_path),
            )
        )
    return Section("tokens", "Worst tokens", lead, shown)


def _token(entry: Data) -> Token:
    def probability(key: str) -> float | None:
        nll = number(entry, key)
        return None if nll is None else math.exp(-min(max(nll, 0.0), 700.0))

    window, position = number(entry, "window"), number(entry, "position")
    return Token(
        window=None if window is None else int(window),
        position=None if position is None else int(position),
        before=text(entry, "before"),
        token=text(entry, "token"),
        after=text(entry, "after"),
        kld=number(entry, "kld"),
        probability=probability("nll"),
        parent_probability=probability("baseline_nll"),
        choice=text(entry, "top1"),
        parent_choice=text(entry, "baseline_top1"),
    )


def tasks(sources: Sources) -> Section:
    """One table for every saved run of tasks."""
    shown: list[Item] = [_task_table(data) for data in sources.tasks.values()]
    if not shown:
        command = _RUN_TASKS.format(sources.command_path, sources.parent_path)
        shown.append(Note("No tasks have been run.", command))
    return Section("tasks", "Tasks", _TASKS if sources.tasks else "", shown)


def _task_table(data: Data) -> Table:
    versions = mapping(data, "versions")
    shots = number(data, "num_fewshot")
    said = [f"lm-eval {text(versions, 'lm_eval')}" if text(versions, "lm_eval") else "lm-eval"]
    said += ["shots as the task says" if shots is None else f"{shots:.0f}-shot"]
    limit = text(data, "limit")
    said += [f"at most {limit} documents a task" if limit else "all documents"]
    said += ["chat template" if data.get("chat_template") is True else "no chat template"]
    said += [
        f"{text(data, 'numerics')} numerics" if text(data, "numerics") else "",
        text(data, "dtype"),
    ]
    said += [f"parent {text(data, 'baseline')}" if text(data, "baseline") else ""]
    caption = ", ".join(part for part in said if part) + "."
    scores = [score for score in items(data, "scores") if isinstance(score, dict)]
    if scores:
        columns: Sequence[str] = (
            "task",
            "metric",
            "documents",
            "value",
            "parent",
            "difference",
            "recovery",
        )
        rows: list[list[Cell]] = [_score(score) for score in scores]
        return Table(
            text(data, "model", "Tasks"),
            caption,
            columns,
            rows,
            ("", "", ",.0f", "", "", "", ""),
        )
    counts = mapping(data, "n_samples")
    rows = [
        [task, metric, number(counts, task), with_error(found, "value", "stderr", 4)]
        for task, metrics in mapping(data, "tasks").items()
        if isinstance(metrics, dict)
        for metric, found in metrics.items()
        if isinstance(found, dict)
    ]
    columns = ("task", "metric", "documents", "value")
    return Table(
        text(data, "model", "Tasks"),
        caption + " The parent was not run.",
        columns,
        rows,
        ("", "", ",.0f", ""),
    )


def _score(score: Data) -> list[Cell]:
    return [
        text(score, "task"),
        text(score, "metric"),
        number(score, "n"),
        with_error(score, "value", "stderr", 4),
        with_error(score, "baseline", "baseline_stderr", 4),
        with_error(score, "difference", "difference_stderr", 4),
        with_error(score, "recovery", "recovery_stderr", 4),
    ]
