"""`pq convert`: recipe and model in, packed checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli import options
from quantize.cli.common import (
    loading,
    local_model,
    pick_device,
    pick_dtype,
    progress_bar,
    quiet_libraries,
    stop_on_signals,
)
from quantize.cli.conversion_log import log_run
from quantize.cli.figures import print_restructuring
from quantize.cli.inspect import loads_line
from quantize.cli.launches import joining
from quantize.cli.options import size_option
from quantize.cost.units import duration, gigabytes

if TYPE_CHECKING:
    from quantize.conversion.loop import Request, Summary


def convert(
    model: options.Model,
    recipe: options.Recipe,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder to write; must be absent or empty (or --overwrite)."
        ),
    ],
    revision: options.Revision = None,
    dataset: options.CalibrationDataset = None,
    nsamples: options.CalibrationWindows = None,
    seqlen: options.CalibrationSeqlen = None,
    seed: options.Seed = None,
    chat_template: options.ChatTemplate = None,
    text_field: options.TextField = None,
    bos: options.CalibrationBos = None,
    assignments: options.Assignments = None,
    target_bpw: options.TargetBpw = None,
    work: options.Work = None,
    resume: options.ResumeOption = "auto",
    overwrite: options.Overwrite = False,
    strict_serving: options.StrictServing = False,
    max_ram: options.MaxRam = None,
    max_vram: options.MaxVram = None,
    device: options.ConversionDevice = "auto",
    dtype: options.Dtype = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
) -> None:
    """Quantize a model; the output appears whole or not at all.

    OUTPUT.log and OUTPUT.report.html stand beside it.
    """
    with loading("loading torch and transformers"):
        from quantize.conversion.estimate import within
        from quantize.conversion.loop import Request
        from quantize.cost.peak import keep_little
        from quantize.files.resume import forget_finished
        from quantize.files.transaction import require_apart, require_free, require_name
        from quantize.recipe.overrides import with_stage_fields
        from quantize.recipe.recipe import load_recipe

    require_name(output)
    keep_little()
    # In a launch signals ask to stop from the moment on in which another process may go
    # ahead of this one: a launcher that loses a process sends SIGTERM to those that are
    # left, which then say whom they miss.
    signals = _Signals(keeps=resume != "never")
    with signals, joining(signals.keeps, signals.catch) as (ranks, local_rank):
        mode = options.resume_mode(resume)
        chosen = load_recipe(recipe).with_overrides(
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            chat_template=chat_template,
            text_field=text_field,
            bos=bos,
        )
        chosen = with_stage_fields(chosen, assignments or [])
        kept = work or output.with_name(output.name + ".work")
        if ranks.first:
            forget_finished(kept, output, own=work is None)
            require_free(output, overwrite)
        quiet_libraries()
        place = pick_device(device, local_rank)
        computing = pick_dtype(dtype, place)
        source = local_model(model, revision, ranks.first)
        require_apart(source, output, kept)
        request = Request(
            source,
            chosen,
            output,
            place,
            computing,
            work=kept,
            resume=mode,
            overwrite=overwrite,
            target_bpw=target_bpw,
            strict_serving=strict_serving,
            max_ram=size_option("--max-ram", max_ram),
            max_vram=size_option("--max-vram", max_vram),
            ranks=ranks,
        )
        request = within(request)
        if ranks.first:
            _lead(request, kept, own=work is None, as_json=as_json, signals=signals)
        else:
            _assist(request, signals)


class _Signals(ExitStack):
    """SIGINT and SIGTERM ask to stop after the block under way, once `catch` was called.

    Where no block is kept they do what they always do.
    """

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self._asked: Callable[[], bool] | None = None

    def catch(self) -> None:
        """Take the signals from now on; the first process of a launch says so when one comes."""
        if self.keeps and self._asked is None:
            self._asked = self.enter_context(
                stop_on_signals(aloud=os.environ.get("RANK", "0") == "0")
            )

    def stop(self) -> bool:
        """Whether one has come."""
        return self._asked is not None and self._asked()


def _lead(request: Request, kept: Path, own: bool, as_json: bool, signals: _Signals) -> None:
    """Convert, write and tell. own: whether the folder `kept` goes when the output is there."""
    from quantize.conversion.loop import convert as run

    with log_run(request.output, kept) as log:
        with progress_bar() as progress, signals:
            signals.catch()
            summary = run(request, log.begins(progress), signals.stop)
        log.begin()
        if own:
            shutil.rmtree(kept, ignore_errors=True)
        logging.getLogger("quantize").info("summary %s", json.dumps(dataclasses.asdict(summary)))
        _write_report(request.output)
    if as_json:
        facts = dataclasses.asdict(summary) | {"loads_in": loads_line(Path(summary.output))}
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(summary)


def _assist(request: Request, signals: _Signals) -> None:
    """Take part as one of several processes that is not the first: silent, without a log."""
    from quantize.conversion.loop import convert as run

    logging.getLogger("quantize").addHandler(logging.NullHandler())
    run(request, stop=signals.stop)


def _write_report(output: Path) -> None:
    from quantize.report import write

    try:
        page = write(output)
    except Exception as err:  # the conversion is done and worth more than its page
        logging.getLogger("quantize").exception("no report")
        typer.echo(
            f"pq: warning: the report was not written ({err}); pq report {output} tries again",
            err=True,
        )
    else:
        typer.echo(f"report: {page}", err=True)


def _megabytes(summary: Summary) -> str:
    return f"{summary.output_bytes / 1e6:.1f} MB (source {summary.source_bytes / 1e6:.1f} MB)"


def _list_names(names: Sequence[str], shown: int = 7) -> str:
    rest = f" and {len(names) - shown} more, all in pq.json" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _print(summary: Summary) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    ratio = summary.source_bytes / summary.output_bytes
    size = (
        f"{summary.output_bytes / 1e6:.1f} MB ({ratio:.2f}x smaller)"
        if ratio >= 1.005
        else _megabytes(summary)
    )
    bits = f"{summary.quantized_linears} linears at {summary.bits_per_weight:.3f} bits per weight, "
    done = bits if summary.quantized_linears else ""
    memory = f", peak memory {gigabytes(summary.peak_bytes)}" if summary.peak_bytes else ""
    took = f"{duration(summary.seconds)} ({duration(summary.seconds_per_block)} a block)"
    console.print(f"[bold]{summary.output}[/bold]: {done}{size}, {took}{memory}")
    if summary.dequantized:
        console.print(f"the source is stored small: {summary.dequantized}")
    if summary.bos:
        console.print(f"calibration windows began with BOS (token {summary.bos_token_id})")
    if summary.restructured:
        print_restructuring(console, summary.restructured, summary.activated_reduction)
    for reason, names in summary.cache_16bit.items():
        console.print(
            f"[yellow]{len(names)} layers keep a 16-bit cache[/yellow] ({reason}): "
            f"{_list_names(names)}"
        )
    for reason, names in summary.unmoved.items():
        console.print(f"in {len(names)} blocks no scales move over {reason}")
    for adapted in summary.adapted:
        console.print(f"[yellow]not as asked for:[/yellow] {adapted}")
    for lost in summary.lost:
        console.print(f"[yellow]not in this format:[/yellow] {lost}")
    for unserved in summary.unserved:
        where, _, what = unserved.partition(": ")
        console.print(f"[yellow]{where}:[/yellow] {what}")
    console.print(f"{loads_line(Path(summary.output))} (pq serve-check says how)", soft_wrap=True)
    if summary.carried:
        modules = (
            f"{name} ({count} tensor{'s' if count > 1 else ''})"
            for name, count in summary.carried.items()
        )
        console.print(f"carried over unchanged, beside the decoder: {', '.join(modules)}")
    if summary.untied_head_bytes:
        console.print(
            "the head no longer shares the embedding's weight: "
            f"{summary.untied_head_bytes / 1e6:.1f} MB more"
        )
    if summary.promoted:
        console.print(
            f"{len(summary.promoted)} linears got more bits to spend the target: "
            f"{_list_names(summary.promoted)}"
        )
    if summary.fallbacks:
        console.print(
            f"[yellow]{len(summary.fallbacks)} linears were not fitted to their inputs[/yellow] "
            f"(pq.json says why): {_list_names(summary.fallbacks)}"
        )
