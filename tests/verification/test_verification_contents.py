"""`pq verify` finds damage that hashes do not show, in tensors, config.json and what pq did not write."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import (
    JSON,
    OWN,
    Q0,
    checks_of,
    edit_json,
    edit_tensors,
    failed,
    group_edit,
    pop,
    put,
    sign,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import ModelError
from quantize.files.checkpoint import INDEX_NAME
from quantize.files.provenance import canonical_json, provenance_digest
from quantize.verification import verify

Maker = Callable[..., Path]


# Damage with hashes made consistent again


@pytest.mark.parametrize(
    ("recipe", "value", "says"),
    [
        ("gptq", float("nan"), "NaN or Inf"),
        ("gptq", float("inf"), "NaN or Inf"),
        ("gptq", 0.0, "1 zeros"),
        ("fireq", 0.0, "1 zeros"),
    ],
)
def test_unusable_scales(copied: Maker, recipe: str, value: float, says: str):
    folder = copied(recipe)
    edit_tensors(folder, lambda tensors: tensors[f"{Q0}.weight_scale"][5, 0].fill_(value))
    result = verify(folder)
    assert failed(result) == ["values"]
    assert f"{Q0}.weight_scale" in str(result.first_failure)
    assert says in str(result.first_failure)


def test_scales_that_a_reload_would_change(copied: Maker):
    folder = copied("fireq", "llama", intermediate_size=512)

    def change(tensors: dict[str, Tensor]) -> None:
        # Four groups a row: the smallest one moves off its E4M3 multiple and does not become the row's largest.
        scale = tensors["model.layers.0.mlp.down_proj.weight_scale"]
        size = scale.abs()
        row = next(r for r in range(len(size)) if size[r].min() < 0.8 * size[r].max())
        scale[row, size[row].argmin()] *= 1.03

    assert verify(folder).ok
    edit_tensors(folder, change)
    result = verify(folder)
    assert failed(result) == ["values"]
    assert "survive a reload" in str(result.first_failure)


@pytest.mark.parametrize("recipe", ["rtn", "fireq-linear"])
def test_scales_that_one_gpu_of_two_would_change(copied: Maker, recipe: str):
    """Whole rows find them again, and the halves that two GPUs hold do not."""
    folder = copied(recipe, "llama", "activations=fp8", intermediate_size=512)

    def change(tensors: dict[str, Tensor]) -> None:
        # Halves of two groups each, and the row's largest in the first: that of the second moves to another E4M3 value.
        scale = tensors["model.layers.0.mlp.down_proj.weight_scale"].view(-1, 2, 2)
        for row in scale:
            size, half = row.abs(), row[1]
            moved = half[size[1].argmax()] * 13 / 14
            ratio = float(size[1].min() / moved.abs())
            if size[0].max() == size.max() and ratio < 0.95 and abs(ratio - 0.5) > 0.05:
                half[size[1].argmax()] = moved
                return
        raise AssertionError("no row can be damaged so")

    assert verify(folder).ok
    edit_tensors(folder, change)
    result = verify(folder)
    assert failed(result) == ["values"]
    assert "down_proj.weight_scale does not survive a reload through E4M3" in str(
        result.first_failure
    )


def test_bits_beside_the_codes(copied: Maker):
    folder = copied("rtn", "llama", "bits=3", "group_size=16", intermediate_size=272)
    name = "model.layers.0.mlp.down_proj.weight_packed"  # 272 · 3 bits end in the middle of a word

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][7, -1] |= 1 << 20

    assert verify(folder).ok
    edit_tensors(folder, change)
    result = verify(folder)
    assert failed(result) == ["packing"]
    assert name in str(result.first_failure)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pop(f"{Q0}.weight_scale"), f"tensor {Q0}.weight_scale is missing"),
        (pop(f"{Q0}.weight_shape"), f"tensor {Q0}.weight_shape is missing"),
        (pop("model.layers.0.input_layernorm.weight"), "input_layernorm.weight is missing"),
        (
            lambda t: t.update({"model.layers.0.more": torch.ones(1)}),
            "model.layers.0.more has no place",
        ),
        (
            lambda t: t.update({"lm_head.weight_packed": torch.ones(1)}),
            "lm_head is packed but config.json does not",
        ),
        (lambda t: t.update({f"{Q0}.weight": torch.ones(256, 128)}), "stored twice"),
        (put(f"{Q0}.weight_scale", lambda t: t.float()), "weight_scale is F32"),
        (put(f"{Q0}.weight_packed", lambda t: t[:, :-1].contiguous()), "weight_packed is I32"),
        (put(f"{Q0}.weight_shape", lambda t: t.flip(0)), "weight_shape says [128, 256]"),
        (put("model.layers.0.input_layernorm.weight", lambda t: t.to(torch.int16)), "is I16"),
        (
            put("model.layers.0.input_layernorm.weight", lambda t: t[1:].clone()),
            "config.json implies",
        ),
        (
            lambda t: [t.pop(f"{Q0}.weight_{part}") for part in ("packed", "scale", "shape")],
            f"says that {Q0} is packed but it is not",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    copied: Maker, change: Callable[[dict[str, Tensor]], None], says: str
):
    folder = copied()
    edit_tensors(folder, change)
    result = verify(folder)
    assert failed(result) == ["layout"]
    assert says in str(result.first_failure)
    assert "do not fit" in str(checks_of(result)["values"].skipped_reason)


@pytest.mark.parametrize(
    "change",
    [
        group_edit("num_bits", 3),
        group_edit("num_bits", 8),
        group_edit("num_bits", "4"),
        group_edit("num_bits", True),
        group_edit("num_bits", 10**30),
        group_edit("group_size", 64),
        group_edit("group_size", -128),
        group_edit("group_size", None),
        group_edit("group_size", [128]),
        group_edit("strategy", "channel"),
        lambda config: config["quantization_config"].update(ignore=[]),
        lambda config: config["quantization_config"].update(ignore=["lm_head", Q0]),
        lambda config: config["quantization_config"].update(
            ignore=["lm_head", "model.layers.7.mlp.up_proj"]
        ),
        lambda config: config["quantization_config"].update(ignore=5),
        lambda config: config["quantization_config"].update(quant_method="gptq"),
        lambda config: config["quantization_config"].update(config_groups={"g": 1}),
        lambda config: config.update(quantization_config=None),
        lambda config: config.update(quantization_config=[]),
        lambda config: config.update(quantization_config="yes"),
        lambda config: config.update(num_hidden_layers=10**9),
        lambda config: config.update(hidden_size=64),
        lambda config: config.update(model_type=["llama"]),
        lambda config: config.update(model_type="gpt9"),
        lambda config: config.clear(),
    ],
)
def test_an_edited_config(copied: Maker, change: Callable[[dict[str, Any]], None]):
    folder = copied()
    edit_json(folder, "config.json", change)
    assert failed(verify(folder)) == ["layout"]


@pytest.mark.parametrize("total", [0, "x", None])
def test_a_wrong_total_size(copied: Maker, total: Any):
    folder = copied()
    edit_json(folder, INDEX_NAME, lambda index: index["metadata"].update(total_size=total))
    assert "total_size" in str(verify(folder).first_failure)


def test_swapped_shards(copied: Maker):
    folder = copied()
    a, b = (folder / f"model-0000{i}-of-00004.safetensors" for i in (2, 3))
    a.rename(folder / "c")
    b.rename(a)
    (folder / "c").rename(b)
    assert failed(verify(folder)) == ["files", "layout"]
    sign(folder)
    assert failed(verify(folder)) == ["layout"]


def test_a_truncated_shard(copied: Maker):
    folder = copied()
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-16])
    assert failed(verify(folder)) == ["files", "layout"]
    sign(folder)
    result = verify(folder)
    assert failed(result) == ["layout"]
    assert path.name in str(result.first_failure)


@pytest.mark.parametrize("key", ["recipe", "source", "layers", "files", "machine"])
@pytest.mark.parametrize("value", [None, 3, {"a": 1}])
def test_parts_of_pq_json_of_another_kind(copied: Maker, tiny: Maker, key: str, value: Any):
    folder = copied()
    data = json.loads((folder / "pq.json").read_text()) | {key: value}
    (folder / "pq.json").write_text(canonical_json(data | {"sha256": provenance_digest(data)}))
    result = verify(folder, tiny("llama"))
    assert "provenance" in failed(result)
    assert key in checks_of(result)["provenance"].detail


def test_a_recipe_that_cannot_be_read(copied: Maker, tiny: Maker):
    folder = copied("rtn")
    sign(folder, recipe={"name": "rtn", "resolved": "stages: [{method: magic}]"})
    result = verify(folder, tiny("llama"))
    assert failed(result) == ["provenance"]
    assert "magic" in str(result.first_failure)
    assert "recipe" in str(checks_of(result)["recomputed"].skipped_reason)


# What pq did not write


def test_a_plain_model(tiny: Maker):
    folder = tiny("llama", shards=2)
    checks = checks_of(verify(folder, folder))
    assert {name for name, check in checks.items() if check.ok} == {
        "layout",
        "values",
        "untouched",
        "outputs",
    }
    assert not failed(verify(folder, folder))
    assert "pq did not write" in str(checks["provenance"].skipped_reason)
    assert "absent" in str(checks["files"].skipped_reason)


def test_a_conversion_without_its_pq_json(copied: Maker, tiny: Maker):
    folder = copied("fireq")
    (folder / "pq.json").unlink()
    checks = checks_of(verify(folder, tiny("llama")))
    assert {n for n, c in checks.items() if c.ok} == {
        "layout",
        "values",
        "packing",
        "untouched",
        "outputs",
    }
    assert {n for n, c in checks.items() if c.ok is None} == {
        "provenance",
        "files",
        "source",
        "recomputed",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        lambda config: config.update(quantization_config=7),
        lambda config: config["quantization_config"].update(ignore=["re:.*lm_head"]),
        lambda config: config["quantization_config"].update(format="float-quantized"),
        group_edit("actorder", "group"),
        lambda config: config.update(model_type="gpt9"),
        lambda config: config.update(model_type=None),
    ],
)
def test_what_others_write_is_skipped_not_failed(
    copied: Maker, change: Callable[[dict[str, Any]], None]
):
    folder = copied()
    edit_json(folder, "config.json", change)
    (folder / "pq.json").unlink()
    result = verify(folder)
    assert result.ok
    assert [check.ok for check in result.checks] == [None] * len(OWN)


def test_arguments_that_are_no_models_are_refused(copied: Maker, tmp_path: Path):
    folder = copied()
    with pytest.raises(ModelError, match="no such folder"):
        verify(tmp_path / "absent")
    with pytest.raises(ModelError, match="is quantized already"):
        verify(folder, folder)


def test_an_empty_folder_gives_a_failed_check(tmp_path: Path):
    assert failed(verify(tmp_path)) == ["layout"]
    (tmp_path / "pq.json").write_text("{}")
    assert failed(verify(tmp_path)) == ["provenance", "layout"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), value=JSON, signed=st.booleans())
def test_no_json_stops_it(
    converted: Maker, tmp_path: Path, data: st.DataObject, value: Any, signed: bool
):
    """Any value anywhere in config.json, the index or pq.json: a result, and ok only where nothing was changed."""
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(converted("rtn", "llama"), folder)
        sign(folder)
    path = folder / data.draw(st.sampled_from(["config.json", INDEX_NAME, "pq.json"]))
    sound, provenance = path.read_bytes(), (folder / "pq.json").read_bytes()
    whole = json.loads(sound)
    at = whole
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    before, at[key] = copy.deepcopy(at[key]), value
    try:
        path.write_text(json.dumps(whole))
        if signed and isinstance(whole.get("files", {}), dict):
            sign(folder)
        result = verify(folder)
        assert [check.name for check in result.checks] == OWN
        assert signed or not result.ok or before == value
    finally:
        path.write_bytes(sound)
        (folder / "pq.json").write_bytes(provenance)
