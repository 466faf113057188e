"""Several processes that are stopped, killed or fail end all, and what they kept serves any number of processes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from processes import Launch, pq
from resumed import BLOCKS, files_of, model_of

from quantize.cli import convert as cli_convert
from quantize.conversion import loop as convert_module
from quantize.errors import ModelError, OutputError
from quantize.parallel import launch

Before = Callable[[int], None]


class Command:
    """A conversion by the command line."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.folder, self.model, self.text = folder, model, text
        self.output, self.work = folder / "out", folder / "out.work"
        self.runs = 0

    def start(
        self, size: int, *more: object, before: Before | None = None, output: Path | None = None
    ) -> Launch:
        self.runs += 1
        told = [
            "-m",
            self.model,
            "-o",
            output or self.output,
            "--device",
            "cpu",
            "--recipe",
            "gptq",
            "--dataset",
        ]
        arguments = ["convert", *told, self.text, "--nsamples", 6, "--seqlen", 32, *more]
        return pq(size, arguments, self.folder / f"said-{self.runs}", before)

    def codes(
        self, size: int, *more: object, before: Before | None = None, output: Path | None = None
    ) -> list[int]:
        self.last = self.start(size, *more, before=before, output=output)
        return self.last.wait()

    def has_begun(self, number: int) -> bool:
        """Whether this first rank holds the work folder, which it takes once it has met the others, or has ended."""
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        lock = self.work / "lock"
        with suppress(FileNotFoundError):  # it is gone when the conversion is done
            return lock.read_text() == str(number)
        return False


@pytest.fixture
def command(tiny: ModelMaker, text_file: Path, tmp_path: Path) -> Command:
    return Command(model_of(tiny, "gptq"), text_file, tmp_path)


@pytest.fixture(scope="module")
def expected(
    tiny: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process writes that is not stopped."""
    alone = Command(model_of(tiny, "gptq"), text_file, tmp_path_factory.mktemp("alone"))
    assert alone.codes(1, "--resume", "never") == [0], alone.last.texts()
    return files_of(alone.output)


def before_block(index: int, action: Callable[[], None], *ranks: int) -> Before:
    """Patch: do something on these ranks before the block is converted."""
    real = convert_module.Conversion.block

    def before(rank: int) -> None:
        def block(self: Any, number: int, streams: Any) -> Any:
            if number == index and rank in ranks:
                action()
            return real(self, number, streams)

        convert_module.Conversion.block = block  # type: ignore[method-assign]

    return before


def own_signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_who_is_asked_to_stop_makes_all_stop(
    command: Command, expected: dict[str, bytes], number: signal.Signals, rank: int
):
    asked = before_block(1, own_signal(number), rank)
    assert command.codes(3, before=asked) == [75, 75, 75], command.last.texts()
    texts = command.last.texts()
    assert (
        f"pq: stopped after block 2 of {BLOCKS}; the same command goes on from there\n" in texts[0]
    )
    assert texts[1:] == ["", ""]
    assert not command.output.exists()
    assert command.codes(2, "--resume", "required") == [0, 0], command.last.texts()
    assert "pq: goes on after block 2" in command.last.texts()[0]
    assert files_of(command.output) == expected
    assert not command.work.exists()


def test_one_goes_on_from_what_several_kept_and_the_reverse(
    command: Command, expected: dict[str, bytes]
):
    stops = [before_block(index, own_signal(signal.SIGTERM), 0) for index in (0, 1)]
    assert command.codes(1, before=stops[0]) == [75]
    assert command.codes(3, before=stops[1]) == [75, 75, 75], command.last.texts()
    assert command.codes(1, "--resume", "required") == [0], command.last.texts()
    assert "pq: goes on after block 2" in command.last.texts()[0]
    assert files_of(command.output) == expected


@pytest.mark.parametrize("lost", [0, 2])
def test_a_dead_rank_ends_the_others(command: Command, expected: dict[str, bytes], lost: int):
    assert command.codes(3, before=before_block(1, own_signal(signal.SIGKILL), lost)) == [
        -signal.SIGKILL if rank == lost else 75 for rank in range(3)
    ], command.last.texts()
    line = f"pq: rank {lost} no longer answers; the same command goes on from the last block that is kept\n"
    assert [text for rank, text in enumerate(command.last.texts()) if rank != lost] == [line, line]
    assert command.codes(2 if lost else 1, "--resume", "required") == [0] * (2 if lost else 1)
    assert "pq: goes on after block 1" in command.last.texts()[0]
    assert files_of(command.output) == expected


def test_a_rank_that_is_behind_says_whom_it_misses(command: Command):
    """A launcher that loses a process sends SIGTERM to the others, wherever they are by then."""
    go = command.folder / "go"

    def before(rank: int) -> None:
        def wait() -> None:
            while rank and not go.exists():
                time.sleep(0.01)

        cli_convert.quiet_libraries = wait

    running = command.start(2, before=before)
    lock = command.work / "lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    os.kill(running.ids[0], signal.SIGKILL)
    os.kill(running.ids[1], signal.SIGTERM)
    go.touch()
    assert running.wait() == [-signal.SIGKILL, 75], running.texts()
    line = (
        "pq: rank 0 no longer answers; the same command goes on from the last block that is kept\n"
    )
    assert running.texts()[1] == line


def test_who_dies_while_all_stop_is_missed(command: Command):
    asked = before_block(1, own_signal(signal.SIGTERM), 1)

    def before(rank: int) -> None:
        asked(rank)
        if not rank:
            launch._leave = lambda ranks: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]

    assert command.codes(2, before=before) == [-signal.SIGKILL, 75], command.last.texts()
    line = (
        "pq: rank 0 no longer answers; the same command goes on from the last block that is kept\n"
    )
    assert command.last.texts()[1] == line


def test_the_first_rank_finishes_although_another_died_at_the_end(
    command: Command, expected: dict[str, bytes]
):
    real = convert_module._finish

    def before(rank: int) -> None:
        def finish(*arguments: Any) -> None:
            time.sleep(0.5)  # until the other one is dead
            real(*arguments)

        def release(self: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if rank:
            launch._Launch.release = release  # type: ignore[method-assign]
        else:
            convert_module._finish = finish

    assert command.codes(2, before=before) == [0, -signal.SIGKILL], command.last.texts()
    assert files_of(command.output) == expected


def test_a_full_disk_at_the_end_ends_all(command: Command):
    def before(rank: int) -> None:
        def finish(*arguments: Any) -> None:
            time.sleep(0.5)
            raise OutputError("no space left")

        convert_module._finish = finish

    assert command.codes(3, before=before) == [6, 6, 6], command.last.texts()
    assert command.last.texts()[1:] == ["pq: rank 0 failed: no space left\n"] * 2


def test_an_error_of_one_rank_ends_the_others(command: Command):
    def fail() -> None:
        raise ModelError("the disk of this machine is broken")

    for rank in (0, 1):
        codes = command.codes(3, "--resume", "never", before=before_block(1, fail, rank))
        assert codes == [4, 4, 4], command.last.texts()
        texts = command.last.texts()
        assert texts.pop(rank) == (
            "" if rank else "pq: error: the disk of this machine is broken\n"
        )
        assert texts == [f"pq: rank {rank} failed: the disk of this machine is broken\n"] * 2
        assert {path.name for path in command.folder.iterdir() if path.is_dir()} == {
            f"said-{rank + 1}",
            "said-1",
        }


def test_an_unexpected_error_ends_the_others(command: Command):
    def fail() -> None:
        raise RuntimeError("a bug")

    codes = command.codes(2, before=before_block(1, fail, 1))
    assert codes[0] == 1
    assert "pq: rank 1 failed: a bug\n" in command.last.texts()[0]
    assert "Traceback" in command.last.texts()[1]


def test_a_rank_that_hangs_when_another_dies_is_abandoned(
    command: Command, monkeypatch: pytest.MonkeyPatch
):
    """Stands in for NCCL, whose collectives wait for the dead: no signal reaches a process in foreign code."""
    monkeypatch.setattr("quantize.parallel.watch._SETTLE", 0.1)
    monkeypatch.setattr("quantize.parallel.watch._UNWIND", 0.1)

    def hang() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        time.sleep(600)

    killing, hanging = before_block(1, own_signal(signal.SIGKILL), 1), before_block(1, hang, 0)
    assert command.codes(2, before=lambda rank: (killing if rank else hanging)(rank)) == [
        75,
        -signal.SIGKILL,
    ]
    assert command.codes(2) == [0, 0]


def test_refusals_are_told_once(command: Command):
    for arguments, code, text in (
        (["--resume", "maybe"], 2, "--resume maybe: choose"),
        (["--resume", "required"], 2, "no state is kept"),
        (["--set", "group_size=48", "--set", "strict=true"], 4, "group"),
        (["--dtype", "int8"], 2, "--dtype int8"),
    ):
        assert command.codes(2, *arguments) == [code, code], command.last.texts()
        first, second = command.last.texts()
        assert text in first
        assert first.startswith("pq: error: ")
        assert not second or second == first.replace("pq: error: ", "pq: rank 0 failed: ")
    threads = command.codes(2, before=lambda rank: torch.set_num_threads(1 + rank))
    assert threads == [2, 2]
    assert "rank 1 differs from rank 0 in threads: 2 instead of 1" in command.last.texts()[0]


@pytest.mark.parametrize("size", [1, 2])
def test_kills_at_random_moments(command: Command, expected: dict[str, bytes], size: int):
    chance = random.Random(size)
    started = time.monotonic()
    assert command.codes(1, "--resume", "never", output=command.folder / "once") == [0], (
        command.last.texts()
    )
    usual = time.monotonic() - started
    for _ in range(3):
        running = command.start(2)
        # A rank that never met the first is right to wait for it: half an hour, and so would the test.
        while not command.has_begun(running.ids[0]):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1) * usual)
        lost = chance.randrange(2)
        os.kill(running.ids[lost], signal.SIGKILL)
        codes = running.wait()
        if command.output.exists():
            break
        assert codes[lost] == -signal.SIGKILL
        assert codes[1 - lost] in (75, 2), running.texts()
    assert command.output.exists() or command.codes(size) == [0] * size, command.last.texts()
    assert files_of(command.output) == expected
