"""Pieces that several commands share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from quantize.api import places
from quantize.api.places import Progress, pick_device, pick_dtype, quiet_libraries

if TYPE_CHECKING:
    from rich.status import Status
    from rich.table import Table

__all__ = [
    "Progress",
    "loading",
    "local_model",
    "pick_device",
    "pick_dtype",
    "progress_bar",
    "quiet_libraries",
    "say",
    "stop_on_signals",
    "titled_table",
]


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[Progress]:
    """A rich progress bar on stderr with the time left; silent where it is not to be shown
    or stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    # a disabled bar would do, but older rich ends it with a line feed
    if not (shown and console.is_terminal):
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(
            task,
            description=what,
            completed=done,
            total=total,
        )


def loading(what: str) -> Status:
    """A sign of life on a terminal's stderr, as a context, until its `stop`: the libraries alone
    take seconds to load."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def titled_table(title: str) -> Table:
    """A rich table in the one style of all commands, columns to be added."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
    )


@contextmanager
def stop_on_signals(aloud: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield whether SIGINT or SIGTERM has come. The first of them does nothing else,
    the next what they always do.

    aloud: say so on stderr.
    """
    asked: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    left_alone = (signal.SIG_IGN, None)
    usual = {number: handler for number, handler in handlers.items() if handler not in left_alone}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        restore()
        # not by way of sys.stderr: the signal may have come while it was being written to
        if aloud:
            os.write(
                2,
                b"pq: stops when the block under way is done and kept; again to stop at once\n",
            )

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        restore()


def say(line: str) -> None:
    """A line on stderr."""
    typer.echo(f"pq: {line}", err=True)


def local_model(model: str, revision: str | None = None, aloud: bool = True) -> Path:
    """`quantize.api.places.local_model`; aloud: whether to say on stderr what is fetched."""
    return places.local_model(
        model, revision, say if aloud else places.silent, aloud and sys.stderr.isatty()
    )
