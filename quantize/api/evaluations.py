"""`quantize.evaluate`: perplexity, divergence from the parent and tasks of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.api.choices import (
    Names,
    bos_choice,
    check_choices,
    kv_numerics,
    names_of,
    pairs_of,
)
from quantize.api.evaluated import Evaluated
from quantize.api.places import (
    Progress,
    Say,
    local_model,
    pick_device,
    pick_dtype,
    quiet_libraries,
    silent,
    unseen,
)
from quantize.errors import UsageError
from quantize.evaluation.protocols import Bos, Protocol
from quantize.evaluation.run import measure
from quantize.evaluation.saved import results_folder, save_measured, save_tasks
from quantize.evaluation.task_comparison import TaskScore, compare_tasks
from quantize.evaluation.task_results import TaskRun
from quantize.files.hub_origin import called, commit_of, hub_origin
from quantize.files.provenance import PROVENANCE
from quantize.model.attention_cache import CacheNumerics
from quantize.model.linear import Numerics
from quantize.parallel.launch import is_launched
from quantize.parallel.ranks import ALONE, Ranks


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    revision: str | None = None,
    protocol: str | None = None,
    dataset: str | None = None,
    text_field: str | None = None,
    chat_template: bool | None = None,
    seqlen: int = 512,
    context: int = 0,
    max_windows: int | None = None,
    bos: str = "auto",
    tasks: Names | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: str | int = "auto",
    apply_chat_template: bool = False,
    log_samples: bool = False,
    model_args: Mapping[str, object] | str = "",
    output_path: str | Path | None = None,
    numerics: str = "kernel",
    kv_cache: str = "auto",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    progress: Progress = unseen,
    say: Say = silent,
) -> Evaluated:
    """Measure a model on text that calibration never saw.

    Arguments are those of `pq eval`, where they are described; what has to do with the gate is left
    to the command. model, baseline: a folder or a Hub id. Without tasks this is perplexity; with
    tasks it is the tasks, and perplexity too where protocol or dataset is given. progress: called
    with what is being done, steps done, steps in all. say: called with lines for people.
    Raises subclasses of `quantize.errors.PqError`.
    """
    if is_launched():
        raise UsageError(
            "quantize.evaluate works in one process; start it without a launcher, or several of "
            "`pq eval`"
        )
    return evaluation(
        model,
        baseline,
        revision=revision,
        protocol=protocol,
        dataset=dataset,
        text_field=text_field,
        chat_template=chat_template,
        seqlen=seqlen,
        context=context,
        max_windows=max_windows,
        bos=bos,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        log_samples=log_samples,
        model_args=model_args,
        output_path=output_path,
        numerics=numerics,
        kv_cache=kv_cache,
        device=device,
        dtype=dtype,
        progress=progress,
        say=say,
    )


def evaluation(
    model: str | Path,
    baseline: str | Path | None,
    *,
    revision: str | None,
    protocol: str | None,
    dataset: str | None,
    text_field: str | None,
    chat_template: bool | None,
    seqlen: int,
    context: int,
    max_windows: int | None,
    bos: str,
    tasks: Names | None,
    num_fewshot: int | None,
    limit: float | None,
    batch_size: str | int,
    apply_chat_template: bool,
    log_samples: bool,
    model_args: Mapping[str, object] | str,
    output_path: str | Path | None,
    numerics: str,
    kv_cache: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    progress: Progress,
    say: Say = silent,
    ranks: Ranks = ALONE,
    local_rank: int | None = None,
) -> Evaluated:
    """What `evaluate` and `pq eval` run. ranks, local_rank: the processes of a launch, and the number
    of this one on its machine; the first alone saves results."""
    check_choices(protocol, numerics)
    require_windows(seqlen, context, max_windows)
    begins = bos_choice(bos)
    quiet_libraries()
    place = pick_device(device, local_rank)
    folder = local_model(model, revision, say)
    parent = None if baseline is None else local_model(baseline, None, say)
    wanted = None if output_path is None else Path(output_path)
    setting = Setting(
        folder,
        parent,
        place,
        pick_dtype(dtype, place),
        "kernel" if numerics == "kernel" else "stock",
        kv_numerics(kv_cache),
        output_folder(folder, wanted, log_samples),
        ranks,
        begins,
    )
    asked = names_of(tasks)
    measured = scored = None
    if not asked or protocol or dataset:
        measured = measure(
            [folder],
            parent,
            Protocol("rolling" if protocol == "rolling" else "strided", seqlen, context),
            dataset=dataset or "builtin",
            text_field=text_field,
            chat_template=chat_template,
            max_windows=max_windows,
            bos=begins,
            device=place,
            dtype=setting.dtype,
            numerics=setting.numerics,
            attention=setting.attention,
            progress=progress,
            ranks=ranks,
        )[0]
        if setting.output and ranks.first:
            save_measured(measured, dataset or "builtin", setting.output)
    if asked:
        how = {
            "num_fewshot": num_fewshot,
            "limit": int(limit) if limit is not None and limit >= 1 else limit,
            "batch_size": str(batch_size),
            "apply_chat_template": apply_chat_template,
        }
        scored = run_tasks(setting, asked, how, pairs_of(model_args), log_samples, progress)
    return Evaluated(
        called(folder),
        setting.parent,
        measured.figures if measured else None,
        scored[0] if scored else None,
        scored[1] if scored else [],
        setting.output,
        commit_of(parent),
    )


def require_windows(seqlen: int, context: int, max_windows: int | None) -> None:
    """UsageError for numbers that are too small."""
    given = (("--seqlen", seqlen, 2), ("--context", context, 0), ("--max-windows", max_windows, 1))
    for name, value, least in given:
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: give at least {least}")


@dataclass(frozen=True)
class Setting:
    """What perplexity and tasks have in common."""

    model: Path
    baseline: Path | None
    device: torch.device
    dtype: torch.dtype
    numerics: Numerics
    attention: CacheNumerics | None
    output: Path | None
    """Folder for results; None saves nothing."""
    ranks: Ranks
    bos: Bos = "auto"

    @property
    def parent(self) -> str | None:
        """The baseline's name."""
        return None if self.baseline is None else called(self.baseline)


def output_folder(model: Path, wanted: Path | None, log_samples: bool) -> Path | None:
    """Where results go: `wanted`, else beside a model that pq made; UsageError where samples
    are to be saved and there is no such place."""
    beside = (model / PROVENANCE).is_file() and not hub_origin(model)  # not in the Hub's cache
    if wanted is not None or beside:
        return wanted or results_folder(model)
    if log_samples:
        raise UsageError(
            "--log-samples: say where to with --output-path (this is no folder that pq made here)",
        )
    return None


def run_tasks(
    setting: Setting,
    names: Sequence[str],
    how: dict[str, Any],
    model_args: dict[str, str],
    log_samples: bool,
    progress: Progress,
) -> tuple[TaskRun, list[TaskScore]]:
    """Run the tasks, on the parent as well where there is one, and save the scores."""
    from quantize.evaluation import harness

    def run(folder: Path, attention: CacheNumerics | None = None) -> TaskRun:
        samples = None
        if log_samples and setting.output:
            samples = setting.output / "samples" / called(folder).replace("/", "--")
        return harness.run_tasks(
            folder,
            names,
            log_samples=samples,
            model_args=model_args,
            bos=setting.bos,
            device=setting.device,
            dtype=setting.dtype,
            numerics=setting.numerics,
            attention=attention,
            progress=progress,
            ranks=setting.ranks,
            **how,
        )

    ours = run(setting.model, setting.attention)
    scores = compare_tasks(ours, run(setting.baseline)) if setting.baseline else []
    if setting.output and setting.ranks.first:
        save_tasks(ours, setting.parent, scores, setting.output, commit_of(setting.baseline))
    return ours, scores
