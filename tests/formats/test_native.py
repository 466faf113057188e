"""What transformers makes of pq's own format: loading, attending, generating, saving."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_models import cache_of
from natives import (
    ATTENTION,
    KV_SHARD,
    W4A8,
    Maker,
    difference,
    linears_of,
    loaded,
    logits,
    native,
    rewritten,
    tensors_of,
    tokens,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.kv4 import KvScheme
from quantize.formats.native import native_config
from quantize.formats.packed_int import IntScheme
from quantize.model.attention import KvAttention
from quantize.model.load import load_model
from quantize.model.moe import MoeFfn
from quantize.serving.native_linear import NativeLinear

CPU = torch.device("cpu")


@pytest.mark.parametrize("recipe", ["fireq-paper-linear", "rtn"])
def test_transformers_computes_what_we_compute(
    converted: Maker, tmp_path: Path, recipe: str, model_type: str
):
    source = converted(recipe, model_type)
    folder = native(tmp_path / "native", source)
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded(folder, dtype)
        layers = [m for m in model.modules() if isinstance(m, NativeLinear)]
        assert len(layers) == linears_of(folder)
        assert {m.scheme.fp8_activations for m in layers} == {recipe == "fireq-paper-linear"}
        assert {
            t.dtype for m in layers for n, t in m.named_parameters() if n == "weight_scale"
        } == {torch.bfloat16}
        assert difference(logits(model), logits(load_model(source, CPU, dtype))) < 1e-5
    assert not model.training


def test_mixed_schemes_load(converted: Maker, tmp_path: Path):
    source = converted("rtn", "qwen2")

    def mixed(quantization: dict[str, Any]) -> None:
        packed = [
            n.removesuffix(".weight_shape")
            for n in tensors_of(source)
            if n.endswith("weight_shape")
        ]
        schemes = dict.fromkeys(packed, IntScheme(4, 128, False)) | dict.fromkeys(packed[:2], W4A8)
        quantization.update(native_config(schemes, quantization["ignore"], None))

    folder = rewritten(native(tmp_path / "native", source), mixed)
    model = loaded(folder)
    assert (
        sum(m.scheme.fp8_activations for m in model.modules() if isinstance(m, NativeLinear)) == 2
    )
    assert difference(logits(model), logits(load_model(folder, CPU, torch.float32))) < 1e-5
    assert difference(logits(model), logits(load_model(source, CPU, torch.float32))) > 1e-3


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_changes_nothing(converted: Maker, tmp_path: Path, device_map: str):
    folder = native(tmp_path / "native", converted("fireq-paper-linear", "qwen2"), ATTENTION)
    plain, mapped = (
        loaded(folder, torch.bfloat16),
        loaded(folder, torch.bfloat16, device_map=device_map),
    )
    assert not [n for n, t in (*mapped.named_parameters(), *mapped.named_buffers()) if t.is_meta]
    assert torch.equal(logits(mapped), logits(plain))


def test_blocks_may_stay_on_the_disk(converted: Maker, tmp_path: Path):
    folder = native(tmp_path / "native", converted("fireq-paper-linear", "llama"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    try:
        model = loaded(
            folder, torch.bfloat16, device_map=places, offload_folder=tmp_path / "offloaded"
        )
    except ModelError as err:  # never other weights
        pytest.skip(str(err))
    assert model.model.layers[1].mlp.up_proj.weight_packed.is_meta
    assert torch.equal(logits(model), logits(loaded(folder, torch.bfloat16)))


def test_packed_integers_that_an_offload_would_change_are_refused(converted: Maker, tmp_path: Path):
    model = loaded(native(tmp_path / "native", converted("fireq-paper-linear", "llama")))
    linear = model.model.layers[1].mlp.up_proj.to_empty(device="meta")
    for dtype in (torch.int64, torch.bfloat16):
        linear._hf_hook = SimpleNamespace(weights_map={"weight_shape": torch.zeros(2, dtype=dtype)})
        if dtype == torch.int64:
            model.hf_quantizer.postprocess_model(model)
        else:
            with pytest.raises(ModelError, match=r"up_proj cannot be left on the disk"):
                model.hf_quantizer.postprocess_model(model)


def test_the_decoder_loads_alone(converted: Maker, tmp_path: Path):
    folder = native(tmp_path / "native", converted("rtn", "llama"), ATTENTION)
    whole, alone = (
        loaded(folder, torch.bfloat16),
        AutoModel.from_pretrained(folder, dtype=torch.bfloat16),
    )
    with torch.no_grad():
        states = [model(tokens()).last_hidden_state for model in (whole.model, alone)]
    assert torch.equal(*states)
    assert sum(isinstance(m, NativeLinear) for m in alone.modules()) == 14


def test_attention_is_attached_with_its_scale(converted: Maker, tmp_path: Path, model_type: str):
    scheme = KvScheme(group_size=32, symmetric=False, scale_dtype="e4m3")
    facts = {"kv_cache": scheme.as_json(), "query": None, "probabilities": "fp8"}
    folder = native(tmp_path / "native", converted("fireq-paper-linear", model_type), facts)
    stored = load_file(folder / KV_SHARD)
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded(folder, dtype)
        assert model.config._attn_implementation == "pq"
        for i, layer in enumerate(model.model.layers):
            kv = layer.self_attn.kv
            assert isinstance(kv, KvAttention)
            assert kv.scale.dtype == torch.float32
            assert torch.equal(kv.scale, stored[f"model.layers.{i}.self_attn.kv.scale"])
            assert (kv.numerics.scheme, kv.numerics.fp8_query, kv.numerics.fp8_probabilities) == (
                scheme,
                False,
                True,
            )
    assert torch.isfinite(logits(model)).all()


def is_stacked(module: nn.Module) -> bool:
    return isinstance(module, MoeFfn) and module.is_stacked


@pytest.mark.parametrize("recipe", ["fireq-paper", "fireq-kv"])
def test_what_a_conversion_writes_loads(converted: Maker, recipe: str, model_type: str):
    folder = converted(recipe, model_type)
    exact = logits(loaded(folder, torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        model, ours = loaded(folder, dtype), load_model(folder, CPU, dtype)
        assert sum(isinstance(m, NativeLinear) for m in model.modules()) == (
            linears_of(folder) if recipe == "fireq-paper" else 0
        )
        found, expected = logits(model), logits(ours)
        stacked = any(is_stacked(m) for m in model.modules())
        if dtype == torch.bfloat16 and stacked:
            # Stacked experts are summed in float32: that may only come nearer to the exact logits.
            assert difference(found, exact) < 1.2 * difference(expected, exact)
        else:
            # Sums in another order: a key on the edge between two codes of the cache may go either way.
            assert difference(found, expected) < (1e-3 if stacked else 1e-5)
        scales = [
            [m.scale for m in each.modules() if isinstance(m, KvAttention)]
            for each in (model, ours)
        ]
        assert len(scales[0]) == 2
        assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


def test_attention_is_that_of_the_attached_module(converted: Maker, tmp_path: Path):
    source = converted("rtn", "qwen2")
    model = loaded(native(tmp_path / "native", source, ATTENTION))
    plain = logits(loaded(native(tmp_path / "plain", source)))
    assert 1e-3 < difference(logits(model, use_cache=False), plain) < 0.5
    other = loaded(tmp_path / "native", attn_implementation="eager")
    assert torch.equal(logits(other), logits(model))  # no other attention can read the cache
    for layer in model.model.layers:
        del layer.self_attn.kv
    assert difference(logits(model, use_cache=False), plain) < 1e-6


def test_it_generates_from_the_packed_cache(converted: Maker, tmp_path: Path):
    from quantize.serving.kv_cache import cache_bytes

    model = loaded(native(tmp_path / "native", converted("fireq-paper-linear", "qwen2"), ATTENTION))
    out = model.generate(
        tokens(),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (2, 30)
    cached = (
        2 * 2 * 2 * 29
    )  # keys and values of two blocks and two sequences; the last token is never fed
    plain = cached * 2 * 64 * 4
    assert cache_bytes(cache_of(out)) < plain / 4


def test_a_plain_model_generates(converted: Maker, tmp_path: Path):
    model = loaded(native(tmp_path / "native", converted("rtn", "llama")), torch.bfloat16)
    out = model.generate(
        tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert out.shape == (2, 28)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", [None, ATTENTION])
def test_a_loaded_model_saves_what_it_was_loaded_from(
    converted: Maker, tmp_path: Path, tied: bool, attention: dict[str, Any] | None
):
    folder = native(
        tmp_path / "native",
        converted("fireq-paper-linear", "qwen2", tie_word_embeddings=tied),
        attention,
    )
    model = loaded(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) is not tied
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    Checkpoint(tmp_path / "saved")
    configs = [
        json.loads((f / "config.json").read_text())["quantization_config"]
        for f in (folder, tmp_path / "saved")
    ]
    assert configs[0] == configs[1]
    assert torch.equal(logits(loaded(tmp_path / "saved", torch.bfloat16)), logits(model))


def test_a_copy_computes_the_same(converted: Maker, tmp_path: Path):
    model = loaded(native(tmp_path / "native", converted("fireq-paper-linear", "qwen2"), ATTENTION))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_cast_model_saves_its_packed_tensors_unchanged(converted: Maker, tmp_path: Path):
    folder = native(tmp_path / "native", converted("fireq-paper-linear", "llama"))
    loaded(folder).to(torch.float16).save_pretrained(tmp_path / "saved")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    packed = [name for name in before if "weight_" in name]
    assert len(packed) == 42
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in packed
    )
