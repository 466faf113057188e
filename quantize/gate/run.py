"""The accuracy gate: every recipe and checkpoint of a file reaches what the file says, its parent
being measured in the same run, or on the same text by the same software before."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.conversion.loop import Request, convert
from quantize.errors import ModelError, QualityError, UsageError, VerifyError
from quantize.evaluation import evaluate
from quantize.evaluation.parents import ParentCache
from quantize.evaluation.protocols import Protocol, said_once
from quantize.files.problems import show_value
from quantize.gate.checks import Measurement, Verdict, figure_of, judge
from quantize.gate.entries import Entry, GateFile
from quantize.gate.fields import close
from quantize.gate.file import load_gate
from quantize.gate.places import Locate, entries_of, no_hub, parent_of, place_of
from quantize.gate.protocol import (
    baseline_protocol,
    is_measured,
    protocol_of,
    require_same,
    unfit,
)
from quantize.model.dequantized import open_source

__all__ = ["GateResult", "Verdict", "run_gate"]

_NAMED = 3  # failed checks in the one line of an error; the table has them all
Progress = Callable[[str, int, int], None]
Tasks = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""task → metric → value, stderr, higher_is_better: what a TaskRun holds."""


@dataclass(frozen=True)
class GateResult:
    """What a run of the gate found; `dataclasses.asdict` of it is plain JSON (figures that
    are not finite are None)."""

    file: str
    verdicts: tuple[Verdict, ...]
    seconds: float
    figures: dict[str, dict[str, Any]]
    """Of each recipe: its Evaluation; absent where the recipe could not be measured."""
    tasks: dict[str, dict[str, Any]]
    """Of each recipe: task → metric → value, stderr, baseline, higher_is_better."""
    protocol: str
    """Name of the one that measured."""
    parent_runs: str = "not kept"
    """Of the parent's runs over the text, how many were found kept and how many were made."""

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(verdict.ok for verdict in self.verdicts)

    def raise_if_failed(self) -> None:
        """Raise QualityError, one line that names the checks that failed."""
        failed = [f"{v.recipe}.{v.metric} {v.detail}" for v in self.verdicts if not v.ok]
        if failed:
            shown = failed[:_NAMED]
            if len(failed) > _NAMED:
                shown.append(f"and {len(failed) - _NAMED} more")
            count = f"{len(failed)} of {len(self.verdicts)} checks failed"
            raise QualityError(f"{self.file}: {count}: {'; '.join(shown)}")


@dataclass(frozen=True)
class _Run:
    file: GateFile
    baseline: Path
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    parents: ParentCache | None


def run_gate(
    file: Path,
    model: Path | None = None,
    baseline: Path | None = None,
    only: Sequence[str] | None = None,
    *,
    renew: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda what, done, total: None,
    parents: ParentCache | None = None,
    locate: Locate = no_hub,
) -> GateResult:
    """Check the entries of a gate file; a check that fails is a verdict, not an exception.

    Without `model`, every checkpoint (or those named in `only`) is measured against the file's
    model, and every recipe converted on it into a temporary folder and measured. With `model`
    nothing is converted: `baseline` is its parent, and its entry is the one of its folder, of its
    recipe's name, or the one in `only`. A model that cannot be made or used fails all of its checks.
    dtype: what is computed in; None: what the file says. parents: where runs of the parent are kept;
    None: nowhere. locate: Hub id → folder.
    renew: the figures are to take the place of the file's values, which may then be of
    another protocol; else RecipeError for such.
    Raises PqError subclasses: RecipeError for a broken file, UsageError for
    arguments that contradict each other.
    """
    started = time.monotonic()
    gate = load_gate(file)
    entries, parent = _choose(gate, model, baseline, only, locate)
    folders = {entry.name: model or place_of(gate, entry, locate) for entry in entries}
    for folder in (parent, *(folder for folder in folders.values() if folder is not None)):
        open_source(folder)  # a wrong path is no failed check
    protocol = protocol_of(gate, next(iter(folders.values()), None) or parent)
    if not renew:
        require_same(gate, entries, protocol)
    kind: torch.dtype = dtype or getattr(torch, gate.evaluation.dtype)
    run = _Run(gate, parent, device or torch.device("cpu"), kind, progress, parents)
    with said_once():
        verdicts, figures, tasks = _check(run, entries, folders, protocol)
    seconds = round(time.monotonic() - started, 2)
    runs = "not kept" if parents is None else f"{parents.used} kept, {parents.made} new"
    return GateResult(
        str(file), tuple(verdicts), seconds, _plain(figures), _plain(tasks), protocol.name, runs
    )


def _check(
    run: _Run,
    entries: Sequence[Entry],
    folders: Mapping[str, Path | None],
    protocol: Protocol,
) -> tuple[list[Verdict], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Verdicts on all entries, their figures and those of their tasks."""
    gate = run.file
    parents_tasks = _tasks(run, run.baseline, "parent") if gate.tasks else {}
    verdicts: list[Verdict] = []
    figures: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for entry in entries:
        missing = ""
        try:
            figures[entry.name], ours = _measure(run, entry, folders[entry.name])
            tasks[entry.name] = _beside_parent(ours, parents_tasks)
        except (ModelError, VerifyError) as err:
            missing = str(err)
        others = baseline_protocol(gate, entry) if unfit(gate, entry, protocol) else None
        for check in entry.checks:
            figure = Measurement(None, missing=missing)
            if not missing:
                figure = _measurement(check.metric, figures[entry.name], tasks[entry.name])
            verdict = judge(entry.name, check, figure)
            if others and verdict.value is not None and is_measured(entry, check):
                detail = f"the baseline is of {others}"
                verdict = dataclasses.replace(verdict, status="FAIL", detail=detail)
            verdicts.append(verdict)
    return verdicts, figures, tasks


def _choose(
    gate: GateFile,
    model: Path | None,
    baseline: Path | None,
    only: Sequence[str] | None,
    locate: Locate,
) -> tuple[list[Entry], Path]:
    """Entries to check, and the folder of the parent."""
    entries = {entry.name: entry for entry in gate.entries}
    for name in only or ():
        if name not in entries:
            known = f"{close(name, entries)}(entries: {', '.join(entries)})"
            raise UsageError(f"{gate.path}: no entry {show_value(name)}; {known}")
    named = [entry for entry in gate.entries if only is None or entry.name in only]
    if model is not None:
        if baseline is None:
            raise UsageError(f"the gate compares {model} with its parent; give it with --baseline")
        return [_entry_of(gate, model, named if only else None)], baseline
    if baseline is not None:
        remedy = f"without one the gate uses the model of {gate.path}"
        raise UsageError(f"--baseline {baseline} needs a model; {remedy}")
    return named, parent_of(gate, locate)


def _entry_of(gate: GateFile, model: Path, named: list[Entry] | None) -> Entry:
    if named is None:
        named = entries_of(gate, model)
    if len(named) > 1:
        names = ", ".join(entry.name for entry in named)
        raise UsageError(
            f"{gate.path}: {model} is one model, but its entry could be {names}; name one",
        )
    return named[0]


def _measure(run: _Run, entry: Entry, model: Path | None) -> tuple[dict[str, Any], Tasks]:
    """Evaluation and task figures of `model`, or of the entry's recipe, whose
    conversion is then deleted."""

    def progress(what: str, done: int, total: int) -> None:
        run.progress(f"{entry.name}: {what}", done, total)

    if model is None:
        with tempfile.TemporaryDirectory(prefix="pq-gate-") as folder:
            output = Path(folder) / entry.name
            assert entry.recipe is not None  # a checkpoint has a folder
            convert(Request(run.baseline, entry.recipe, output, run.device, run.dtype), progress)
            return _measure(run, entry, output)
    settings = dataclasses.asdict(run.file.evaluation)
    del settings["dtype"]
    evaluation = evaluate(
        model,
        run.baseline,
        device=run.device,
        dtype=run.dtype,
        progress=progress,
        parents=run.parents,
        **settings,
    )
    tasks = _tasks(run, model, entry.name) if run.file.tasks else {}
    return dataclasses.asdict(evaluation), tasks


def _tasks(run: _Run, model: Path, name: str) -> Tasks:
    from quantize.evaluation.harness import run_tasks  # lm-eval takes seconds to import

    done = run_tasks(
        model,
        run.file.tasks,
        num_fewshot=None,
        limit=run.file.task_limit,
        device=run.device,
        dtype=run.dtype,
        numerics=run.file.evaluation.numerics,
        bos=run.file.evaluation.bos,
        progress=lambda what, done, total: run.progress(f"{name}: {what}", done, total),
    )
    tasks: Tasks = done.tasks
    return tasks


def _beside_parent(ours: Tasks, parents: Tasks) -> dict[str, Any]:
    return {
        task: {
            metric: {**score, "baseline": parents.get(task, {}).get(metric, {}).get("value")}
            for metric, score in metrics.items()
        }
        for task, metrics in ours.items()
    }


def _measurement(metric: str, evaluation: Mapping[str, Any], tasks: Tasks) -> Measurement:
    task, slash, name = metric.rpartition("/")
    if not slash:
        return figure_of(evaluation, metric)
    known = [f"{t}/{m}" for t, metrics in tasks.items() for m in metrics]
    if metric not in known:
        return Measurement(
            None,
            missing=f"the tasks do not give it; {close(metric, known)}they give {', '.join(known)}",
        )
    score = tasks[task][name]
    return Measurement(
        score["value"],
        score["baseline"],
        bool(score["higher_is_better"]),
        stderr=score.get("stderr"),
    )


def _plain(data: Any) -> Any:
    """Replace what JSON cannot say (NaN and infinities) by None."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
