"""What config.json says against what the weights are, and the model that is built from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import config_of, random_weights, save_model

from quantize.errors import ModelError, UnderivedError
from quantize.files.checkpoint import Checkpoint
from quantize.model.arch import Shape
from quantize.model.build import meta_model
from quantize.model.skeleton import Skeleton

CPU = torch.device("cpu")


@pytest.fixture
def single(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def layer_refused(folder: Path, says: str, **changes: object) -> None:
    source = Checkpoint(folder)
    weights = source.tensors("model.layers.0.")
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor  # type: ignore[assignment]
    skeleton = Skeleton(folder, CPU, torch.float32)
    with pytest.raises(ModelError, match=says):
        skeleton.layer(0, weights)


def test_layers_that_do_not_fit_the_config(tiny: Callable[..., Path]):
    folder = tiny("llama")
    name = "self_attn.k_proj.weight"
    layer_refused(
        folder,
        rf"{name} is \[64, 128\], config.json implies \[128, 128\]",
        **{name: torch.ones(64, 128)},
    )
    layer_refused(folder, "tensor mlp.up_proj.weight is missing", **{"mlp.up_proj.weight": None})
    layer_refused(
        folder,
        "mlp.up_proj.bias is in the checkpoint but not",
        **{"mlp.up_proj.bias": torch.ones(256)},
    )


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "nope"}, {"intermediate_size": -1}, {"intermediate_size": "12"},
        {"rms_norm_eps": "x"}, {"dtype": "float99"}, {"id2label": 5},
        {"layer_types": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_transformers_refuses(single: Path, change: dict[str, object]):
    config = json.loads((single / "config.json").read_text()) | change
    (single / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"config\.json: transformers cannot build this model \(.*\)$"
    ) as caught:
        Skeleton(single, CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None}, {"hidden_size": "128"}, {"num_hidden_layers": 0}, {"num_attention_heads": True},
        {"vocab_size": 1 << 40}, {"num_key_value_heads": 3}, {"head_dim": -64}, {"num_hidden_layers": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_sizes(single: Path, change: dict[str, object]):
    with pytest.raises(ModelError, match=rf"config\.json: .*{next(iter(change))}"):
        Shape.of(json.loads((single / "config.json").read_text()) | change)


@pytest.mark.parametrize("model_type", [None, "", "lama", 7, ["llama"]])
def test_unknown_model_types(single: Path, model_type: object):
    config = json.loads((single / "config.json").read_text()) | {"model_type": model_type}
    (single / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnderivedError, match=r"is not supported: transformers \S+ knows no such"):
        meta_model(single, torch.float32)
    (single / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(
        UnderivedError, match=r"code of its own \(x\.py, .* or a release of transformers"
    ):
        meta_model(single, torch.float32)
    for odd in ("x.Y", ["x.Y"], {"AutoConfig": None}, {"AutoConfig": "org/repo--modeling_z.Z"}):
        (single / "config.json").write_text(json.dumps(config | {"auto_map": odd}))
        with pytest.raises(UnderivedError, match=r"code of its own \((auto_map|modeling_z\.py)"):
            meta_model(single, torch.float32)


@pytest.mark.parametrize("kind", ["weird", None, 7])
def test_a_rope_type_that_nobody_knows(tmp_path: Path, kind: object):
    config = config_of("llama") | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0}}
    save_model(tmp_path, config, random_weights(config_of("llama")))
    with pytest.raises(ModelError, match="rope_type"):
        meta_model(tmp_path, torch.float32)
