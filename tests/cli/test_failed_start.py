"""A start that fails leaves nothing behind, and an earlier run's log as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.conversion.conversion import Conversion
from quantize.files.checkpoint import SINGLE_NAME

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def not_finite(model: Path) -> None:
    tensors = load_file(model / SINGLE_NAME)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, model / SINGLE_NAME)


@pytest.mark.parametrize("damage", [no_config, adapter, not_finite])
@pytest.mark.parametrize("more", [(), ("--resume", "never"), ("--max-ram", "90GB"), ("--json",)])
def test_a_failed_start_leaves_nothing(
    pq: Call, model: Path, tmp_path: Path, damage: Callable[[Path], None], more: tuple[str, ...]
):
    damage(model)
    before = {path for path in tmp_path.rglob("*") if "model" not in path.parts}
    told = ["-m", model, "-r", "rtn", "-o", tmp_path / "deep" / "er" / "out", "--device", "cpu"]
    code, out, err = pq("convert", *told, *more)
    assert (code, out) == (4, ""), err
    assert {path for path in tmp_path.rglob("*") if "model" not in path.parts} == before


def test_a_failed_start_leaves_an_earlier_log_and_folders_that_hold_something(
    pq: Call, model: Path, tmp_path: Path
):
    not_finite(model)
    (tmp_path / "out.log").write_text("of an earlier run\n")
    told = ["-m", model, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu"]
    assert pq("convert", *told)[0] == 4
    assert (tmp_path / "out.log").read_text() == "of an earlier run\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out.log"}


def test_a_run_that_fails_later_leaves_its_log_from_the_first_line(
    pq: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(model / SINGLE_NAME, model / "model-00001-of-00003.safetensors")  # worth a line

    def fail(self: Any, index: int, streams: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversion, "block", fail)
    told = ["-m", model, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu"]
    assert pq("convert", *told)[0] == 130
    started, first, *_, last = (tmp_path / "out.log").read_text().splitlines()
    assert '"argv": ["convert"' in started
    assert "reads the weights of model.safetensors, as transformers does" in first
    assert last.endswith("stopped: KeyboardInterrupt")
