"""Tables of measured figures for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.pictures import place_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantize.evaluate import Evaluation
    from quantize.evaluate.task_comparison import TaskScore
    from quantize.evaluate.task_results import TaskRun


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    return table


def shown(value: float | None, digits: int, stderr: float | None = None) -> str:
    """A figure with its standard error, or a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _rounded(value: float | None, stderr: float | None) -> str:
    """A figure to two digits of its standard error, or to four digits."""
    if value is None:
        return "-"
    if not stderr:
        return f"{value:.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def print_restructured(console: Console, rows: Sequence[Mapping[str, Any]], saved: float | None) -> None:
    """FFNs that became experts: errors on calibration tokens that nothing was fitted to, beside the baselines'."""
    title = "" if saved is None else f"{saved:.1%} fewer activated parameters (embedding table not counted)\n"
    table = _table(
        f"{title}Relative squared error of converted FFNs, and of what they must beat at equal activation",
        "block", "policy", "experts", "error", "pruned", "untrained", "random", "s", "MB",
    )  # fmt: skip
    for row in rows:
        peak = row.get("peak_bytes")
        table.add_row(
            str((place_of(row["name"]) or (row["name"],))[0]),
            str(row.get("policy") or "-"),
            shown(row.get("mean_experts"), 2),
            *(shown(row.get(f"{key}_error"), 4) for key in ("ffn", "pruned", "untrained", "random")),
            shown(row.get("seconds"), 1),
            shown(None if peak is None else peak / 1e6, 0),
        )
    console.print(table)


def print_perplexity(e: Evaluation) -> None:
    """One model, and its parent where it was run too: a row per figure, so that nothing is cut off at 80 columns."""
    from rich.console import Console

    title = f"{e.protocol} on {e.data}\n{e.tokens} predictions in {e.windows} windows, {e.numerics} numerics, {e.dtype}"
    table = _table(title, "", *([f"parent {e.baseline}"] if e.baseline else []), e.model)
    rows = [
        ("perplexity", shown(e.baseline_perplexity, 4), shown(e.perplexity, 4)),
        ("word perplexity", shown(e.baseline_word_perplexity, 4), shown(e.word_perplexity, 4)),
        ("byte perplexity", shown(e.baseline_byte_perplexity, 4), shown(e.byte_perplexity, 4)),
        ("bits per byte", shown(e.baseline_bits_per_byte, 5), shown(e.bits_per_byte, 5)),
        ("Δ log-likelihood", "", shown(None if e.delta_nll is None else -e.delta_nll, 5, e.delta_nll_stderr)),
        ("KLD mean", "", shown(e.kld_mean, 5, e.kld_stderr)),
        ("KLD median", "", shown(e.kld_median, 5)),
        ("KLD p90", "", shown(e.kld_p90, 5)),
        ("KLD p99", "", shown(e.kld_p99, 4)),
        ("KLD p99.9", "", shown(e.kld_p999, 4)),
        ("same top-1", "", shown(e.top1_agreement, 4, e.top1_stderr)),
        ("bits per weight", "16" if e.bits_per_weight else "", shown(e.bits_per_weight, 3)),
        ("KV cache", "16-bit", e.kv_cache),
        *_activated(e),
    ]
    for name, parent, ours in rows:
        if ours != "-":
            table.add_row(name, *([parent] if e.baseline else []), ours)
    Console().print(table)


def _activated(e: Evaluation) -> list[tuple[str, str, str]]:
    """What a token meets of a model with experts."""
    ours, theirs = e.activated_parameters, e.baseline_activated_parameters
    if not e.experts_visited or ours is None:
        return []
    less = "" if theirs is None else f" ({ours / theirs - 1:+.1%})"
    mean = sum(e.experts_visited.values()) / len(e.experts_visited)
    return [
        ("activated parameters", "-" if theirs is None else _millions(theirs), _millions(ours) + less),
        ("routed experts a token", "", f"{mean:.3f}"),
    ]


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


def print_comparison(evaluations: Sequence[Evaluation], sizes: Sequence[int]) -> None:
    """Models that were measured in one run, the ones that no other beats in bits and divergence marked."""
    from rich.console import Console

    from quantize.report.comparison import front

    first = evaluations[0]
    title = f"{first.protocol} on {first.data}\n{first.tokens} predictions, {first.numerics} numerics, {first.dtype}"
    table = _table(title, "", "bits", "MB", "perplexity", "KLD", "KLD p99", "top-1", "")
    table.add_row(f"parent {first.baseline}", "16", "", shown(first.baseline_perplexity, 3), "", "", "", "")
    best = front([(e.bits_per_weight or 16.0, e.kld_mean or 0.0) for e in evaluations])
    for e, size, ahead in zip(evaluations, sizes, best, strict=True):
        table.add_row(
            e.model,
            shown(e.bits_per_weight, 3),
            f"{size / 1e6:.1f}",
            shown(e.perplexity, 3),
            shown(e.kld_mean, 5),
            shown(e.kld_p99, 4),
            shown(e.top1_agreement, 4),
            "*" if ahead else "",
        )
    table.caption, table.caption_justify = "* no other has both fewer bits and less divergence", "left"
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
                _rounded(s.baseline, s.baseline_stderr),
                _rounded(s.value, s.stderr),
                _rounded(s.difference, s.difference_stderr),
                _rounded(s.recovery, s.recovery_stderr),
            )
    else:
        table = _table(title, "task", "metric", "n", "value")
        for task, metrics in run.tasks.items():
            for metric, facts in metrics.items():
                arrow = "↑" if facts["higher_is_better"] else "↓"
                value = _rounded(facts["value"], facts["stderr"])
                table.add_row(task, f"{metric} {arrow}", str(run.n_samples[task]), value)
    Console().print(table)
