"""The `pq` command: parses, calls, renders. Heavy imports happen inside commands."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from quantize.cli import bench as bench_command
from quantize.cli import compare as compare_command
from quantize.cli import convert as convert_command
from quantize.cli import draft as draft_command
from quantize.cli import estimate as estimate_command
from quantize.cli import evaluate as evaluate_command
from quantize.cli import gate as gate_command
from quantize.cli import inspect as inspect_command
from quantize.cli import models as models_command
from quantize.cli import plan as plan_command
from quantize.cli import push as push_command
from quantize.cli import recipe as recipe_command
from quantize.cli import recommend as recommend_command
from quantize.cli import report as report_command
from quantize.cli import serve_check as serve_check_command
from quantize.cli import verify as verify_command
from quantize.cli.common import VERBOSE, end_life, hush, show_life
from quantize.cli.inspect import printable
from quantize.cli.pointers import PointingCommand, PointingGroup
from quantize.errors import LostError, PqError, RecipeError, StoppedError, UsageError
from quantize.tested import version_notice
from quantize.version import __version__

app = typer.Typer(
    name="pq",
    cls=PointingGroup,
    help="Quantize a Hugging Face model with a recipe; get a packed, verified checkpoint to serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --num-fewshot and --num_fewshot are the same option: other tools of
    # the field write underscores.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda t: t.replace("_", "-"),
    },
)
app.command("convert", cls=PointingCommand)(convert_command.convert)
app.command("estimate", cls=PointingCommand)(estimate_command.estimate)
app.command("eval")(evaluate_command.evaluate)
app.command("compare")(compare_command.compare)
app.command("draft")(draft_command.draft)
app.command("inspect")(inspect_command.inspect)
app.command("models")(models_command.models)
app.command("plan")(plan_command.plan)
app.command("recommend", cls=PointingCommand)(recommend_command.recommend)
app.command("verify")(verify_command.verify)
app.command("push")(push_command.push)
app.command("report")(report_command.report)
app.command("serve-check")(serve_check_command.serve_check)
app.add_typer(gate_command.app, name="gate")
app.add_typer(recipe_command.app, name="recipe")
app.add_typer(bench_command.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pq {__version__}")
        raise typer.Exit


_COMPUTING = {
    *("convert", "estimate", "eval", "compare", "draft"),
    *("recommend", "verify", "bench", "gate"),
}
"""Commands that compute with the libraries whose releases may be untested;
the others only read files."""


_LOADING = _COMPUTING - {"bench"}
"""Commands that call `quiet_libraries` when the libraries are loaded."""


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show what torch, transformers and others warn of."),
    ] = False,
) -> None:
    """Options of `pq` itself."""
    if verbose:
        os.environ[VERBOSE] = "1"
    hush()
    # Before a command imports transformers, where the same would be said as a Python warning.
    computes = ctx.invoked_subcommand in _COMPUTING and not {"-h", "--help"} & set(sys.argv)
    line = version_notice()  # asked for all, since what was looked at once is never warned of
    if computes and line:
        typer.echo(f"pq: note: {line}", err=True)
    if ctx.invoked_subcommand in _LOADING and computes:
        show_life()
        ctx.call_on_close(end_life)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    # Unwinding removes the half-written output, which a plain SIGTERM would leave behind.
    raise SystemExit(128 + number)


def run() -> NoReturn:
    """The process `pq`: `main`, then all that was registered for its end, and no more.

    What the interpreter does beyond that, to take the libraries' modules apart, takes more than a
    second.
    """
    status = 0
    try:
        main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read us has left
        status = status or 1
    os._exit(status)


def main() -> None:
    """What `pq` does: expected errors become one line on stderr and their documented exit code."""
    # Read when torch loads: spinning threads make a machine that others use several
    # times slower (36 s became 9 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if {*sys.argv[1:3]} & _LOADING:
        # Torch and transformers are half a million objects of which none is garbage, looked at over
        # and over while they are loaded: a fifth of that time.
        gc.disable()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    sys.argv[1:] = _verbose_first(sys.argv[1:])
    try:
        app()
    except LostError as err:
        typer.echo(f"pq: {err}", err=True)
        sys.stderr.flush()
        # a library that waits for the lost process would not let this one go
        os._exit(err.exit_code)
    except StoppedError as err:
        typer.echo(f"pq: {err}", err=True)
        sys.exit(err.exit_code)
    except PqError as err:
        # Those two have a line for each of their problems; a line feed in
        # any other is part of a path.
        lines = str(err).split("\n") if isinstance(err, RecipeError | UsageError) else [str(err)]
        for line in lines:
            typer.echo(f"pq: error: {printable(line)}", err=True)
        sys.exit(err.exit_code)
    except (MemoryError, RuntimeError) as err:
        if not _is_out_of_memory(err):
            raise
        typer.echo(
            "pq: error: out of memory; lower --nsamples or --seqlen, or use a machine with more",
            err=True,
        )
        sys.exit(8)
    except SystemExit as left:
        if left.code == 130:  # typer turns an interrupt into this
            typer.echo("pq: interrupted; no output was written", err=True)
        raise


def _verbose_first(words: list[str]) -> list[str]:
    """`-v` means the same behind the command as in front of it."""
    rest = [word for word in words if word not in ("-v", "--verbose")]
    return words if len(rest) == len(words) else ["-v", *rest]


def _is_out_of_memory(err: Exception) -> bool:
    # torch has no common class for it: accelerators say "out of memory", the CPU
    # allocator "can't allocate memory".
    words = ("out of memory", "can't allocate memory")
    return isinstance(err, MemoryError) or any(word in str(err) for word in words)
