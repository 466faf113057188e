"""A conversion that was stopped goes on after its last block and writes what it would have written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from resumed import BLOCKS, RECIPES, files_of, kept, stopped_after, whole

from quantize.conversion import loop as convert_module
from quantize.conversion.loop import Request, Summary, convert
from quantize.conversion.plan import Decisions
from quantize.conversion.snapshot import pack_run, unpack_run
from quantize.errors import OutputError, StoppedError, UsageError
from quantize.files.resume import StateFolder, forget_finished

Call = Callable[..., tuple[int, str, str]]


def to_the_end(asked: Request) -> tuple[list[str], Summary]:
    """Stop after every block that can be stopped after → what was said each time, and the last summary."""
    said: list[str] = []
    for turn in range(BLOCKS + 3):
        torch.manual_seed(turn)  # another state of the global generator in every turn
        try:
            return said, convert(asked, stop=lambda: True)
        except StoppedError as err:
            said.append(str(err))
    raise AssertionError("no end")


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_goes_on_after_every_block(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str
):
    dtype = torch.bfloat16 if recipe == "gptq" else torch.float32
    asked = kept(tiny, text_file, tmp_path, recipe, dtype=dtype)
    said, summary = to_the_end(asked)
    planned = recipe in ("ladimo-gptq", "ladimo-searched", "target")
    places = (["planning"] if planned else []) + [
        f"block {i} of {BLOCKS}" for i in range(1, BLOCKS + 1)
    ]
    assert said == [
        f"stopped after {place}; the same command goes on from there" for place in places
    ]
    once = convert(dataclasses.replace(asked, output=tmp_path / "once", work=None, resume=None))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")
    varying = {"output", "seconds", "seconds_per_block", "peak_bytes", "restructured"}
    for name in {field.name for field in dataclasses.fields(Summary)} - varying:
        assert getattr(summary, name) == getattr(once, name), name
    assert [sorted(facts) for facts in summary.restructured] == [
        sorted(facts) for facts in once.restructured
    ]
    left = {path.name for path in tmp_path.iterdir()} - {"work"}
    assert left == {"out", "once"}
    assert all(
        len(path.stem) == 64 for path in (tmp_path / "work").glob("*")
    )  # layers that were taught


def test_a_text_that_was_moved_is_the_same_text(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    asked = kept(tiny, text_file, tmp_path, "gptq")
    stopped_after(asked, 2)
    moved = Path(shutil.copy(text_file, tmp_path / text_file.name))
    recipe = asked.recipe.with_overrides(dataset=str(moved))
    convert(dataclasses.replace(asked, recipe=recipe, resume="required"))
    moved.unlink()
    assert files_of(asked.output) == whole(asked)


def test_nothing_that_a_conversion_knows_is_left_out(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    monkeypatch.setattr(
        convert_module, "pack_run", lambda *state: seen.append(state) or pack_run(*state)
    )
    convert(kept(tiny, text_file, tmp_path, "ladimo-gptq"))
    run, streams = seen[-2]
    # A run has a plan, which follows from the request and what was decided on, and a state; beside
    # them only whom it tells how far it is.
    assert set(vars(run)) == {"plan", "state", "inside"}
    assert run.plan.decisions.findings
    facts, tensors = pack_run(run, streams)
    fresh = dataclasses.replace(run.plan, decisions=Decisions(run.plan.request.recipe))
    again, its_streams = unpack_run(fresh, json.loads(json.dumps(facts)), dict(tensors))
    assert again.plan.decisions == run.plan.decisions
    for field in dataclasses.fields(run.state):
        if field.name != "statistics":
            assert getattr(again.state, field.name) == getattr(run.state, field.name), field.name
    assert again.state.statistics.as_json() == run.state.statistics.as_json()
    assert run.state.routing
    assert run.state.costs
    assert its_streams.dropped == streams.dropped
    for name, batches in streams.batches.items():
        assert all(map(torch.equal, its_streams.batches[name], batches)), name


def test_sequences_that_left_the_calibration_stay_out(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = kept(tiny, text_file, tmp_path, "gptq")
    real = convert_module.Conversion.embed

    def embed(self: Any, tokens: Any) -> Any:
        streams = real(self, tokens)
        streams.batches["quantized"][0][1] = torch.inf
        return streams

    monkeypatch.setattr(convert_module.Conversion, "embed", embed)
    expected = whole(asked)
    assert json.loads(expected["pq.json"])["dropped_sequences"] == 1
    to_the_end(asked)
    assert files_of(asked.output) == expected


def test_only_the_last_state_lies_in_the_folder(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    asked = kept(tiny, text_file, tmp_path, "gptq")
    stopped_after(asked, 2)
    assert {path.name for path in asked.work.iterdir()} == {
        "state.json",
        "state-00002-00000.safetensors",
        "partial",
    }
    assert len(list((asked.work / "partial").iterdir())) == 3
    assert not asked.output.exists()


# Modes


def test_required_without_state(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    for work in (None, tmp_path / "work"):
        with pytest.raises(UsageError, match=r"--resume required: .*no state is kept"):
            convert(kept(tiny, text_file, tmp_path, work=work, resume="required"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["never", None])
def test_modes_that_keep_nothing(tiny: ModelMaker, text_file: Path, tmp_path: Path, mode: Any):
    asked = kept(tiny, text_file, tmp_path)
    stopped_after(asked, 2)
    starts: list[int] = []
    other = dataclasses.replace(asked, resume=mode)
    convert(
        other,
        lambda what, done, total: starts.append(done) if what == "quantizing" else None,
        lambda: True,
    )
    assert starts == [0, 1, 2]
    assert asked.work.exists() == (mode is None)  # which leaves alone what others keep
    assert files_of(asked.output) == whole(asked)


def test_a_folder_on_another_disk(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = kept(tiny, text_file, tmp_path)
    expected, real = whole(asked), Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "partial":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    convert(asked)
    assert files_of(asked.output) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


# Two processes


def test_a_second_process_is_refused(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    asked = kept(tiny, text_file, tmp_path)
    with (
        StateFolder(asked.work, "auto"),
        pytest.raises(OutputError, match=rf"process {os.getpid()} is at work there"),
    ):
        convert(asked)
    assert not asked.work.exists()
    convert(asked)


@pytest.mark.parametrize("own", [False, True])
def test_what_a_finished_run_left_is_removed(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, own: bool
):
    asked = kept(tiny, text_file, tmp_path)
    stopped_after(asked, BLOCKS)
    (asked.work / "taught").write_text("")
    forget_finished(asked.work, asked.output, own)
    assert (asked.work / "state.json").exists()
    (asked.work / "partial").rename(asked.output)
    (asked.output / "pq.json").write_text("{}")
    forget_finished(asked.work, asked.output, own)
    assert asked.work.exists() != own
    assert own or [path.name for path in asked.work.iterdir()] == ["taught"]


def test_a_file_system_without_locks(
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    asked = kept(tiny, text_file, tmp_path)
    stopped_after(asked, 2)
    assert "start no second process" in caplog.text
