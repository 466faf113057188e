"""A model that keeps nothing behind its blocks: norms without weights, and a head that is the embedding."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import CPU

from models.zoo import build, save
from quantize.conversion.loop import Request, convert
from quantize.files.checkpoint import Checkpoint
from quantize.recipe.recipe import load_recipe
from quantize.verification.run import verify


def test_nothing_behind_the_blocks_is_no_missing_shard(tmp_path: Path):
    folder = save(build("olmo", tie_word_embeddings=True), tmp_path / "model")
    assert not [name for name in Checkpoint(folder).shapes if "norm" in name or "head" in name]
    recipe = load_recipe("rtn")
    convert(Request(folder, recipe, tmp_path / "out", CPU, torch.float32, resume="never"))
    assert verify(tmp_path / "out", folder).ok
