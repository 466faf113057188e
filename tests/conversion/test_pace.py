"""What is left of a conversion is told from the blocks that are done."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from quantize.conversion import pace
from quantize.conversion.pace import Pace
from quantize.conversion.request import Request
from quantize.recipe.recipe import Recipe


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that it is."""
    at = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: at[0])
    return at


def of(weights: list[int], done: int = 0) -> Pace:
    request = Request(Path("m"), cast(Recipe, None), Path("o"), torch.device("cpu"), torch.float32)
    return Pace(request, done, weights)


def test_equal_blocks_take_their_mean(now: list[float]):
    told = of([5, 5, 5, 5])
    assert (told.left, told.per_block) == (0, 0)
    now[0] = 3
    told.finish()
    assert told.left == 9
    now[0] = 8
    told.finish()
    assert (told.left, told.per_block) == (8, 4)


def test_kinds_of_blocks_are_told_apart(now: list[float]):
    told = of([10, 40, 40, 10])
    now[0] = 2
    told.finish()
    assert told.left == 2 * 8 + 2  # experts were not seen yet: four times the weights
    now[0] = 22
    told.finish()
    assert told.left == 20 + 2


def test_a_run_taken_up_counts_its_own_blocks(now: list[float]):
    told = of([1, 7, 7], done=1)
    now[0] = 6
    told.finish()
    assert (told.left, told.per_block, told.done) == (6, 6, 2)
