"""Log lines of the library that go to stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer


class Told(logging.Handler):
    """Shows log lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        typer.echo(f"pq: {record.getMessage()}", err=True)


@contextmanager
def warnings_told(shown: bool = True) -> Iterator[None]:
    """Show warnings, those about windows of text once each; none where they are not to be shown."""
    from quantize.evaluate.protocols import said_once

    logger = logging.getLogger("quantize")
    handler = Told(logging.WARNING) if shown else logging.NullHandler()
    logger.addHandler(handler)
    try:
        with said_once():
            yield
    finally:
        logger.removeHandler(handler)
