"""Tables of measured figures for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.cli.common import titled_table
from quantize.pictures import place_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantize.evaluation import Evaluation
    from quantize.evaluation.task_comparison import TaskScore
    from quantize.evaluation.task_results import TaskRun
    from quantize.report.comparison import Parent, Row


def _table(title: str, *columns: str) -> Table:
    table = titled_table(title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    return table


def format_figure(value: float | None, digits: int, stderr: float | None = None) -> str:
    """A figure with its standard error, or a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _round_to_error(value: float | None, stderr: float | None) -> str:
    """A figure to two digits of its standard error, or to four digits."""
    if value is None:
        return "-"
    if not stderr:
        return f"{value:.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def print_restructuring(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    saved: float | None,
) -> None:
    """FFNs that became experts: errors on calibration tokens that nothing was fitted
    to, beside the baselines'."""
    what = "Relative squared error of converted FFNs"
    title = f"{what}, and of what they must beat at equal activation"
    if saved is not None:
        title = f"{saved:.1%} fewer activated parameters (embedding table not counted)\n{title}"
    table = _table(
        title,
        "block", "policy", "experts", "error", "pruned", "untrained", "random", "s", "MB",
    )  # fmt: skip
    for row in rows:
        peak = row.get("peak_bytes")
        errors = [row.get(f"{key}_error") for key in ("ffn", "pruned", "untrained", "random")]
        table.add_row(
            str((place_of(row["name"]) or (row["name"],))[0]),
            str(row.get("policy") or "-"),
            format_figure(row.get("mean_experts"), 2),
            *(format_figure(error, 4) for error in errors),
            format_figure(row.get("seconds"), 1),
            format_figure(None if peak is None else peak / 1e6, 0),
        )
    console.print(table)


def print_perplexity(e: Evaluation) -> None:
    """One model, and its parent where it was run too: a row per figure, so that nothing
    is cut off at 80 columns."""
    from rich.console import Console

    text = f"{e.protocol} on {e.data}\n{e.tokens} predictions in {e.windows} windows"
    title = f"{text}, {e.numerics} numerics, {e.dtype}"
    table = _table(title, "", *([f"parent {e.baseline}"] if e.baseline else []), e.model)
    both = [
        ("perplexity", e.baseline_perplexity, e.perplexity, 4),
        ("word perplexity", e.baseline_word_perplexity, e.word_perplexity, 4),
        ("byte perplexity", e.baseline_byte_perplexity, e.byte_perplexity, 4),
        ("bits per byte", e.baseline_bits_per_byte, e.bits_per_byte, 5),
    ]
    rows = []
    for name, theirs, mine, digits in both:
        rows.append((name, format_figure(theirs, digits), format_figure(mine, digits)))
    rows += [
        ("ΔNLL", "", format_figure(e.delta_nll, 5, e.delta_nll_stderr)),
        ("KLD mean", "", format_figure(e.kld_mean, 5, e.kld_stderr)),
        ("KLD median", "", format_figure(e.kld_median, 5)),
        ("KLD p90", "", format_figure(e.kld_p90, 5)),
        ("KLD p99", "", format_figure(e.kld_p99, 4)),
        ("KLD p99.9", "", format_figure(e.kld_p999, 4)),
        ("same top-1", "", format_figure(e.top1_agreement, 4, e.top1_stderr)),
        ("bits per weight", "16" if e.bits_per_weight else "", format_figure(e.bits_per_weight, 3)),
        ("KV cache", "16-bit", e.kv_cache),
        *_activated_parameters(e),
    ]
    for name, parent, ours in rows:
        if ours != "-":
            table.add_row(name, *([parent] if e.baseline else []), ours)
    Console().print(table)


def _activated_parameters(e: Evaluation) -> list[tuple[str, str, str]]:
    """What a token meets of a model with experts."""
    ours, theirs = e.activated_parameters, e.baseline_activated_parameters
    if not e.experts_visited or ours is None:
        return []
    less = "" if theirs is None else f" ({ours / theirs - 1:+.1%})"
    mean = sum(e.experts_visited.values()) / len(e.experts_visited)
    return [
        (
            "activated parameters",
            "-" if theirs is None else _millions(theirs),
            _millions(ours) + less,
        ),
        ("routed experts a token", "", f"{mean:.3f}"),
    ]


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


def print_comparison(rows: Sequence[Row], parent: Parent) -> None:
    """Models that were measured in one run, the ones that no other beats in
    bytes per token and divergence marked."""
    from rich.console import Console

    from quantize.report.comparison import activation_bits, best_of

    first = rows[0].figures
    text = f"{first.protocol} on {first.data}\n{first.tokens} predictions"
    title = f"{text}, {first.numerics} numerics, {first.dtype}"
    met = {row.figures.activated_parameters for row in rows} - {None}
    restructured = bool(met - {first.baseline_activated_parameters})
    timed = any(row.tokens_per_second is not None for row in rows)
    more = [*(["M act."] if restructured else []), *(["tok/s"] if timed else [])]
    table = _table(title, "", "bits", "act", "KV", "MB", "MB/tok", *more, "ppl", "KLD", "top-1", "")
    # Figures stay whole at 80 columns; names may go on in the next line.
    table.padding = (0, 1, 0, 0)
    for number, column in enumerate(table.columns):
        column.no_wrap = number > 0

    def millions(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value / 1e6:.{digits}f}"

    def optional(parameters: float | None, speed: float | None) -> list[str]:
        shown = [millions(parameters, 2)] if restructured else []
        return shown + ([format_figure(speed, 1)] if timed else [])

    table.add_row(
        f"parent {parent.name}",
        "16",
        "16",
        "16",
        millions(parent.bytes),
        millions(first.baseline_bytes_per_token),
        *optional(first.baseline_activated_parameters, parent.tokens_per_second),
        format_figure(first.baseline_perplexity, 3),
        "",
        "",
        "",
    )
    for row, ahead in zip(rows, best_of(rows), strict=True):
        e = row.figures
        table.add_row(
            row.name,
            format_figure(row.bits, 3),
            activation_bits(e),
            f"{e.kv_bits:.3g}",
            millions(row.bytes),
            millions(e.bytes_per_token),
            *optional(e.activated_parameters, row.tokens_per_second),
            format_figure(e.perplexity, 3),
            format_figure(e.kld_mean, 4),
            format_figure(e.top1_agreement, 3),
            "*" if ahead else "",
        )
    table.caption = "* no other has both fewer bytes per token and less divergence"
    table.caption_justify = "left"
    Console().print(table)


def print_tasks(run: TaskRun, scores: Sequence[TaskScore]) -> None:
    """Task scores; against the parent with recovery where it was run too."""
    from rich.console import Console

    title = f"{run.model}: lm-eval {run.versions.get('lm_eval', '')}, {run.numerics} numerics" + (
        f", limit {run.limit}" if run.limit else ""
    )
    if scores:
        table = _table(title, "task", "metric", "n", "parent", "model", "difference", "recovery")
        for s in scores:
            table.add_row(
                s.task,
                f"{s.metric} {'↑' if s.higher_is_better else '↓'}",
                str(s.n),
                _round_to_error(s.baseline, s.baseline_stderr),
                _round_to_error(s.value, s.stderr),
                _round_to_error(s.difference, s.difference_stderr),
                _round_to_error(s.recovery, s.recovery_stderr),
            )
    else:
        table = _table(title, "task", "metric", "n", "value")
        for task, metrics in run.tasks.items():
            for metric, facts in metrics.items():
                arrow = "↑" if facts["higher_is_better"] else "↓"
                value = _round_to_error(facts["value"], facts["stderr"])
                table.add_row(task, f"{metric} {arrow}", str(run.n_samples[task]), value)
    Console().print(table)
