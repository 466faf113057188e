"""Time gone and time left, told apart and known early; what is shown where nobody sees a bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest

from quantize.cli.common import VERBOSE
from quantize.cli.conversion_log import _WorthALine
from quantize.cli.progress import Eta, _fit, words


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_blocks_that_take_minutes(clock: Clock):
    eta = Eta(clock)
    assert eta.left is None
    clock.now += 30  # hashing
    eta.heard("quantizing", 0, 10)
    assert eta.left is None
    clock.now += 300
    eta.heard("quantizing", 1, 10)
    assert eta.left == pytest.approx(2700)
    clock.now += 200
    assert eta.left == pytest.approx(2500)  # it goes on falling between two blocks
    clock.now += 4000
    assert eta.left == pytest.approx(8 * 300)  # overdue: those behind it are left in any case
    assert eta.gone == 4530
    assert words(eta) == "1 h 15 min gone, 40 min 00 s left"


def test_a_run_taken_up_counts_its_own_blocks(clock: Clock):
    eta = Eta(clock)
    eta.heard("quantizing", 90, 100)
    clock.now += 10
    eta.heard("quantizing", 91, 100)
    assert eta.left == pytest.approx(90)


def test_inside_of_the_first_block_sizes_tell(clock: Clock):
    eta = Eta(clock)
    eta.heard("quantizing", 0, 4)
    clock.now += 50
    assert eta.inside("gptq q_proj", 0.25) == 0.25
    assert eta.left == pytest.approx(750)


def test_inside_of_a_later_block_the_one_before_tells(clock: Clock):
    """A stage that takes most of the time encodes nothing: its share of the time is known all the same."""
    eta = Eta(clock)
    eta.heard("quantizing", 0, 3)
    eta.inside("awq", 0.0)
    clock.now += 90
    eta.inside("rtn", 0.0)
    clock.now += 10
    eta.heard("quantizing", 1, 3)
    clock.now += 90
    assert eta.inside("rtn", 0.0) == pytest.approx(1.9)
    assert eta.left == pytest.approx(110)


def test_a_new_phase_begins_anew(clock: Clock):
    eta = Eta(clock)
    eta.heard("quantizing", 0, 2)
    clock.now += 100
    eta.heard("quantizing", 2, 2)
    eta.heard("checking", 0, 8)
    assert eta.left is None
    clock.now += 1
    eta.heard("checking", 1, 8)
    assert eta.left == pytest.approx(7)


def test_names_keep_their_ends():
    long = "quantizing 31/80 gptq model.mlp.experts.127.down_proj"
    assert len(_fit(long)) == len(_fit("x")) == 34
    assert _fit(long).startswith("quantizing 31/80")
    assert _fit(long).endswith("down_proj")


def test_a_line_a_block_where_they_take_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    worth = _WorthALine()
    began = worth._last

    def shown(seconds: float, level: int = logging.INFO) -> bool:
        record = logging.LogRecord("x", level, "", 0, "", (), None)
        record.created = began + seconds
        return worth.filter(record)

    assert [shown(at) for at in (1, 2, 6, 7, 13, 200)] == [False, False, True, False, True, True]
    assert shown(200.1, logging.WARNING)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not shown(999)


@pytest.mark.parametrize("verbose", [False, True])
def test_warnings_of_libraries_are_shown_to_those_who_ask(
    pq: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, verbose: bool
):
    import warnings

    def warns(*args: object, **how: object) -> None:
        warnings.warn("a library's advice", FutureWarning, stacklevel=1)
        logging.getLogger("torch").warning("its log")

    monkeypatch.setenv(VERBOSE, "")  # and so taken back afterwards
    monkeypatch.setattr(sys, "warnoptions", [])
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    from quantize.cli import app

    seen: list[object] = []
    command = app.command("warns", hidden=True)(lambda: warns())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code, _, _ = pq("warns", *(["-v"] if verbose else []))
            seen += [str(one.message) for one in caught]
    finally:
        level = logger.level
        logger.setLevel(before)
        app.registered_commands = [
            one for one in app.registered_commands if one.callback is not command
        ]
    assert code == 0
    assert ("a library's advice" in seen) == verbose
    assert (level >= logging.ERROR) == (not verbose)
