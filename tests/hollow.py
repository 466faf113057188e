"""Checkpoints of any size that take no room: whole headers, and files that are a hole behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1, "F8_E4M3": 1, "I64": 8}


def hollow(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Path:
    """A folder with config.json and safetensors files of zeros; tensors: name → (dtype, shape)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        more = math.prod(shape) * _SIZES[dtype]
        if shards[-1] and size + more > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += more
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(folder / (file if len(shards) > 1 else "model.safetensors"), shard)
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = json.dumps({"metadata": {}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


_SHARD = 10**9
"""Bytes of one file at most: opening one maps it whole."""


def _write(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _SIZES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def llama(
    folder: Path, layers: int = 32, int4_group: int | None = None, **sizes: int
) -> tuple[Path, dict[str, Any]]:
    """Llama 3 8B, or of other sizes, in bf16 or with packed linears; with its config."""
    H, inner, heads, kv_heads, d, vocab = (
        sizes.get(name, default)
        for name, default in (
            ("hidden", 4096),
            ("intermediate", 14336),
            ("heads", 32),
            ("kv_heads", 8),
            ("head_dim", 128),
            ("vocab", 128256),
        )
    )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    shapes = {
        "self_attn.q_proj": (heads * d, H),
        "self_attn.k_proj": (kv_heads * d, H),
        "self_attn.v_proj": (kv_heads * d, H),
        "self_attn.o_proj": (H, heads * d),
        "mlp.gate_proj": (inner, H),
        "mlp.up_proj": (inner, H),
        "mlp.down_proj": (H, inner),
    }
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (vocab, H)),
        "lm_head.weight": ("BF16", (vocab, H)),
        "model.norm.weight": ("BF16", (H,)),
    }
    for i in range(layers):
        for name, (N, K) in shapes.items():
            module = f"model.layers.{i}.{name}"
            if int4_group is None:
                tensors[f"{module}.weight"] = ("BF16", (N, K))
                continue
            tensors[f"{module}.weight_packed"] = ("I32", (N, K // 8))
            tensors[f"{module}.weight_scale"] = ("BF16", (N, K // int4_group))
            tensors[f"{module}.weight_shape"] = ("I64", (2,))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = ("BF16", (H,))
    if int4_group is not None:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": int4_group,
                    },
                    "input_activations": None,
                }
            },
            "ignore": ["lm_head"],
        }
    return hollow(folder, config, tensors), config
