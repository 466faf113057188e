"""Bytes of checkpoints of known shapes, sharded, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hollow import hollow, llama
from small_sources import fp8

from quantize.errors import ModelError, UsageError
from quantize.plan.checkpoint import served_model

REFERENCE = Path(__file__).parents[2] / "eval" / "reference-model"


def test_llama_3_8b_is_what_vllm_loads(tmp_path: Path):
    """vLLM says `Loading model weights took 14.99 GiB` of it, 7.5 on each of two GPUs."""
    model = served_model(llama(tmp_path)[0])
    assert model.weights(1) / 2**30 == pytest.approx(14.96, abs=0.01)
    assert model.weights(2) / 2**30 == pytest.approx(7.48, abs=0.01)
    assert model.kv_bytes_per_token(1) == 2 * 32 * 8 * 128 * 2
    assert model.parameters_per_token == 6_979_321_856
    assert (model.head_parameters, model.ffn_width) == (128256 * 4096, 14336)
    assert (model.compute, model.notes, model.max_context) == ("bf16", (), 131072)


def test_packed_linears_count_their_scales(tmp_path: Path):
    plain, packed = (
        served_model(llama(tmp_path / str(group), int4_group=group)[0]) for group in (None, 128)
    )
    linears = plain.parameters_per_token
    stored = linears * (4 + 16 / 128) / 8 + 7 * 32 * 16  # the notes of shapes
    assert plain.weights(1) - packed.weights(1) == pytest.approx(2 * linears - stored, abs=64)
    assert packed.compute == "bf16"  # weights alone are packed


def test_what_a_gpu_holds_of_small_heads(tmp_path: Path):
    """Two heads of keys and values on eight GPUs: each holds one, four times over."""
    model = served_model(llama(tmp_path, layers=2, kv_heads=2)[0])
    kv = 2 * 2 * 2 * 2 * 128 * 4096  # layers, k and v, heads, bytes
    norms = 2 * 5 * 4096
    assert model.weights(8) - (model.weights(1) - kv - norms) // 8 == kv // 2 + norms
    assert model.refuses(8) is None
    assert "which 3 GPUs do not share evenly" in str(model.refuses(3))
    assert model.kv_bytes_per_token(8) == model.kv_bytes_per_token(2)


def test_groups_are_not_cut(tmp_path: Path):
    model = served_model(llama(tmp_path, layers=1, int4_group=128, intermediate=128 * 6)[0])
    assert model.refuses(2) is None
    assert "groups of the FFN's channels come in 6" in str(model.refuses(4))


def test_experts_are_read_by_those_that_are_visited(tmp_path: Path):
    model = served_model(_mixture(tmp_path))
    expert = 2 * 3 * 256 * 512  # bytes of one
    routed = [part for part in model.parts if part.experts]
    assert sum(part.bytes for part in routed) == 2 * 8 * expert
    one, many = model.read_bytes(1, 1), model.read_bytes(1, 10_000)
    assert many - one == pytest.approx(2 * 6 * expert)  # a token visits 2 of 8, in 2 layers
    attention = 256 * (4 + 2 + 2 + 4) * 64
    assert model.parameters_per_token == 2 * (attention + 2 * 3 * 256 * 512 + 8 * 256)
    assert (model.ffn_width, model.visits) == (1024, 2)


def test_stacked_experts_are_experts(tmp_path: Path):
    apart, stacked = (served_model(_mixture(tmp_path / str(s), stacked=s)) for s in (False, True))
    assert apart.weights(1) == stacked.weights(1)
    assert apart.parameters_per_token == stacked.parameters_per_token
    assert apart.read_bytes(1, 3) == stacked.read_bytes(1, 3)


def _mixture(folder: Path, stacked: bool = False) -> Path:
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "moe_intermediate_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    }
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (1024, 256))
    }
    for i in range(2):
        at = f"model.layers.{i}"
        for name, rows in (("q", 256), ("k", 128), ("v", 128), ("o", 256)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = ("BF16", (rows, 256))
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", (8, 256))
        if stacked:
            tensors[f"{at}.mlp.experts.gate_up_proj"] = ("BF16", (8, 1024, 256))
            tensors[f"{at}.mlp.experts.down_proj"] = ("BF16", (8, 256, 512))
            continue
        for e in range(8):
            for name, shape in (("gate", (512, 256)), ("up", (512, 256)), ("down", (256, 512))):
                tensors[f"{at}.mlp.experts.{e}.{name}_proj.weight"] = ("BF16", shape)
    return hollow(folder, config, tensors)


def test_latent_attention_keeps_one_vector_on_every_gpu(tmp_path: Path):
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 1024,
        "n_routed_experts": None,
        "first_k_dense_replace": 1,
    }
    at = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (1024, 256),
        "lm_head.weight": (1024, 256),
        f"{at}.self_attn.q_proj.weight": (4 * 192, 256),
        f"{at}.self_attn.kv_a_proj_with_mqa.weight": (576, 256),
        f"{at}.self_attn.kv_b_proj.weight": (4 * 256, 512),
        f"{at}.self_attn.o_proj.weight": (256, 4 * 128),
        f"{at}.mlp.gate_proj.weight": (512, 256),
        f"{at}.mlp.up_proj.weight": (512, 256),
        f"{at}.mlp.down_proj.weight": (256, 512),
    }
    folder = hollow(tmp_path, config, {name: ("BF16", shape) for name, shape in shapes.items()})
    model = served_model(folder)
    assert model.kv_bytes_per_token(1) == model.kv_bytes_per_token(4) == 2 * 576
    assert served_model(folder, "fp8").kv_bytes_per_token(1) == 576
    assert served_model(folder, "int4").kv_bytes_per_token(1) == 288 + 8  # two scales
    whole = 2 * 576 * 256
    assert model.weights(4) == (model.weights(1) - whole) // 4 + whole
    assert (model.score_dim, model.latent_dim) == (320, 2 * 512 + 64)


@pytest.mark.parametrize(
    ("kv", "size"), [("bf16", 256), ("fp8", 128), ("fp8-head", 136), ("int8", 136), ("int4", 72)]
)
def test_types_of_the_cache(kv: str, size: int):
    """Bytes of a key and a value of 64 channels; those with a scale a token and head have two of 4."""
    assert served_model(REFERENCE, kv).kv_bytes_per_token(1) == 3 * 2 * size


def test_the_cache_that_a_checkpoint_asks_for(tmp_path: Path):
    folder, config = llama(tmp_path, layers=1, int4_group=128)
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert served_model(folder).kv_bytes_per_token(1) == 2 * 8 * 128
    with pytest.raises(UsageError, match="choose one of auto, bf16"):
        served_model(folder, "int3")


def test_layers_that_slide(tmp_path: Path):
    folder, config = llama(tmp_path, layers=4)
    config |= {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 1024,
        "model_type": "a_model_that_transformers_does_not_know",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = served_model(folder)
    assert [layer.window for layer in model.kv] == [1024, None, 1024, None]
    assert model.kv_bytes(8192) == 2 * 2 * 2 * 8 * 128 * (1024 + 8192)


def test_fp8_of_other_tools_is_multiplied_in_fp8(tmp_path: Path):
    assert served_model(fp8(tmp_path)).compute == "fp8"


def test_floats_of_32_bits_are_served_in_16(tmp_path: Path):
    config = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    plain = served_model(REFERENCE)
    from quantize.files.checkpoint import Checkpoint
    from quantize.files.headers import tensor_headers

    shapes = {k: ("F32", v.shape) for k, v in tensor_headers(Checkpoint(REFERENCE)).items()}
    wide = served_model(hollow(tmp_path, config, shapes))
    norms = 2 * (2 * 3 + 1) * 256  # those stay as they are
    assert wide.weights(1) - plain.weights(1) <= norms


def test_a_checkpoint_with_missing_blocks_is_refused(tmp_path: Path):
    folder, config = llama(tmp_path, layers=2)
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="no list of 3 decoder blocks"):
        served_model(folder)
