"""Pieces that several commands share."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from quantize.errors import ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from rich.status import Status
    from rich.table import Table

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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


VERBOSE = "PQ_VERBOSE"
"""Set where the libraries' warnings are to be shown: `-v`."""
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
    """Keep the progress bars and advice of the libraries below us off the
    terminal, but for the warnings with `-v`; errors still raise.

    With this they are loaded: from here on garbage is collected again, and the sign of life ends.
    """
    import gc

    from quantize.model.transformers_api import silence

    silence(warnings=bool(os.environ.get(VERBOSE)))
    hush()
    gc.enable()
    _sign_of_life.close()


_sign_of_life = ExitStack()
"""What is shown while libraries are loaded."""


def show_life() -> None:
    """On a terminal, say within a second that something goes on, until `quiet_libraries`."""
    if sys.stderr.isatty():
        _sign_of_life.enter_context(loading("loading torch and transformers"))


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; UsageError for one that is not there.

    local_rank: the CUDA device that is meant by none in particular, and
    which is made the current one.
    """
    import torch

    if name == "auto":
        # accelerate launch --cpu
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        name = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            device = torch.device("cuda", local_rank) if device.index is None else device
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise UsageError(
            f"--device {name}: not usable here ({str(err).splitlines()[0]}); try --device cpu",
        ) from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` computes in float32 on a CPU and in bfloat16 on an accelerator."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in names:
        raise UsageError(f"--dtype {name}: choose one of auto, {', '.join(names)}")
    return names[name]


def local_model(model: str, revision: str | None = None, aloud: bool = True) -> Path:
    """A model folder: `model` itself, or what the Hub's cache holds of `org/name`, which may end with
    `@` and a revision. Only a Hub id touches the network.

    revision: branch, tag or commit of a Hub id. aloud: whether to say on stderr what is fetched.
    """
    folder = Path(model).expanduser()
    try:
        there = bool(model) and folder.is_dir()
    except OSError as err:
        raise ModelError(
            f"{model[:80]}: cannot be opened ({err.strerror}); give a local model folder",
        ) from None
    if there:
        if revision is not None:
            raise UsageError(
                f"--revision {revision}: {model} is a local folder, which has none; leave it out, "
                "or give a Hub id"
            )
        return folder
    name, at, wanted = model.partition("@")
    if folder.exists() or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"{model}: no such folder; give a local model folder or a Hub id (org/name)",
        )
    if at and (revision or not wanted):
        problem = f"--revision {revision} and" if revision else "no revision behind"
        raise UsageError(f"{problem} {model}; name the revision once, as org/name@REVISION")
    from quantize.files.hub import fetch

    def say(line: str) -> None:
        if aloud:
            typer.echo(f"pq: {line}", err=True)

    return fetch(name, revision or wanted or None, say, bars=aloud and sys.stderr.isatty())
