"""`pq convert`: recipe and model in, packed checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli import options
from quantize.cli.common import end_life, say, stop_on_signals
from quantize.cli.conversion_log import log_run
from quantize.cli.conversion_summary import next_steps, print_summary
from quantize.cli.launches import first_of_launch, joining
from quantize.cli.progress import steps_bar

if TYPE_CHECKING:
    from quantize.conversion.loop import Request


def convert(
    ctx: typer.Context,
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
    check_windows: options.CheckWindows = options.CHECK_WINDOWS,
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
    from quantize.api.conversions import conversion_request
    from quantize.cost.peak import keep_little
    from quantize.files.transaction import require_name

    require_name(output)
    keep_little()
    # In a launch signals ask to stop from the moment on in which another process may go
    # ahead of this one: a launcher that loses a process sends SIGTERM to those that are
    # left, which then say whom they miss.
    signals = _Signals(keeps=resume != "never")
    with signals, joining(signals.keeps, signals.catch) as (ranks, local_rank):
        request = conversion_request(
            model,
            recipe,
            output,
            revision=revision,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            chat_template=chat_template,
            text_field=text_field,
            bos=bos,
            set=assignments,
            target_bpw=target_bpw,
            work=work,
            resume=resume,
            strict_serving=strict_serving,
            check_windows=check_windows,
            overwrite=overwrite,
            max_ram=max_ram,
            max_vram=max_vram,
            device=device,
            dtype=dtype,
            say=say,
            bars=sys.stderr.isatty(),
            loaded=end_life,
            ranks=ranks,
            local_rank=local_rank,
        )
        if ranks.first:
            said = f"converts {model} with {recipe} to {output}"
            _lead(ctx, request, said, own=work is None, as_json=as_json, signals=signals)
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
            self._asked = self.enter_context(stop_on_signals(aloud=first_of_launch()))

    def stop(self) -> bool:
        """Whether one has come."""
        return self._asked is not None and self._asked()


def _lead(
    ctx: typer.Context, request: Request, said: str, own: bool, as_json: bool, signals: _Signals
) -> None:
    """Convert, write and tell. said: what is begun, for those without a bar. own: whether the work
    folder goes when the output is there."""
    from quantize.api.conversions import conversion_of
    from quantize.conversion.loop import convert as run

    kept = request.work
    assert kept is not None
    with log_run(request.output, kept) as log:
        with steps_bar() as (progress, inside), signals:
            signals.catch()
            summary = run(request, log.begins(progress, said), signals.stop, inside)
        log.begin()
        if own:
            shutil.rmtree(kept, ignore_errors=True)
        logging.getLogger("quantize").info("summary %s", json.dumps(dataclasses.asdict(summary)))
        _write_report(request.output)
    steps = next_steps(ctx, summary)
    if as_json:
        facts = dataclasses.asdict(conversion_of(summary))
        typer.echo(json.dumps(facts | {"next": steps.as_json()}, indent=2))
    else:
        print_summary(summary, steps)


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
