"""Models whose layers pass on more than hidden states, and models of Conv1D, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU

from models import zoo
from models.law import streamed_logits
from quantize.conversion.loop import Request, convert
from quantize.errors import ModelError, UnderivedError
from quantize.model.skeleton import Skeleton
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.verification.run import verify


def difference(folder: Path, model: Any) -> float:
    """Of pq's logits of a folder from transformers', relative."""
    ids = zoo.tokens(seed=31)
    return zoo.apart(zoo.logits(model, ids).float(), streamed_logits(folder, ids))


def recipe_of(folder: Path, *stages: str) -> Recipe:
    lines = [
        "description: one of the tests",
        f"calibration: {{dataset: {folder / 'text.txt'}, nsamples: 4, seqlen: 32}}",
        f"stages: [{', '.join(stages)}]",
    ]
    path = folder.parent / "recipe.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_recipe(str(path))


ROUND = "{method: rtn, bits: 8, group_size: 32}"


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "deepseek_v4", "qwen4_exp_text"])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path):
    model = zoo.outline(kind)
    zoo.liven(model)
    folder = zoo.save(model, tmp_path / "model")
    assert difference(folder, model) < 1e-5
    skeleton = Skeleton(folder, CPU, torch.float32)
    assert skeleton.arch.carries
    assert not skeleton.arch.residual
    assert skeleton.stream.width > model.config.hidden_size


def test_layers_that_share_keys_keep_a_16_bit_cache(tmp_path: Path):
    skeleton = Skeleton(zoo.save(zoo.build("gemma4_text"), tmp_path / "model"), CPU, torch.float32)
    assert [one.writer for one in skeleton.stream.shared] == [0, 0, 1, 1]
    why = {skeleton.block_arch(index).no_cache for index in range(4)}
    assert why == {"it shares keys and values with other layers"}


def test_a_converted_model_of_several_streams_verifies(tmp_path: Path):
    folder = zoo.save(zoo.build("gemma3n_text"), tmp_path / "model")
    recipe = recipe_of(folder, ROUND)
    convert(Request(folder, recipe, tmp_path / "out", CPU, torch.float32, resume="never"))
    assert verify(tmp_path / "out", folder).ok


def test_values_rotate_where_more_than_hidden_states_is_carried(tmp_path: Path):
    model = zoo.build("gemma4_text")
    folder = zoo.save(model, tmp_path / "model")
    recipe = recipe_of(folder, "{method: rotate, residual: false}", ROUND)
    bare = recipe.model_copy(update={"stages": recipe.stages[:1]})
    convert(Request(folder, bare, tmp_path / "out", CPU, torch.float32, resume="never"))
    assert difference(tmp_path / "out", model) < 1e-4


def test_rotating_the_stream_is_refused_where_it_is_not_all(tmp_path: Path):
    folder = zoo.save(zoo.build("gemma4_text"), tmp_path / "model")
    recipe = recipe_of(folder, "{method: rotate}", ROUND)
    with pytest.raises(ModelError, match="layers read what earlier ones computed"):
        convert(Request(folder, recipe, tmp_path / "out", CPU, torch.float32, resume="never"))


def test_conv1d_is_turned_back_where_it_is_written_as_it_is(tmp_path: Path):
    model = zoo.build("gpt2")
    folder = zoo.save(model, tmp_path / "model")
    smooth = recipe_of(folder, "{method: awq, bits: 4, group_size: 32}", ROUND)
    bare = smooth.model_copy(update={"stages": smooth.stages[:1]})
    convert(Request(folder, bare, tmp_path / "out", CPU, torch.float32, resume="never"))
    loader = zoo.loader_of("gpt2")
    loaded, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    moved = loaded.transformer.h[0].attn.c_attn.weight
    assert not torch.equal(moved, model.transformer.h[0].attn.c_attn.weight)
    assert difference(tmp_path / "out", model) < 1e-4
    assert difference(tmp_path / "out", loaded.eval()) < 1e-5


def test_layers_that_share_weights_are_refused(tmp_path: Path):
    folder = zoo.save(zoo.build("zamba"), tmp_path / "model")
    with pytest.raises(UnderivedError, match=r"layers.1 and model.layers.3 share shared_transf"):
        Skeleton(folder, CPU, torch.float32)


def test_layers_that_text_does_not_run_are_refused(tmp_path: Path):
    folder = zoo.save(zoo.build("mllama", image_text=False), tmp_path / "model")
    skeleton = Skeleton(folder, CPU, torch.float32)
    with pytest.raises(UnderivedError, match="layer 1 does not run on text alone"):
        _ = skeleton.arch


def test_a_model_that_averages_outputs_of_layers_is_refused(tmp_path: Path):
    folder = zoo.save(zoo.build("inkling2_text"), tmp_path / "model")
    with pytest.raises(UnderivedError, match="also reads what earlier ones put out"):
        _ = Skeleton(folder, CPU, torch.float32).arch


def test_stacks_that_stay_whole_are_said(tmp_path: Path):
    folder = zoo.save(zoo.build("inkling_text"), tmp_path / "model")
    request = Request(
        folder, recipe_of(folder, ROUND), tmp_path / "out", CPU, torch.float32, resume="never"
    )
    lines = [line for line in convert(request).lost if "shared experts" in line]
    assert len(lines) == 1
    assert "model.layers.0.mlp.shared_experts.gate_proj and 5 more stay as stored" in lines[0]


def test_parameters_beside_the_layers_are_copied_where_text_does_not_pass_them(tmp_path: Path):
    model = zoo.build("llava_next", image_text=True)
    folder = zoo.save(model, tmp_path / "model")
    skeleton = Skeleton(folder, CPU, torch.float32)
    assert "model.image_newline" in skeleton.arch.beside
    assert difference(folder, model) < 1e-5


def test_parameters_beside_the_layers_that_act_are_refused(tmp_path: Path):
    folder = zoo.save(zoo.build("zaya"), tmp_path / "model")
    with pytest.raises(UnderivedError, match="stands beside the layers in no module of its own"):
        _ = Skeleton(folder, CPU, torch.float32).arch
