"""The progress bar: what is being done, how far it has come, time gone and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantize.cost.units import duration

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""
Inside = Callable[[str, float], None]
"""Called with (what is being done inside of a unit, which share of it is done)."""

_COUNTED = 9
"""Columns of a bar that is still seen to move."""
_NAME = 34
"""Columns for what is being done: leaves room for a bar and both times at 80 columns."""


class Eta:
    """Time left of a phase, from how far it has come since it was first heard of.

    Units may take minutes: what is known of one is how long the units before took in the mean, and
    inside of a unit, at which share of the last one's time the same step was reached. So what is
    left is known from the first step inside of the first unit on, and goes on falling between two.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.started = clock()
        self._what = ""
        self._began = (self.started, 0.0)
        self._last = (self.started, 0.0)
        self._total = 0.0
        self._unit = 0.0
        self._steps: dict[str, float] = {}
        self._profile: dict[str, float] = {}

    def heard(self, what: str, done: int, total: int) -> None:
        """Units done of a phase; a new phase begins anew, with what was done before it left out."""
        now = self._clock()
        if (what, float(total)) != (self._what, self._total):
            self._what, self._total = what, float(total)
            self._began = (now, float(done))
            self._steps, self._profile = {}, {}
        elif done > self._last[1]:
            took = now - self._unit
            self._profile = {step: at / took for step, at in self._steps.items()} if took else {}
            self._steps = {}
        self._unit = now
        self._last = (now, float(done))

    def inside(self, step: str, share: float) -> float:
        """Say that a step of a unit begins, before which `share` of its work is done as far as sizes
        tell; returns what part of the unit is taken to be done."""
        now = self._clock()
        self._steps[step] = now - self._unit
        part = min(max(self._profile.get(step, share), 0.0), 0.99)
        done = int(self._last[1]) + part
        if done > self._last[1]:  # never back
            self._last = (now, done)
        return done

    @property
    def gone(self) -> float:
        """Seconds since the command began."""
        return self._clock() - self.started

    @property
    def left(self) -> float | None:
        """Seconds until the phase ends; None where nothing of it is done yet."""
        (began, first), (last, done) = self._began, self._last
        if done <= first or last <= began:
            return None
        each = (last - began) / (done - first)
        # What comes after the unit under way is left in any case.
        least = max(0.0, self._total - int(done) - 1) * each
        return max(least, (self._total - done) * each - (self._clock() - last))


def words(eta: Eta) -> str:
    """Both times, told apart."""
    left = eta.left
    return f"{duration(eta.gone)} gone" + ("" if left is None else f", {duration(left)} left")


@contextmanager
def steps_bar(shown: bool = True) -> Iterator[tuple[Progress, Inside]]:
    """A rich progress bar on stderr; silent where it is not to be shown or stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    # a disabled bar would do, but older rich ends it with a line feed
    if not (shown and console.is_terminal):
        yield lambda what, done, total: None, lambda what, share: None
        return
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    eta = Eta()

    class Times(ProgressColumn):
        """Time gone and left."""

        def render(self, task: Task) -> Text:
            return Text(words(eta))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(_COUNTED), Times())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)
        phase = [""]

        def progress(what: str, done: int, total: int) -> None:
            eta.heard(what, done, total)
            phase[0] = f"{what} {min(done + 1, total)}/{total}" if total else what
            bar.update(task, description=_fit(phase[0]), completed=done, total=total or None)

        def inside(what: str, share: float) -> None:
            done = eta.inside(what, share)
            bar.update(task, description=_fit(f"{phase[0]} {what}"), completed=done)

        yield progress, inside


def _fit(text: str) -> str:
    """Text in the columns there are for it, its end kept: names differ there."""
    if len(text) <= _NAME:
        return f"{text:<{_NAME}}"
    head = text[: _NAME // 2 - 1]
    return f"{head}…{text[-(_NAME - len(head) - 1) :]}"


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[Progress]:
    """The same for work whose units are not looked into."""
    with steps_bar(shown) as (progress, _):
        yield progress
