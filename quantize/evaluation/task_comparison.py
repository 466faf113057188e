"""Scores of a model against those of its parent on the same documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.errors import DataError
from quantize.evaluation.task_results import TaskRun
from quantize.evaluation.task_scores import (
    PLAIN,
    WEIGHTED,
    Aggregation,
    Value,
    influence,
    standard_error,
)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, of a model and of its parent."""

    task: str
    metric: str
    higher_is_better: bool
    n: int
    """Documents."""
    paired: bool
    """Whether both models' values of each document are known; without them there are no errors of
    comparison."""
    value: float
    stderr: float | None
    baseline: float
    baseline_stderr: float | None
    difference: float
    """value − baseline."""
    difference_stderr: float | None
    recovery: float | None
    """value / baseline, or baseline / value where lower is better: 1 is as good as the parent. None
    if not defined."""
    recovery_stderr: float | None


def compare_tasks(ours: TaskRun, parents: TaskRun) -> list[TaskScore]:
    """Every metric of every task against the parent's, in the order of `ours`.

    difference_stderr is that of the mean of d_i = a_i − b_i, where a_i and b_i are both models'
    influences of document i. recovery R = a/b has the influences (a_i − R b_i)/b (where lower is
    better R = b/a, and a and b change places):
    the delta method on paired data. DataError when the runs did not score the same documents with
    the same prompts.
    """
    if missing := sorted(set(ours.tasks) ^ set(parents.tasks)):
        raise DataError(
            f"task {missing[0]} was run on one of {ours.model} and {parents.model} only; run both "
            "on it"
        )
    scores = []
    for task, metrics in ours.tasks.items():
        if ours.task_hashes.get(task) != parents.task_hashes.get(task):
            raise DataError(
                f"task {task}: {ours.model} and {parents.model} were not asked the same questions; "
                "run both with the same files, limit, few-shot examples and chat template"
            )
        for metric, figures in metrics.items():
            if metric not in parents.tasks[task]:
                raise DataError(
                    f"task {task}: {parents.model} has no {metric}; run both with the same lm-eval"
                )
            a, b = (run.samples.get(task, {}).get(metric, {}) for run in (ours, parents))
            scores.append(
                _compare(
                    task, metric, figures, parents.tasks[task][metric], a, b, ours.n_samples[task]
                )
            )
    return scores


def _compare(
    task: str,
    metric: str,
    ours: Mapping[str, Any],
    parents: Mapping[str, Any],
    our_values: Mapping[str, Value],
    parent_values: Mapping[str, Value],
    documents: int,
) -> TaskScore:
    value: float = ours["value"]
    baseline: float = parents["value"]
    higher: bool = ours["higher_is_better"]
    a, b = _influences(ours, parents, our_values, parent_values)
    good, bad = (value, baseline) if higher else (baseline, value)
    good_i, bad_i = (a, b) if higher else (b, a)
    recovery = good / bad if bad and math.isfinite(good) and math.isfinite(bad) else None
    difference_error = recovery_error = None
    if a:
        difference_error = standard_error([x - y for x, y in zip(a, b, strict=True)])
        if recovery is not None:
            recovery_error = standard_error(
                [(x - recovery * y) / bad for x, y in zip(good_i, bad_i, strict=True)]
            )
    return TaskScore(
        task=task,
        metric=metric,
        higher_is_better=higher,
        n=documents,
        paired=bool(a),
        value=value,
        stderr=ours["stderr"],
        baseline=baseline,
        baseline_stderr=parents["stderr"],
        difference=value - baseline,
        difference_stderr=difference_error,
        recovery=recovery,
        recovery_stderr=recovery_error,
    )


def _influences(
    ours: Mapping[str, Any],
    parents: Mapping[str, Any],
    our_values: Mapping[str, Value],
    parent_values: Mapping[str, Value],
) -> tuple[list[float], list[float]]:
    """Influences of the same documents in the same order; two empty lists where they cannot be
    paired."""
    kinds = [ours.get("aggregation"), parents.get("aggregation")]
    kind: Aggregation | None = next(
        (name for name in (*PLAIN, *WEIGHTED) if kinds == [name, name]), None
    )
    if kind is None or not our_values or our_values.keys() != parent_values.keys():
        return [], []
    a, b = (influence(kind, [run[i] for i in our_values]) for run in (our_values, parent_values))
    return (a, b) if all(map(math.isfinite, (*a, *b))) else ([], [])
