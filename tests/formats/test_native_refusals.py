"""Checkpoints in pq's own format that do not fit their config.json are refused, never loaded with other weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from natives import ATTENTION, Maker, edited, loaded, native, rewritten
from torch import Tensor

from quantize.errors import ModelError

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight_packed", None), f"tensor {UP}.weight_packed is missing"),
        (lambda t: t.pop(f"{UP}.weight_scale", None), f"tensor {UP}.weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.weight_shape", None), f"tensor {UP}.weight_shape is missing"),
        (
            lambda t: t.pop("model.layers.0.self_attn.q_proj.bias", None),
            "self_attn.q_proj.bias is missing",
        ),
        (lambda t: t.pop("model.norm.weight", None), "tensor model.norm.weight is missing"),
        (lambda t: t.pop("lm_head.weight", None), "tensor lm_head.weight is missing"),
        (
            lambda t: t.pop("model.layers.1.self_attn.kv.scale", None),
            "layers.1.self_attn.kv.scale is missing",
        ),
    ],
)
def test_missing_tensors_are_refused(
    converted: Maker, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
):
    folder = edited(
        native(tmp_path / "native", converted("fireq-paper-linear", "qwen2"), ATTENTION), change
    )
    with pytest.raises(ModelError, match=r"^[^\n]+$") as caught:
        loaded(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            f"{UP}.weight_packed",
            lambda t: t[:, 1:].contiguous(),
            "config.json implies I32 [256, 16]",
        ),
        (
            f"{UP}.weight_packed",
            lambda t: t.to(torch.int64),
            "is I64 [256, 16], config.json implies I32",
        ),
        (f"{UP}.weight_scale", lambda t: t.float(), "is F32 [256, 1], config.json implies BF16"),
        (f"{UP}.weight_scale", lambda t: t.repeat(1, 2), "is BF16 [256, 2]"),
        (
            f"{UP}.weight_shape",
            lambda t: t.flip(0),
            "weight_shape says [128, 256], config.json implies [256, 128]",
        ),
        ("model.norm.weight", lambda t: t[1:].contiguous(), "model.norm.weight is BF16 [127]"),
        (
            "model.layers.0.self_attn.kv.scale",
            lambda t: t[:1].contiguous(),
            "kv.scale is F32 [1, 64]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    converted: Maker, tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], message: str
):
    folder = edited(
        native(tmp_path / "native", converted("fireq-paper-linear", "qwen2"), ATTENTION),
        lambda tensors: tensors.update({name: change(tensors[name])} if name in tensors else {}),
    )
    with pytest.raises(ModelError, match=r"^[^\n]+$") as caught:
        loaded(folder, ignore_mismatched_sizes=True)
    assert message in str(caught.value)


def test_config_and_tensors_must_agree(converted: Maker, tmp_path: Path):
    folder = native(tmp_path / "native", converted("fireq-paper-linear", "llama"), ATTENTION)
    rewritten(folder, lambda found: found.update(attention=None))
    with pytest.raises(ModelError, match=r"kv\.scale has no place in the model"):
        loaded(folder)
    rewritten(
        folder, lambda found: found.update(attention=ATTENTION, ignore=[*found["ignore"], UP])
    )
    with pytest.raises(ModelError, match=rf"tensor {UP}\.weight is missing"):
        loaded(folder)
    rewritten(
        folder,
        lambda found: found["config_groups"]["group_0"].update(
            targets=["model.layers.9.mlp.up_proj"]
        ),
    )
    with pytest.raises(
        ModelError, match=r"targets model\.layers\.9\.mlp\.up_proj, which is no linear"
    ):
        loaded(folder)
    rewritten(folder, lambda found: found.update(version=2))
    with pytest.raises(ModelError, match=r"^quantization_config: format version 2 is not known"):
        loaded(folder)


def test_groups_that_do_not_divide_are_refused(converted: Maker, tmp_path: Path):
    folder = native(tmp_path / "native", converted("rtn", "llama"))
    rewritten(
        folder, lambda found: found["config_groups"]["group_0"]["weights"].update(group_size=96)
    )
    with pytest.raises(ModelError, match=r"q_proj: 128 inputs are no multiple of the group 96"):
        loaded(folder)


def test_a_truncated_shard_is_refused(converted: Maker, tmp_path: Path):
    folder = native(tmp_path / "native", converted("rtn", "llama"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ModelError, match="no readable safetensors file"):
        loaded(folder)
