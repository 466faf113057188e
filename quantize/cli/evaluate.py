"""`pq eval`: perplexity, divergence from the parent, tasks, and the accuracy gate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.api.choices import names_of
from quantize.cli import options
from quantize.cli.common import local_model, pick_device, quiet_libraries
from quantize.cli.gate import Check, Junit, NoCache, Only, Reason, SummaryFile, Update, check_gate
from quantize.cli.launches import joining
from quantize.cli.progress import progress_bar
from quantize.cli.told import warnings_told
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.api.evaluated import Evaluated


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Packed or plain model folder, or Hub id org/name; not needed with --gate."
        ),
    ] = None,
    revision: options.Revision = None,
    baseline: options.Baseline = None,
    protocol: options.ProtocolOption = None,
    dataset: options.Dataset = None,
    text_field: options.TextField = None,
    chat_template: options.ChatTemplate = None,
    seqlen: options.Seqlen = 512,
    context: options.Context = 0,
    max_windows: options.MaxWindows = None,
    bos: options.BosOption = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks, separated by commas: names, .yaml files, TEMPLATE:FILE."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="First documents of each task, or a fraction below 1."),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Requests at once, or auto.")] = "auto",
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask --tasks as a chat."),
    ] = False,
    log_samples: Annotated[
        bool,
        typer.Option("--log-samples", help="Save every document's scores."),
    ] = False,
    model_args: Annotated[str, typer.Option(help="Arguments of lm-eval's HFLM: k=v,k=v.")] = "",
    output_path: Annotated[
        Path | None,
        typer.Option(help="Folder for results; default: MODEL.eval beside a model that pq made."),
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="Check against this baselines file; exit code 9 on failure.")
    ] = None,
    update_baselines: Update = False,
    reason: Reason = "",
    only: Only = None,
    junit: Junit = None,
    summary_file: SummaryFile = None,
    no_cache: NoCache = False,
    numerics: options.NumericsOption = "kernel",
    kv_cache: options.KvCache = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Measure a model on text that calibration never saw.

    Without --tasks this is perplexity; with --tasks it is the tasks, and perplexity too where
    --protocol or --dataset is given.
    """
    options.check_choices(protocol, numerics)
    options.bos_choice(bos)
    with joining(keeps=False) as (ranks, local_rank):
        if gate is not None:
            if revision is not None:
                raise UsageError(
                    f"--revision {revision}: with --gate write it behind the id, org/name@{revision}"
                )
            if ranks.size > 1:
                raise UsageError(
                    "--gate converts and measures in one process; start it without a launcher",
                )
            _require_file_decides(
                bos=(bos, "auto"),
                protocol=(protocol, None),
                dataset=(dataset, None),
                text_field=(text_field, None),
                chat_template=(chat_template, None),
                seqlen=(seqlen, 512),
                context=(context, 0),
                max_windows=(max_windows, None),
                numerics=(numerics, "kernel"),
                dtype=(dtype, "float32"),
            )
            check = Check(
                gate,
                model,
                baseline,
                tuple(names_of(only)),
                reason if update_baselines else None,
                device,
                junit,
                summary_file,
                not no_cache,
            )
            check_gate(check, as_json)
            return
        if update_baselines or reason or only or junit or summary_file or no_cache:
            raise UsageError(
                "--update-baselines, --reason, --only, --junit, --summary-file and --no-cache "
                "belong to --gate FILE"
            )
        if model is None:
            raise UsageError("name the model folder to evaluate, or give --gate FILE")
        from quantize.api.evaluations import evaluation

        quiet_libraries()
        pick_device(device, local_rank)  # before anything is fetched
        folder = local_model(model, revision, ranks.first)
        parent = None if baseline is None else local_model(baseline, aloud=ranks.first)
        with progress_bar(ranks.first) as progress, warnings_told(ranks.first):
            found = evaluation(
                folder,
                parent,
                revision=None,
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
                ranks=ranks,
                local_rank=local_rank,
            )
        ranks.release()
        if ranks.first:
            _tell(folder, found, as_json)


def _tell(model: Path, found: Evaluated, as_json: bool) -> None:
    """Print the figures."""
    from quantize.cli import figures

    if as_json:
        out: dict[str, Any] = {} if found.figures is None else dataclasses.asdict(found.figures)
        if found.tasks:
            from quantize.evaluation.saved import tasks_json

            out["tasks"] = tasks_json(
                found.tasks, found.baseline, found.scores, found.baseline_commit
            )
        typer.echo(json.dumps(out, indent=2))
        return
    if found.figures:
        figures.print_perplexity(found.figures)
    if found.tasks:
        figures.print_tasks(found.tasks, found.scores)
    if found.saved_in:
        typer.echo(f"saved in {found.saved_in}; pq report {model} makes a page of it", err=True)


def _require_file_decides(**given: tuple[object, object]) -> None:
    """UsageError for an option that a gate's file decides on. given: name → value, default."""
    for name, (value, default) in given.items():
        if value != default:
            shown = str(value).lower() if isinstance(value, bool) else value
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UsageError(
                f"{option}: the gate's file says how it measures; write {name}: {shown} under "
                "its evaluation"
            )
