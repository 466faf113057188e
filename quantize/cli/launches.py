"""Commands that several processes of accelerate or torchrun run together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from quantize.errors import LostError, PqError

if TYPE_CHECKING:
    from quantize.parallel.ranks import Ranks


def first_of_launch() -> bool:
    """Whether this process is the first of its launch, or alone: known before anything is loaded."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joining(
    keeps: bool,
    met: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Ranks, int | None]]:
    """Yield the ranks of the launch and this process's number on its machine
    (None for one that works alone).

    Of an expected error the first rank alone tells; the others end with the same code.
    keeps: whether blocks are kept.
    met: called in a launch once all processes are there, before any of them goes on.
    """
    from quantize.parallel.launch import is_launched, join, local_rank

    remedy = "start the command again"
    if keeps:
        remedy = "the same command goes on from the last block that is kept"
    first = True
    try:
        with join(remedy, _abandon, met) as ranks:
            first = ranks.first
            yield ranks, local_rank() if is_launched() else None
    except LostError:
        raise
    except PqError as err:
        if not first:
            sys.exit(err.exit_code)
        raise


def _abandon(err: LostError) -> None:
    typer.echo(f"pq: {err}", err=True)
    sys.stderr.flush()
    os._exit(err.exit_code)
