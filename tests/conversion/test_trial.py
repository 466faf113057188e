"""Time is told from a trial of the conversion's own steps."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from resumed import BLOCKS, RECIPES, model_of, request

from quantize.conversion import trial
from quantize.conversion.conversion import Conversion
from quantize.conversion.draft import draft
from quantize.conversion.estimate import estimate
from quantize.conversion.trial import Text, Timing, on_the_line
from quantize.conversion.trial_fits import Clock, Fits, Growth
from quantize.conversion.trial_run import TimedRun
from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint

Pq = Callable[..., tuple[int, str, str]]
STAGES = {
    "rtn": ["1. rtn: fits"],
    "gptq": ["1. gptq", "1. gptq: fits"],
    "fireq": ["1. awq", "2. fireq-attention", "3. fireq", "3. fireq: fits"],
    "sbvr": ["1. sbvr", "1. sbvr: fits"],
    "ladimo-gptq": ["1. ladimo", "2. gptq", "2. gptq: fits"],
    "ladimo-searched": ["1. ladimo"],
    "rotate-rtn": ["1. rotate", "2. rtn: fits"],
    "target": ["1. gptq: fits", "bits by linear"],
}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "changes", [{}, {"states_on": "disk", "split": True}], ids=["plain", "spared"]
)
def test_every_recipe_is_timed(
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    scratch: Path,
    recipe: str,
    changes: dict[str, object],
):
    before = torch.random.get_rng_state()
    asked = request(
        recipe,
        model_of(tiny, recipe),
        text_file,
        tmp_path / "out",
        work=tmp_path / "work",
        **changes,
    )
    time = estimate(asked).time
    assert time is not None
    assert time.seconds_low < time.seconds < time.seconds_high
    assert time.seconds == pytest.approx(sum(time.seconds_by_part.values()))
    assert 0 < time.seconds_per_block < time.seconds / BLOCKS
    assert time.trial_seconds > 0
    assert all(seconds >= 0 for seconds in time.seconds_by_part.values())
    for part in ("opening", "reading", "profiles", "writing", *STAGES[recipe]):
        assert time.seconds_by_part[part] > 0, part
    assert bool(time.not_counted) == (recipe in ("gptq", "ladimo-gptq", "ladimo-searched"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()
    assert list(scratch.iterdir()) == []
    assert torch.equal(before, torch.random.get_rng_state())


def test_without_time_to_spare_pieces_are_measured(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trial, "CAP", 0.0)
    asked = request("gptq", model_of(tiny, "gptq"), text_file, tmp_path / "out")
    time = estimate(asked).time
    assert time is not None
    assert time.reduced == ["pieces of linears"]
    assert time.seconds_high / time.seconds > 2
    assert time.seconds_by_part["1. gptq: fits"] > 0


def test_a_trial_takes_the_steps_of_the_conversion(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    plan, _, tokens = draft(request("fireq", model_of(tiny, "fireq"), text_file, tmp_path / "out"))
    assert tokens is not None
    run = Conversion(plan)
    wanted = run.block(0, run.embed(tokens))
    timed = TimedRun.of(
        plan, clock := Clock(plan.request.device), fits := Fits(clock, until=float("inf"))
    )
    for fitted_before in (False, True):
        fits.done = fitted_before
        clock.parts = {}
        found = timed.block(0, timed.streams(tokens.tokens))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert {"reading", "profiles", "passes to the next block", "1. awq"} < clock.parts.keys()
    assert fits.seconds().keys() == {"3. fireq: fits"}
    assert not fits.pieces


def test_a_broken_weight_is_refused_as_convert_does(
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    read = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read(self, name) * float("nan"))
    with pytest.raises(ModelError, match="holds NaN or Inf"):
        estimate(request("gptq", model_of(tiny, "gptq"), text_file, tmp_path / "out"))
    assert list(scratch.iterdir()) == []


def test_seconds_lie_on_a_line_and_never_fall():
    assert on_the_line([(1, 3.0), (2, 5.0)], 10) == 21
    assert on_the_line([(1, 5.0), (2, 3.0)], 10) == 3  # noise: it does not grow
    assert on_the_line([(1, 1.0), (2, 5.0)], 10) == 25  # noise: it is nothing without text
    assert on_the_line([(4, 8.0)], 10) == 20
    assert on_the_line([(4, 8.0), (4, 8.0)], 4) == 8


def test_a_part_grows_with_what_it_reads():
    text = Text(torch.zeros(8, 100, dtype=torch.int64))
    assert text.portion(250).shape == (2, 100)
    assert text.portion(60).shape == (1, 60)
    assert text.portion(10_000).shape == (8, 100)
    assert text.amount(text.tokens, None, quadratic=False) == 800
    assert text.amount(text.tokens, 250, quadratic=False) == 200
    assert text.amount(text.portion(60), 250, quadratic=True) == 3600
    assert text.amount(text.tokens, 0, quadratic=False) == 1


def test_growth_goes_through_what_was_measured():
    found = Growth.through({100: 1e-3 * 100 + 1e-6 * 100**3, 200: 1e-3 * 200 + 1e-6 * 200**3}, 3)
    assert found.at(1000) == pytest.approx(1e-3 * 1000 + 1e-6 * 1000**3)
    assert Growth.through({100: 2.0, 200: 3.0}, 3).at(1000) == 15  # noise: less than linear
    assert Growth.through({100: 0.0, 200: 3.0}, 3).at(400) == 24  # noise: more than the power
    assert Growth.through({100: 0.0, 200: 0.0}, 2).at(400) == 0
    assert Growth.through({100: 2.0}, 3).at(200) == 16
    assert Growth.through({100: 2.0, 200: 5.0}, 1).at(400) == 10


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Stands for a fit of [N, K]; takes as long as `seconds` says."""

    shapes: tuple[tuple[int, int], ...]
    seconds: Callable[[int, int], float]
    moments: object = dataclasses.field(default_factory=lambda: SimpleNamespace(tokens=1))
    stage: object = dataclasses.field(default_factory=lambda: SimpleNamespace(group_size=128))

    def piece(self, rows: int, inputs: int) -> Matrix:
        return dataclasses.replace(self, shapes=((rows, inputs),))


@pytest.mark.parametrize("rest", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (640, 2048)])
def test_pieces_tell_loops_from_products(
    shape: tuple[int, int], rest: float, monkeypatch: pytest.MonkeyPatch
):
    """With the seconds of a solver whose loops take most of what a small piece takes."""

    def seconds(N: int, K: int) -> float:
        return 2e-4 * K + 2e-11 * K**3 + N * (3e-7 * K + 6e-11 * K**2)

    monkeypatch.setattr(Fits, "_clock", lambda self, fit: fit.seconds(*fit.shapes[0]))
    fits = Fits(Clock(torch.device("cpu")), until=time.monotonic() + rest)
    monkeypatch.setattr(fits, "_whole", lambda fit: seconds(*shape))
    for group in (128, -1):
        fit: Any = Matrix((shape,), seconds, stage=SimpleNamespace(group_size=group))
        assert fits._measure(fit, "p") == pytest.approx(seconds(*shape), rel=1e-6)


def test_the_command_tells_what_it_measured(
    pq: Pq, tiny: ModelMaker, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ("-m", str(tiny("llama")), "-r", "rtn", "--set", "group_size=32", "--device", "cpu")
    code, out, _ = pq("estimate", *arguments)
    assert code == 0
    for told in (
        "time: about ",
        " a block",
        "most of it: ",
        "measured on this machine now, in a trial of ",
    ):
        assert told in out
    told = json.loads(pq("estimate", *arguments, "--json")[1])
    assert {field.name for field in dataclasses.fields(Timing)} < told.keys()
    assert told["seconds_low"] < told["seconds"] < told["seconds_high"]
    assert list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []
