"""Scores of one model as plain data, made of what lm-eval returns."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import OutputError
from quantize.evaluation.task_scores import Value, aggregation_of, influence, standard_error


@dataclass(frozen=True)
class TaskRun:
    """Scores of one model; plain data, so `dataclasses.asdict` is its JSON form and
    `TaskRun(**json)` reads it."""

    model: str
    tasks: dict[str, dict[str, dict[str, Any]]]
    """task → metric → {"value", "stderr", "higher_is_better", "aggregation"}, groups included; a
    filter of lm-eval's other than `none` follows the metric's name after a comma. stderr and
    aggregation are None where not known."""
    n_samples: dict[str, int]
    """Documents scored."""
    num_fewshot: dict[str, int]
    groups: dict[str, list[str]]
    limit: int | float | None
    chat_template: bool
    model_args: dict[str, str]
    max_length: int
    """Window of the model in tokens."""
    truncated: int
    """Requests that were longer and were cut from the left."""
    numerics: str
    dtype: str
    versions: dict[str, str]
    task_versions: dict[str, str]
    task_hashes: dict[str, str]
    """sha256 over documents, prompts and targets: equal where two runs asked the same."""
    files: dict[str, dict[str, str]]
    """task (or task file) → {"task": as asked for, "sha256": of the local file}."""
    samples: dict[str, dict[str, dict[str, Value]]]
    """task → metric → document id → its value, or [log-likelihood, words or bytes]."""
    bos_token_id: int | None = None
    """The BOS token that texts begin with; None without one."""
    model_commit: str | None = None
    """Of a model on the Hub; None for a local folder."""


def figures_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of TaskRun that come from lm-eval's results."""
    samples = {task: _values(records) for task, records in results["samples"].items()}
    hashes = {task: _hash(records) for task, records in results["samples"].items()}
    counts = {
        task: len({record["doc_id"] for record in records})
        for task, records in results["samples"].items()
    }
    reported = {**results["results"], **results.get("groups", {})}
    groups = {name: _members(name, results["group_subtasks"]) for name in results.get("groups", {})}
    for name, members in groups.items():
        samples[name] = _pool([(member, samples[member]) for member in members])
        hashes[name] = hashlib.sha256(
            "".join(hashes[member] for member in members).encode()
        ).hexdigest()
        counts[name] = sum(counts[member] for member in members)
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for name in (n for n in reported if n in samples):
        tasks[name] = _metrics(
            reported[name], results["higher_is_better"].get(name, {}), samples[name]
        )
        # Values that no standard error can be made of, or that are not this
        # metric's, are of no use to a reader.
        samples[name] = {
            m: v
            for m, v in samples[name].items()
            if m in tasks[name] and tasks[name][m]["aggregation"]
        }
    return {
        "tasks": tasks,
        "samples": {name: samples[name] for name in tasks},
        "n_samples": {name: counts[name] for name in tasks},
        "num_fewshot": {
            name: int(n)
            for name, n in results["n-shot"].items()
            if name in tasks and isinstance(n, int)
        },
        "groups": groups,
        "task_versions": {
            name: str(version) for name, version in results["versions"].items() if name in tasks
        },
        "task_hashes": {name: hashes[name] for name in tasks},
    }


def _values(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Value]]:
    """Metric → document id → value, for values that are a number or a pair of numbers."""
    found: dict[str, dict[str, Value]] = {}
    for record in records:
        for metric in record.get("metrics", ()):
            value = record[metric]
            parts = value if isinstance(value, (tuple, list)) else [value]
            try:
                numbers = [float(part) for part in parts]
            except (TypeError, ValueError):
                continue
            if len(numbers) == 2 or not isinstance(value, (tuple, list)):
                name = _metric_name(metric, str(record.get("filter", "none")))
                found.setdefault(name, {})[str(record["doc_id"])] = (
                    numbers if len(numbers) == 2 else numbers[0]
                )
    return found


def _metric_name(metric: str, chosen_filter: str) -> str:
    return metric if chosen_filter == "none" else f"{metric},{chosen_filter}"


def _members(group: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group, those of groups inside it included."""
    return [
        leaf for name in subtasks.get(group, ()) for leaf in (_members(name, subtasks) or [name])
    ]


def _pool(
    members: Sequence[tuple[str, Mapping[str, Mapping[str, Value]]]],
) -> dict[str, dict[str, Value]]:
    """Documents of all members as one task; a group that is no mean over them fails to
    be recognized as one later."""
    shared = (
        [metric for metric in members[0][1] if all(metric in values for _, values in members)]
        if members
        else []
    )
    return {
        m: {f"{task}/{i}": v for task, values in members for i, v in values[m].items()}
        for m in shared
    }


def _metrics(
    reported: Mapping[str, Any],
    directions: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Value]],
) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for key, value in reported.items():
        metric, comma, chosen_filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str) or value is None:
            continue
        name = _metric_name(metric, chosen_filter)
        documents = list(values.get(name, {}).values())
        aggregation = aggregation_of(documents, float(value))
        figures[name] = {
            "value": float(value),
            "stderr": None
            if aggregation is None
            else standard_error(influence(aggregation, documents)),
            "higher_is_better": bool(directions.get(metric, True)),
            "aggregation": aggregation,
        }
    return figures


def _hash(records: Sequence[Mapping[str, Any]]) -> str:
    keys = ("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash")
    return hashlib.sha256(
        json.dumps([[str(r.get(key)) for key in keys] for r in records]).encode()
    ).hexdigest()


def make_folder(folder: Path) -> None:
    """Make the folder for samples before hours of scoring; OutputError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(
            f"{folder}: cannot be made ({err.strerror}); give another folder for the samples"
        ) from None


def write_samples(folder: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write folder/samples_TASK.jsonl, one document a line (and filter), with the
    keys of lm-eval's own files."""
    for task, records in samples.items():
        path = folder / f"samples_{re.sub(r'[^A-Za-z0-9._-]', '_', task)}.jsonl"
        try:
            with path.open("w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        except OSError as err:
            raise OutputError(
                f"{path}: cannot be written ({err.strerror}); free space or give another folder"
            ) from None
