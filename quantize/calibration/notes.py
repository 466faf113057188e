"""What is to be said of a text that was read, and how many odd rows it may have."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from quantize.errors import DataError

Notes = tuple[tuple[int, str], ...]
"""(level of logging, one line)."""
_MOST = 0.1
"""Share of a text's rows that may be left out: with more, what is left is hardly the text that was
meant."""


class OddRows:
    """Rows that had to be left out, and the first reason.

    source: the text, for messages. why: what went wrong with them, behind their number.
    """

    def __init__(self, source: str, unit: str, why: str) -> None:
        self._source, self._unit, self._why = source, unit, why
        self._numbers: list[int] = []
        self._reason = ""

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, reason: str) -> None:
        """Count a row; its number is where it stands in the set."""
        if not self._numbers:
            self._reason = reason
        self._numbers.append(number)

    def require_few(self, read: int) -> None:
        """DataError where more than a tenth of the rows read, and more than one, are odd; and
        where all are."""
        count = len(self._numbers)
        if count and (count == read or count > max(1, _MOST * read)):
            of = "" if read == 1 else f" ({count} of {read} rows read {self._why})"
            raise DataError(f"{self._source} {self._unit} {self._numbers[0]}: {self._reason}{of}")

    def notes(self, read: int) -> Notes:
        """A line where there were any."""
        if not self._numbers:
            return ()
        shown = ", ".join(map(str, self._numbers[:3]))
        more = ", …" if len(self._numbers) > 3 else ""
        first = f"{self._unit} {shown}{more}; the first: {self._reason}"
        line = f"{len(self)} of {read} rows read {self._why} and were left out ({first})"
        return ((logging.WARNING, f"{self._source}: {line}"),)


def joined(*parts: Sequence[tuple[int, str]]) -> Notes:
    """All notes in order, each once."""
    return tuple(dict.fromkeys(note for part in parts for note in part))
