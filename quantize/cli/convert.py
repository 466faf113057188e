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
from typing import TYPE_CHECKING, Annotated, get_args

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
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.conversion.loop import Request, Summary
    from quantize.files.resume import Resume


def convert(
    model: options.Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Shipped recipe name or path of a YAML file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; must be absent or empty.")
    ],
    revision: options.Revision = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration text: builtin, a file, or a Hub set.")
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per calibration window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the calibration draw.")] = None,
    chat_template: options.ChatTemplate = None,
    text_field: options.TextField = None,
    bos: options.CalibrationBos = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a stage field, e.g. bits=3 or activations=none. Repeatable."
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Mean bits per weight of the quantized linears, scales counted, e.g. 4.5: those that suffer most from "
            "rounding, measured on calibration text, get 8 bits (activations: none) instead of "
            "the recipe's own."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what is done (blocks, layers that LaDiMo taught), so that a stopped run takes it "
            "up; default: OUTPUT.work, removed when the output is there."
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: go on after the last block that a stopped run of the same model, recipe, text and versions "
            "finished, else start anew; required: refuse to start anew; never: start anew and "
            "keep no blocks. Several processes (accelerate launch, torchrun) may go on from what "
            "any number of them kept."
        ),
    ] = "auto",
    strict_serving: Annotated[
        bool,
        typer.Option(
            "--strict-serving",
            help="Refuse a recipe (exit code 3) of whose output vLLM would not serve something on any GPU without an "
            "optional package, instead of saying so and going on.",
        ),
    ] = False,
    max_ram: Annotated[
        str | None,
        typer.Option(
            help="Most memory of the process, e.g. 6GB. Hidden states go to the disk, blocks are split by linear and "
            "passes get smaller, as far as that needs; where nothing suffices, exit code 8 and "
            "what would."
        ),
    ] = None,
    max_vram: Annotated[
        str | None, typer.Option(help="The same for the accelerator's memory.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda (in a launch the process's own), cuda:1, mps.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Computing dtype: auto, float32, bfloat16, float16.")
    ] = "auto",
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
        mode = _resume_mode(resume)
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
            require_free(output)
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


def _resume_mode(asked: str) -> Resume:
    from quantize.files.resume import Resume

    mode: Resume | None = next((known for known in get_args(Resume) if known == asked), None)
    if mode is None:
        raise UsageError(f"--resume {asked}: choose {', '.join(get_args(Resume))}")
    return mode


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
    for reason, names in summary.equal_tokens.items():
        console.print(
            f"in {len(names)} layers all tokens count the same ({reason}): {_list_names(names)}"
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
