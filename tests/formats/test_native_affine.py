"""Shifts and rotations of a native checkpoint: every loader applies them, and none ignores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from natives import ATTENTION, Maker, difference, edited, loaded, logits, native, rewritten

from quantize.errors import ModelError
from quantize.formats.kv4 import KV_TENSORS, KvNumerics, KvScheme
from quantize.formats.native import attention_of
from quantize.model.load import load_model

AFFINE = ATTENTION | {"affine": True}


@pytest.fixture
def folder(converted: Maker, tmp_path: Path) -> Path:
    return native(tmp_path / "native", converted("fireq-paper-linear", "qwen2"), AFFINE)


def test_loaders_agree(folder: Path, tmp_path: Path, converted: Maker):
    model = loaded(folder)
    found = logits(model)
    names = [n for n, _ in model.model.layers[1].self_attn.kv.named_buffers()]
    assert [f"kv.{name}" for name in names] == [*KV_TENSORS]
    ours = load_model(folder, torch.device("cpu"), torch.float32)
    assert difference(logits(ours, use_cache=False), found) < 1e-4
    plain = native(tmp_path / "plain", converted("fireq-paper-linear", "qwen2"), ATTENTION)
    assert difference(found, logits(loaded(plain))) > 1e-3


@pytest.mark.parametrize("name", KV_TENSORS[1:])
def test_none_may_be_missing(folder: Path, name: str):
    edited(folder, lambda tensors: tensors.pop(f"model.layers.1.self_attn.{name}", None))
    with pytest.raises(ModelError, match=f"{name} is missing"):
        loaded(folder)
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_model(folder, torch.device("cpu"), torch.float32)


def test_none_may_be_there_unasked(folder: Path):
    rewritten(folder, lambda config: config["attention"].pop("affine"))
    with pytest.raises(ModelError, match="has no place in the model"):
        loaded(folder)
    with pytest.raises(ModelError, match="has no place in the model"):
        load_model(folder, torch.device("cpu"), torch.float32)


def test_the_field():
    plain = KvNumerics(KvScheme(symmetric=False))
    assert "affine" not in plain.as_json()  # readers that know of none read these as ever
    for numerics in (plain, KvNumerics(plain.scheme, affine=True)):
        facts: dict[str, Any] = {"attention": numerics.as_json()}
        assert KvNumerics.from_json(attention_of(facts) or {}) == numerics
    with pytest.raises(ValueError, match="affine is 1"):
        attention_of({"attention": AFFINE | {"affine": 1}})
    with pytest.raises(ValueError, match="must be null or have the fields"):
        attention_of({"attention": AFFINE | {"other": True}})
