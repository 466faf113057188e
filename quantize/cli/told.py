"""Log lines of the library that go to stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

OF_TEXT = "quantize.calibration.fit"
"""Logger of what is said of a text and its windows, each line of which is shown."""


class Told(logging.Handler):
    """Shows log lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        typer.echo(f"pq: {record.getMessage()}", err=True)


@contextmanager
def warnings_told(shown: bool = True) -> Iterator[None]:
    """Show warnings, and all that is said of the text, that once each; nothing where it is not to
    be shown."""
    from quantize.evaluation.protocols import said_once

    logger = logging.getLogger("quantize")
    handler = Told() if shown else logging.NullHandler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name == OF_TEXT)
    logger.addHandler(handler)
    of_text, level = logging.getLogger(OF_TEXT), logging.getLogger(OF_TEXT).level
    of_text.setLevel(logging.INFO)
    try:
        with said_once():
            yield
    finally:
        of_text.setLevel(level)
        logger.removeHandler(handler)
