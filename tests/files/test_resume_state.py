"""State that does not fit, or is damaged, is not gone on from; the reason is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, config_of, random_weights, save_model, save_side_files
from resumed import BLOCKS, files_of, kept, model_of, request, stopped_after, whole

from quantize.conversion.loop import Request, convert
from quantize.errors import OutputError, UsageError
from quantize.files import resume as resume_module
from quantize.files.resume import difference


@pytest.fixture(scope="module")
def by_gptq(
    tiny: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a conversion by RECIPES["gptq"] writes when nothing comes between."""
    return whole(
        request("gptq", model_of(tiny, "gptq"), text_file, tmp_path_factory.mktemp("gptq") / "out")
    )


# What must be as it was


def changed_request(asked: Request, field: str, tmp_path: Path) -> Request:
    recipe = asked.recipe
    stage = recipe.stages[0].model_copy(update={"bits": 5})
    text = tmp_path / "other.txt"
    text.write_text("Another text of many words and a few numbers. " * 200)
    config = config_of("llama", num_hidden_layers=BLOCKS)
    model = save_model(tmp_path / "model", config, random_weights(config, seed=1))
    save_side_files(model)
    return dataclasses.replace(
        asked,
        **{
            "recipe.stages[0].bits": {"recipe": recipe.model_copy(update={"stages": (stage,)})},
            "recipe.calibration.nsamples": {"recipe": recipe.with_overrides(nsamples=5)},
            "recipe.calibration.dataset": {"recipe": recipe.with_overrides(dataset=str(text))},
            "target_bpw": {"target_bpw": 6.0},
            "source.model.safetensors": {"model": model},
            "machine.dtype": {"dtype": torch.bfloat16},
            "batch_tokens": {"batch_tokens": 64},
        }.get(field, {}),
    )


@pytest.mark.parametrize(
    "field",
    [
        "recipe.stages[0].bits",
        "recipe.calibration.nsamples",
        "recipe.calibration.dataset",
        "target_bpw",
        "source.model.safetensors",
        "machine.dtype",
        "batch_tokens",
        "pq",
        "calibration.text_sha256",
    ],
)
def test_what_differs_is_named(
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    field: str,
):
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    asked = kept(tiny, text, tmp_path, "gptq")
    stopped_after(asked, 2)
    other = changed_request(asked, field, tmp_path)
    if field == "pq":
        monkeypatch.setattr("quantize.conversion.loop.__version__", "0.0.0")
    if field == "calibration.text_sha256":
        text.write_text(text.read_text()[::-1])
    with pytest.raises(UsageError, match=r"^--resume required: ") as caught:
        convert(dataclasses.replace(other, resume="required"))
    assert f": {field} is " in str(caught.value)
    assert "the state is of" in str(caught.value)
    assert (asked.work / "state.json").exists()
    with caplog.at_level(logging.INFO, "quantize"):
        convert(other)
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == "quantize.files.resume"
    ]
    assert f": {field} is " in line
    assert line.endswith("; starts anew")
    assert files_of(asked.output) == whole(other)


def test_differences_are_found_where_they_are():
    same = {"a": [1, {"b": None}], "c": 2.5}
    assert difference(same, json.loads(json.dumps(same))) is None
    assert difference(same, {"a": [1, {"b": 0}], "c": 2.5}) == "a[1].b is 0, the state is of null"
    assert difference(same, {"a": [1], "c": 2.5}) == 'a is [1], the state is of [1, {"b": null}]'
    assert difference(same, {"c": 2.5}) == 'a is null, the state is of [1, {"b": null}]'
    assert difference({}, {"n": 1}) == "n is 1, the state is of null"
    assert len(difference("x" * 500, "y" * 500, "text") or "") < 200


# What is kept may have suffered


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize(
    "name",
    ["state.json", "state-00002-00000.safetensors", "partial/model-00002-of-00005.safetensors"],
)
def test_damage_is_no_state(
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    by_gptq: dict[str, bytes],
    damage: Callable[[Path], None],
    name: str,
):
    asked = kept(tiny, text_file, tmp_path, "gptq")
    stopped_after(asked, 2)
    damage(asked.work / name)
    with pytest.raises(UsageError, match=r"^--resume required: ") as caught:
        convert(dataclasses.replace(asked, resume="required"))
    assert Path(name).name in str(caught.value) or "no state is kept" in str(caught.value)
    convert(asked)
    assert files_of(asked.output) == by_gptq


def test_files_of_a_killed_run_are_no_part_of_the_next(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    asked = kept(tiny, text_file, tmp_path)
    stopped_after(asked, 1)
    for name in (
        "partial/model-00003-of-00005.safetensors",
        "partial/stray",
        "state.json.part",
        "lock",
    ):
        (asked.work / name).write_text("half")
    (asked.work / "state-00002-00000.safetensors").write_text("half")
    convert(dataclasses.replace(asked, resume="required"))
    assert files_of(asked.output) == whole(asked)
    assert not asked.work.exists()


def test_an_error_keeps_the_blocks_before_it(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, by_gptq: dict[str, bytes]
):
    asked = kept(tiny, text_file, tmp_path, "gptq")

    def fail(what: str, done: int, total: int) -> None:
        if done == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        convert(asked, fail)
    starts: list[int] = []
    convert(asked, lambda what, done, total: starts.append(done) if what == "quantizing" else None)
    assert starts == [2]
    assert files_of(asked.output) == by_gptq


def test_a_full_disk_keeps_the_state_before_it(
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    by_gptq: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
):
    asked, real = kept(tiny, text_file, tmp_path, "gptq"), resume_module.save_file

    def save(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if path.name == "state-00002-00000.safetensors":
            cut(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(resume_module, "save_file", save)
        with pytest.raises(OutputError, match="no space left on the disk"):
            convert(asked)
    convert(dataclasses.replace(asked, resume="required"))
    assert files_of(asked.output) == by_gptq
