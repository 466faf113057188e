"""Pieces that several commands share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from quantize.api import places
from quantize.api.places import VERBOSE, Progress, pick_device, pick_dtype

if TYPE_CHECKING:
    from rich.status import Status
    from rich.table import Table

__all__ = [
    "VERBOSE",
    "Progress",
    "end_life",
    "hush",
    "loading",
    "local_model",
    "pick_device",
    "pick_dtype",
    "quiet_libraries",
    "say",
    "show_life",
    "stop_on_signals",
    "titled_table",
]


def end_life() -> None:
    """End the sign of life."""
    _sign_of_life.close()


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


_LIBRARIES = (
    "accelerate",
    "compressed_tensors",
    "datasets",
    "fsspec",
    "huggingface_hub",
    "matplotlib",
    "torch",
)


def hush() -> None:
    """Keep the warnings of the libraries below us off the terminal, before any of them is loaded.
    Those who ask for them (`-v`, PYTHONWARNINGS, `python -W`) get them."""
    import logging
    import warnings

    if os.environ.get(VERBOSE):
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """`quantize.api.places.quiet_libraries`, and the end of the sign of life: they are loaded."""
    places.quiet_libraries()
    hush()
    _sign_of_life.close()


_sign_of_life = ExitStack()
"""What is shown while libraries are loaded."""


def show_life() -> None:
    """On a terminal, say within a second that something goes on, until `quiet_libraries`."""
    if sys.stderr.isatty():
        _sign_of_life.enter_context(loading("loading torch and transformers"))


def say(line: str) -> None:
    """A line on stderr."""
    typer.echo(f"pq: {line}", err=True)


def local_model(model: str, revision: str | None = None, aloud: bool = True) -> Path:
    """`quantize.api.places.local_model`; aloud: whether to say on stderr what is fetched."""
    return places.local_model(
        model, revision, say if aloud else places.silent, aloud and sys.stderr.isatty()
    )
