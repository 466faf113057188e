"""The log of a conversion: OUTPUT.log, and the lines of it that go to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from quantize.cli.progress import Progress
from quantize.cli.told import OF_TEXT, Told
from quantize.errors import PqError

_SHOWN = (
    "quantize.files.lock",
    "quantize.files.resume",
    OF_TEXT,
    "quantize.conversion.draft",
    "quantize.conversion.serving",
)
"""Loggers all of whose lines are shown: what becomes of an earlier run's state, what is said of the
text, what of the model's folder is read otherwise than it seems, and what engines will not serve."""


_LOGGER = logging.getLogger("quantize")
_PREPARES = ("hashing source", "checking source")
"""Steps of a conversion before the first that computes."""


class RunLog:
    """OUTPUT.log, which is there from the first step on that computes: a start that fails leaves
    none."""

    def __init__(self, output: Path, work: Path) -> None:
        from quantize.files.resume import in_use

        self.path = output.with_name(output.name + ".log")
        self._goes_on = in_use(work)
        self._early = _Held()
        self._file: _Log | None = None

    def begin(self) -> None:
        """Write what was said so far, and from now on all that is said; behind what a run wrote
        that is gone on from. OutputError where that cannot be."""
        from quantize.files.disk import report_errors

        if self._file is not None:
            return
        with report_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = _Log(self.path, mode="a" if self._goes_on else "w", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in self._early.records:
            file.handle(record)
        self._file = file
        _LOGGER.removeHandler(self._early)
        _LOGGER.addHandler(file)

    def begins(self, progress: Progress, said: str) -> Progress:
        """The same progress, the first step of which that computes begins the log, and is told
        where no terminal shows a bar: what is wrong with the input has then been told, in one line."""
        quiet = [sys.stderr.isatty()]

        def told(what: str, done: int, total: int) -> None:
            if what not in _PREPARES:
                self.begin()
                if not quiet[0]:
                    sys.stderr.write(f"pq: {said}\n")
                quiet[0] = True
            progress(what, done, total)

        return told

    def hold(self) -> None:
        """Keep what is said until the log begins."""
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.addHandler(self._early)
        # The report shows it; in the checkpoint itself paths of this machine have no place.
        _LOGGER.info("started %s", json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd()}))

    def close(self) -> None:
        """End the log, or forget what was kept."""
        _LOGGER.removeHandler(self._early)
        if self._file is not None:
            self._file.close()
            _LOGGER.removeHandler(self._file)


@contextmanager
def log_run(output: Path, work: Path) -> Iterator[RunLog]:
    """Write OUTPUT.log and say on stderr what becomes of an earlier run's state. A start that fails
    leaves neither a log nor folders."""
    from quantize.files.resume import count_kept_blocks

    missing = [p for path in (output, work) for p in path.absolute().parents if not p.exists()]
    log = RunLog(output, work)
    log.hold()
    told = Told()
    slow = Told()
    slow.addFilter(_WorthALine().filter)
    for name in _SHOWN:
        logging.getLogger(name).addHandler(told)
    logging.getLogger("quantize.conversion.pace").addHandler(slow)
    try:
        yield log
    except BaseException as err:
        if not isinstance(err, PqError | KeyboardInterrupt | SystemExit):
            log.begin()  # what is no mistake of the user is to be looked into
        _LOGGER.error("stopped: %s", str(err) or type(err).__name__)
        for folder in sorted(set(missing), key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # one that holds something stays
                folder.rmdir()
        if not isinstance(err, PqError) and (done := count_kept_blocks(work)):
            typer.echo(
                f"pq: {done} blocks are kept in {work}; the same command goes on from there",
                err=True,
            )
        raise
    finally:
        log.close()
        for name in _SHOWN:
            logging.getLogger(name).removeHandler(told)
        logging.getLogger("quantize.conversion.pace").removeHandler(slow)


class _WorthALine:
    """Lets warnings through, and where no progress bar is seen a line a block; quick blocks share
    one."""

    def __init__(self) -> None:
        self._last = time.time()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is to be shown."""
        from quantize.conversion.pace import SLOW

        if record.levelno >= logging.WARNING:
            return True
        if sys.stderr.isatty() or record.created - self._last < SLOW:
            return False
        self._last = record.created
        return True


class _Held(logging.Handler):
    """Keeps lines for later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.records.append(record)


class _Log(logging.FileHandler):
    """A log whose disk may be full: what cannot be written is left out, since the
    conversion's own error tells more."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing, where logging would print a traceback."""

    def close(self) -> None:
        """Close the file, written to its end or not."""
        with suppress(OSError):
            super().close()
