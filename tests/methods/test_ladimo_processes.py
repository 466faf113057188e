"""What several processes teach together is what one teaches, and taken up by any number of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from processes import pq, same
from resumed import LADIMO, files_of, model_of, request

from quantize.methods.gptq import Gptq


@pytest.mark.parametrize("size", [1, 2])
def test_a_layer_that_was_taught_is_taken_up(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, size: int
):
    recipe = tmp_path / "r.yaml"
    calibration = f"calibration: {{dataset: {text_file}, nsamples: 6, seqlen: 32}}"
    recipe.write_text(
        f"description: d\nformat: pq\n{calibration}\nstages: [{LADIMO}, {{method: gptq, group_size: 64}}]\n"
    )
    told = ["convert", "-m", model_of(tiny, "ladimo-gptq"), "-r", recipe, "--device", "cpu", "-o"]

    def die_while_encoding(rank: int) -> None:
        def encode_group(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if rank == 1:
            Gptq.encode_group = encode_group  # type: ignore[method-assign]

    killed = pq(2, [*told, tmp_path / "out"], tmp_path / "said", die_while_encoding)
    assert killed.wait() == [75, -signal.SIGKILL], killed.texts()
    for output, ranks in (("out", size), ("once", 1)):
        running = pq(ranks, [*told, tmp_path / output], tmp_path / "said")
        assert running.wait() == [0] * ranks, running.texts()
    assert (
        "model.layers.0.mlp was taught before and is taken up" in (tmp_path / "out.log").read_text()
    )
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")


@pytest.mark.parametrize(
    "recipe", ["ladimo-gptq", pytest.param("ladimo-searched", marks=pytest.mark.slow)]
)
def test_ladimo(tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str):
    same(
        request(recipe, model_of(tiny, recipe), text_file, tmp_path / "out", batch_tokens=64),
        tmp_path,
    )
