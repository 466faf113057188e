"""`pq verify --parent` finds what only a comparison with the parent shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import config_of, random_weights, request_for, save_model, save_side_files
from damage import (
    Q0,
    checks_of,
    edit_json,
    edit_tensors,
    failed,
    put,
    sign,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.conversion.loop import convert
from quantize.files.checkpoint import INDEX_NAME
from quantize.verification import verify

Maker = Callable[..., Path]


def another_parent(tmp_path: Path, **changes: Any) -> Path:
    config = config_of("llama", **changes)
    folder = save_model(tmp_path / "another", config, random_weights(config, seed=7))
    save_side_files(folder)
    return folder


def test_a_wrong_parent(copied: Maker, tmp_path: Path):
    result = verify(copied("gptq"), another_parent(tmp_path))
    assert failed(result) == ["source", "untouched", "outputs"]
    assert "model.safetensors" in str(result.first_failure)
    assert "--parent" in str(result.first_failure)


def test_a_parent_of_another_size(copied: Maker, tmp_path: Path):
    result = verify(copied("rtn"), another_parent(tmp_path, intermediate_size=384))
    assert failed(result) == ["source", "untouched", "recomputed", "outputs"]


@pytest.mark.parametrize(
    ("recipe", "found_by"), [("rtn", {"recomputed", "outputs"}), ("gptq", {"outputs"})]
)
def test_a_block_of_another_conversion(
    copied: Maker, tiny: Maker, text_file: Path, tmp_path: Path, recipe: str, found_by: set[str]
):
    folder, other = copied(recipe), tmp_path / "other"
    convert(request_for(another_parent(tmp_path), recipe, other, text_file))
    shutil.copy(other / "model-00002-of-00004.safetensors", folder)
    sign(folder)
    assert verify(folder).ok  # nothing in it contradicts anything else
    result = verify(folder, tiny("llama"))
    assert set(failed(result)) - {"untouched"} == found_by
    assert "block 0" in checks_of(result)["outputs"].detail


def test_swapped_scales(copied: Maker, tiny: Maker):
    folder = copied("fireq-paper-linear")
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight_scale" for name in ("gate", "up"))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    edit_tensors(folder, change)
    assert verify(folder).ok
    result = verify(folder, tiny("llama"))
    assert "recomputed" in failed(result)
    assert gate in checks_of(result)["recomputed"].detail


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_outside_the_blocks_that_changed(copied: Maker, tiny: Maker, name: str):
    folder = copied("fireq-linear")
    shard = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name].flatten()[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    sign(folder)
    result = verify(folder, tiny("llama"))
    assert failed(result) == ["untouched"]
    assert name in str(result.first_failure)


def test_a_bias_that_no_edge_scales(copied: Maker, tiny: Maker):
    folder = copied("fireq-paper-linear", "qwen2")
    edit_tensors(folder, put("model.layers.0.self_attn.k_proj.bias", lambda t: t + 1))
    result = verify(folder, tiny("qwen2"), blocks=1)
    assert "untouched" in failed(result)
    assert "k_proj.bias" in checks_of(result)["untouched"].detail


def test_a_config_that_changes_the_function(copied: Maker, tiny: Maker):
    folder = copied("gptq")
    edit_json(folder, "config.json", lambda config: config.update(rms_norm_eps=0.5))
    result = verify(folder, tiny("llama"))
    assert "rms_norm_eps" in checks_of(result)["untouched"].detail
    assert "outputs" in failed(result)


def test_blocks_converted_elsewhere_may_round_otherwise(copied: Maker, tiny: Maker):
    folder = copied("rtn")
    versions = json.loads((folder / "pq.json").read_text())["versions"]
    sign(folder, versions=versions | {"torch": "2.0.0"})
    assert checks_of(verify(folder, tiny("llama")))["recomputed"].ok
    edit_tensors(folder, put(f"{Q0}.weight_packed", lambda t: t ^ 1))
    recomputed = checks_of(verify(folder, tiny("llama")))["recomputed"]
    assert recomputed.ok is None
    assert "torch 2.0.0" in str(recomputed.skipped_reason)
