"""Results of evaluations on disk, beside the checkpoint they belong to."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.calibration.rendering import rendering_of
from quantize.evaluation.run import Measured
from quantize.evaluation.task_comparison import TaskScore
from quantize.evaluation.task_results import TaskRun
from quantize.files.disk import report_errors, write_text


def results_folder(model: Path) -> Path:
    """DIR.eval beside the checkpoint DIR, which itself is never changed: its hashes stay valid."""
    return model.absolute().with_name(f"{model.absolute().name}.eval")


def save_measured(measured: Measured, dataset: str, folder: Path) -> Path:
    """Write NAME.json (the figures) and NAME.parquet (the per-token records); returns the former.

    NAME tells protocol, data (and whether chats were rendered) and numerics, so that a repeated
    evaluation replaces its predecessor.
    """
    figures = measured.figures
    kv = "" if figures.kv_cache == "16-bit" else f"-{_slug(figures.kv_cache)}"
    rendering = f"-{_slug(how)}" if (how := rendering_of(figures.data)) else ""
    name = f"{figures.protocol}-{_slug(dataset)}{rendering}-{figures.numerics}{kv}"
    with report_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.parquet.part"
        try:
            measured.records.save(part)
            part.replace(folder / f"{name}.parquet")
        finally:
            part.unlink(missing_ok=True)
    return _write_json(
        folder / f"{name}.json", {"kind": "perplexity", **dataclasses.asdict(figures)}
    )


def save_tasks(
    run: TaskRun,
    baseline: str | None,
    scores: Sequence[TaskScore],
    folder: Path,
    baseline_commit: str | None = None,
) -> Path:
    """Write tasks-NAMES.json: the run, and its comparison with the parent."""
    return _write_json(
        folder / f"tasks-{_slug('+'.join(run.tasks))}-{run.numerics}.json",
        tasks_json(run, baseline, scores, baseline_commit),
    )


def tasks_json(
    run: TaskRun,
    baseline: str | None,
    scores: Sequence[TaskScore],
    baseline_commit: str | None = None,
) -> dict[str, Any]:
    """What is saved about tasks; per-document values are left to `--log_samples`.

    baseline_commit: of a baseline on the Hub.
    """
    facts = {name: value for name, value in dataclasses.asdict(run).items() if name != "samples"}
    return {
        "kind": "tasks",
        **facts,
        "baseline": baseline,
        "baseline_commit": baseline_commit,
        "scores": [dataclasses.asdict(score) for score in scores],
    }


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", Path(text).name if Path(text).exists() else text).strip(
        "-"
    )[:80]


def _write_json(path: Path, data: Mapping[str, Any]) -> Path:
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return path
