"""What `pq eval` runs: perplexity and tasks of one model, as the command's options say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UsageError
from quantize.files.hub_origin import called, commit_of, hub_origin

if TYPE_CHECKING:
    import torch

    from quantize.evaluation.protocols import Bos
    from quantize.evaluation.run import Measured
    from quantize.evaluation.task_comparison import TaskScore
    from quantize.evaluation.task_results import TaskRun
    from quantize.model.attention_cache import CacheNumerics
    from quantize.model.linear import Numerics
    from quantize.parallel.ranks import Ranks


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
    from quantize.evaluation.saved import results_folder
    from quantize.files.provenance import PROVENANCE

    beside = (model / PROVENANCE).is_file() and not hub_origin(model)  # not in the Hub's cache
    if wanted is not None or beside:
        return wanted or results_folder(model)
    if log_samples:
        raise UsageError(
            "--log-samples: say where to with --output-path (this is no folder that pq made here)",
        )
    return None


def perplexity(
    setting: Setting,
    protocol: str,
    dataset: str,
    text_field: str | None,
    chat_template: bool | None,
    seqlen: int,
    context: int,
    max_windows: int | None,
    progress: Any,
) -> Measured:
    """Measure perplexity and save it where the setting says."""
    from quantize.evaluation.protocols import Protocol
    from quantize.evaluation.run import measure
    from quantize.evaluation.saved import save_measured

    measured = measure(
        [setting.model],
        setting.baseline,
        Protocol("rolling" if protocol == "rolling" else "strided", seqlen, context),
        dataset=dataset,
        text_field=text_field,
        chat_template=chat_template,
        max_windows=max_windows,
        bos=setting.bos,
        device=setting.device,
        dtype=setting.dtype,
        numerics=setting.numerics,
        attention=setting.attention,
        progress=progress,
        ranks=setting.ranks,
    )[0]
    if setting.output and setting.ranks.first:
        save_measured(measured, dataset, setting.output)
    return measured


def tasks(
    setting: Setting,
    names: Sequence[str],
    how: dict[str, Any],
    model_args: dict[str, str],
    log_samples: bool,
    progress: Any,
) -> tuple[TaskRun, list[TaskScore]]:
    """Run the tasks, on the parent as well where there is one, and save the scores."""
    from quantize.evaluation.harness import run_tasks
    from quantize.evaluation.saved import save_tasks
    from quantize.evaluation.task_comparison import compare_tasks

    def run(folder: Path, attention: CacheNumerics | None = None) -> TaskRun:
        samples = None
        if log_samples and setting.output:
            samples = setting.output / "samples" / called(folder).replace("/", "--")
        return run_tasks(
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
