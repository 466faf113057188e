"""Tiny models as they are published small: FP8 of several kinds, and the MXFP4 of gpt-oss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import config_of, random_weights, save_model, save_side_files
from torch import Tensor

SIZES = {"hidden_size": 256, "intermediate_size": 512}
"""Two blocks of 128 along each side."""


def rounded(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """FP8 codes [N, K] of a weight and float32 scales, one for each block; blocks at the end may be cut off."""
    N, K = weight.shape
    scale = torch.empty(-(-N // rows), -(-K // columns))
    codes = torch.empty(N, K)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[place].float().abs().max() / 448
            codes[place] = weight[place].float() / scale[i, j]
    return codes.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def fp8(
    folder: Path,
    model_type: str = "qwen3",
    block: int | None = 128,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """`quant_method: fp8`; block None: one scale for each tensor, and static scales of activations."""
    config = config_of(model_type, **(SIZES | changes))
    out: dict[str, Tensor] = {}
    for name, weight in random_weights(config).items():
        if not name.endswith("_proj.weight"):
            out[name] = weight
            continue
        out[name], scale = rounded(weight, block or weight.shape[0], block or weight.shape[1])
        out[f"{name}_scale_inv"] = scale.to(dtype) if block else scale.reshape(())
        if not block:
            out[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
    section = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic" if block else "static",
        "weight_block_size": [block, block] if block else None,
        "modules_to_not_convert": ["lm_head"],
    }
    save_model(folder, config | {"quantization_config": section}, out)
    save_side_files(folder)
    return folder


def float_quantized(folder: Path, strategy: str, form: str = "float-quantized") -> Path:
    """FP8 of compressed-tensors: strategy tensor, channel, group or block."""
    config = config_of("llama", **SIZES)
    out: dict[str, Tensor] = {}
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": strategy,
    }
    weights |= {"block_structure": [128, 128]} if strategy == "block" else {}
    weights |= {"group_size": 64} if strategy == "group" else {}
    for name, weight in random_weights(config).items():
        if not name.endswith("_proj.weight"):
            out[name] = weight
            continue
        N, K = weight.shape
        block = {"tensor": (N, K), "channel": (1, K), "group": (1, 64), "block": (128, 128)}[
            strategy
        ]
        out[name], scale = rounded(weight, *block)
        out[f"{name}_scale"] = scale.reshape(1) if strategy == "tensor" else scale
        out[name.replace("weight", "input_scale")] = torch.tensor([0.5])
    inputs = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    section = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    section |= {"quantization_status": "compressed", "config_groups": groups}
    save_model(folder, config | {"quantization_config": section}, out)
    save_side_files(folder)
    return folder


def gpt_oss(folder: Path) -> Path:
    """gpt-oss with random codes and scales."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=300, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, layer_types=["sliding_attention", "full_attention"], bos_token_id=0,
        eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            E, K, N = tensor.shape
            out[f"{name}_blocks"] = torch.randint(
                0, 256, (E, N, K // 32, 16), dtype=torch.uint8, generator=draw
            )
            out[f"{name}_scales"] = torch.randint(
                118, 124, (E, N, K // 32), dtype=torch.uint8, generator=draw
            )
        else:
            noise = torch.randn(tensor.shape, generator=draw)
            out[name] = (1 + 0.1 * noise if "norm" in name else 0.3 * noise).to(torch.bfloat16)
    section = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    facts = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    save_model(folder, facts | {"quantization_config": section}, out)
    save_side_files(folder)
    return folder
