"""A short run of the fuzz targets; `python tests/fuzz_checkpoint.py 100000` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_checkpoint import clean, fuzz, read

from quantize.files.checkpoint import Checkpoint


def test_the_sound_checkpoint_reads(tmp_path: Path):
    for name, raw in clean().items():
        (tmp_path / name).write_bytes(raw)
    assert len(Checkpoint(tmp_path).tensors("")) == 3
    read(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_checkpoints_give_tensors_or_a_model_error(seed: int, tmp_path: Path):
    fuzz(1000, seed, tmp_path)


def test_mutated_outputs_give_findings_or_an_expected_error(tmp_path: Path):
    fuzz(300, 0, tmp_path, "output")
