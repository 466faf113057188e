"""`pq convert`: recipe and model in, packed checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli.common import local_model, pick_device, pick_dtype, progress_bar, quiet_libraries
from quantize.cli.figures import print_restructured

if TYPE_CHECKING:
    from quantize.convert import Request, Summary


def convert(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, or Hub id org/name.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Shipped recipe name or path of a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be absent or empty.")],
    dataset: Annotated[str | None, typer.Option(help="Calibration text: builtin, a file, or a Hub set.")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per calibration window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the calibration draw.")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template", help="Render rows with the tokenizer's chat template.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of jsonl and parquet rows; default: text.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a stage field, e.g. bits=3 or activations=none. Repeatable."),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Mean bits per weight of the quantized linears, scales counted, e.g. 4.5: those that suffer most from "
            "rounding, measured on calibration text, get 8 bits (activations: none) instead of the recipe's own."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what took long (layers that LaDiMo taught), so that a stopped run takes it up; "
            "default: OUTPUT.work, removed when the output is there."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Computing dtype: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Quantize a model; the output appears whole or not at all. Beside it: OUTPUT.log and OUTPUT.report.html."""
    from quantize.convert import Request
    from quantize.convert import convert as run
    from quantize.overrides import with_stage_fields
    from quantize.recipe import load_recipe
    from quantize.writer import require_free

    chosen = load_recipe(recipe).with_overrides(
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        text_field=text_field,
    )
    chosen = with_stage_fields(chosen, assignments or [])
    require_free(output)
    quiet_libraries()
    place = pick_device(device)
    kept = work or output.with_name(output.name + ".work")
    computing = pick_dtype(dtype, place)
    request = Request(local_model(model), chosen, output, place, computing, work=kept, target_bpw=target_bpw)
    if int(os.environ.get("RANK", "0")):
        _assist(request)
        return
    handler = _log_to(output.with_name(output.name + ".log"))
    try:
        with progress_bar() as progress:
            summary = run(request, progress)
        _wait_for_all()
        if work is None:
            shutil.rmtree(kept, ignore_errors=True)
        logging.getLogger("quantize").info("summary %s", json.dumps(dataclasses.asdict(summary)))
        _write_report(output)
    except BaseException as err:
        logging.getLogger("quantize").error("stopped: %s", str(err) or type(err).__name__)
        raise
    finally:
        handler.close()
        logging.getLogger("quantize").removeHandler(handler)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), indent=2))
    else:
        _print(summary)


def _assist(request: Request) -> None:
    """Take part as one of several processes: what it writes is what the first one writes, and goes."""
    from quantize.convert import convert as run

    with tempfile.TemporaryDirectory(prefix="pq-") as folder:
        run(dataclasses.replace(request, output=Path(folder) / "out"))
        _wait_for_all()


def _wait_for_all() -> None:
    """Until all processes of a launch are here, so that none keeps results in a folder that another removes."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _write_report(output: Path) -> None:
    from quantize.report import write

    try:
        page = write(output)
    except Exception as err:  # the conversion is done and worth more than its page
        logging.getLogger("quantize").exception("no report")
        typer.echo(f"pq: warning: the report was not written ({err}); pq report {output} tries again", err=True)
    else:
        typer.echo(f"report: {page}", err=True)


def _log_to(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("quantize")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def _megabytes(summary: Summary) -> str:
    return f"{summary.output_bytes / 1e6:.1f} MB (source {summary.source_bytes / 1e6:.1f} MB)"


def _named(names: Sequence[str], shown: int = 7) -> str:
    rest = f" and {len(names) - shown} more, all in pq.json" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _print(summary: Summary) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    ratio = summary.source_bytes / summary.output_bytes
    size = f"{summary.output_bytes / 1e6:.1f} MB ({ratio:.2f}x smaller)" if ratio >= 1.005 else _megabytes(summary)
    bits = f"{summary.quantized_linears} linears at {summary.bits_per_weight:.3f} bits per weight, "
    done = bits if summary.quantized_linears else ""
    console.print(f"[bold]{summary.output}[/bold]: {done}{size}, {summary.seconds:.1f} s")
    if summary.restructured:
        print_restructured(console, summary.restructured, summary.activated_reduction)
    for lost in summary.lost:
        console.print(f"[yellow]not in this format:[/yellow] {lost}")
    if summary.untied_head_bytes:
        console.print(
            f"the head no longer shares the embedding's weight: {summary.untied_head_bytes / 1e6:.1f} MB more"
        )
    if summary.promoted:
        console.print(f"{len(summary.promoted)} linears got more bits to spend the target: {_named(summary.promoted)}")
    if summary.fallbacks:
        console.print(
            f"[yellow]{len(summary.fallbacks)} linears were not fitted to their inputs[/yellow] (pq.json says why): "
            f"{_named(summary.fallbacks)}"
        )
