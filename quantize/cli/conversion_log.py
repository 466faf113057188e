"""The log of a conversion: OUTPUT.log, and the lines of it that go to stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from quantize.cli.told import OF_TEXT, Told
from quantize.errors import PqError

_SHOWN = ("quantize.files.lock", "quantize.files.resume", OF_TEXT, "quantize.convert.serving")
"""Loggers all of whose lines are shown: what becomes of an earlier run's state, what is said of the
text, and what engines will not serve."""


@contextmanager
def log_run(output: Path, work: Path) -> Iterator[None]:
    """Write OUTPUT.log, behind what a run wrote that may be gone on from, and say on
    stderr what becomes of that."""
    from quantize.files.disk import report_errors
    from quantize.files.resume import count_kept_blocks, in_use

    path = output.with_name(output.name + ".log")
    with report_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _Log(path, mode="a" if in_use(work) else "w", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("quantize")
    told = Told()
    slow = Told()
    slow.addFilter(_worth_a_line)
    logger.setLevel(logging.INFO)
    logger.addHandler(file)
    for name in _SHOWN:
        logging.getLogger(name).addHandler(told)
    logging.getLogger("quantize.convert.pace").addHandler(slow)
    try:
        yield
    except BaseException as err:
        logger.error("stopped: %s", str(err) or type(err).__name__)
        if not isinstance(err, PqError) and (done := count_kept_blocks(work)):
            typer.echo(
                f"pq: {done} blocks are kept in {work}; the same command goes on from there",
                err=True,
            )
        raise
    finally:
        file.close()
        logger.removeHandler(file)
        for name in _SHOWN:
            logging.getLogger(name).removeHandler(told)
        logging.getLogger("quantize.convert.pace").removeHandler(slow)


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Warnings, and blocks that take long where no progress bar is seen."""
    from quantize.convert.pace import SLOW

    unseen = not sys.stderr.isatty()
    return record.levelno >= logging.WARNING or (unseen and getattr(record, "seconds", 0.0) >= SLOW)


class _Log(logging.FileHandler):
    """A log whose disk may be full: what cannot be written is left out, since the
    conversion's own error tells more."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing, where logging would print a traceback."""

    def close(self) -> None:
        """Close the file, written to its end or not."""
        with suppress(OSError):
            super().close()
