"""A conversion that is killed, at any moment and any number of times, ends in the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ModelMaker
from resumed import RECIPES, files_of, model_of, request, whole

from quantize.conversion.loop import Request, convert
from quantize.files.resume import forget_finished

STEPS = 48
"""Steps on the disk that a conversion of RECIPES["rtn"] takes, or a few more."""


def child(asked: Request, before: Callable[[], None] = lambda: None) -> int:
    """Convert in a process of its own → its id. Forked, because starting Python anew takes longer than converting."""
    number = os.fork()
    if number:
        return number
    try:
        before()
        convert(asked)
        os._exit(0)
    finally:
        os._exit(1)


def die_at(step: int) -> None:
    """Let this process die, as by kill -9, just before it does its `step`-th step on the disk."""
    count = itertools.count(1)

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **kwargs: object) -> object:
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return called

    os.fsync = dying(os.fsync)  # type: ignore[assignment]
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
        setattr(Path, name, dying(getattr(Path, name)))


def finish(asked: Request, expected: dict[str, bytes]) -> None:
    """Go on from whatever a kill left, and look at the result."""
    if asked.output.exists():
        forget_finished(asked.work, asked.output, own=False)
    else:
        kept = (asked.work / "state.json").exists()
        convert(dataclasses.replace(asked, resume="required" if kept else "auto"))
    assert files_of(asked.output) == expected
    beside = {path.name for path in asked.output.parent.iterdir()} - {"whole"}
    if asked.work.exists():
        assert all(
            len(path.stem) == 64 for path in asked.work.iterdir()
        )  # layers that LaDiMo taught
        beside.remove("work")
    assert beside == {"out"}


def killed_at(tiny: ModelMaker, text_file: Path, tmp_path: Path, steps: range) -> int:
    """Kill one run at each of the steps and finish it → how many runs reached their step."""
    reached = 0
    model = model_of(tiny, "rtn")
    expected = whole(request("rtn", model, text_file, tmp_path / "out"))
    for step in steps:
        folder = tmp_path / str(step)
        asked = request(
            "rtn", model, text_file, folder / "out", work=folder / "work", resume="auto"
        )
        _, status = os.waitpid(child(asked, lambda step=step: die_at(step)), 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            reached += 1
            if not asked.output.exists():
                assert not list(folder.glob(".*"))
        finish(asked, expected)
    return reached


def test_a_kill_at_steps_on_the_disk(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    assert killed_at(tiny, text_file, tmp_path, range(1, STEPS, 4)) >= 9


@pytest.mark.slow
def test_a_kill_at_every_other_step_on_the_disk(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    for first in (2, 3, 4):
        killed_at(tiny, text_file, tmp_path / str(first), range(first, STEPS, 4))


def killed_again_and_again(asked: Request, kills: int, seed: int) -> None:
    """Kill runs after random times until one has finished, or so many have not."""
    started = time.monotonic()
    expected = whole(asked)
    usual, chance = time.monotonic() - started, random.Random(seed)
    for _ in range(kills):
        number = child(asked)
        time.sleep(chance.uniform(0, usual))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        if asked.output.exists():
            break
    finish(asked, expected)


@pytest.mark.parametrize("recipe", ["fireq", "sbvr", "ladimo-gptq"])
def test_kills_at_random_moments(tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str):
    asked = request(
        recipe,
        model_of(tiny, recipe),
        text_file,
        tmp_path / "out",
        work=tmp_path / "work",
        resume="auto",
    )
    killed_again_and_again(asked, 4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_many_kills_at_random_moments(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str
):
    asked = request(
        recipe,
        model_of(tiny, recipe),
        text_file,
        tmp_path / "out",
        work=tmp_path / "work",
        resume="auto",
    )
    killed_again_and_again(asked, 8, seed=1)
