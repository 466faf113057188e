"""Checkpoints in pq's own format whose linears are packed in every way at once, made of the reference model without
a conversion: what serves them is tested, not how well they are rounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.formats.bitvec import BitVec, BitVecScheme, groups_per_row
from quantize.formats.kv4 import KvNumerics, KvScheme
from quantize.formats.native import native_config
from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.formats.routing import Policy
from quantize.formats.scheme import AnyScheme, Packed
from quantize.model.hadamard import apply_hadamard

REFERENCE = Path(__file__).resolve().parents[2] / "eval" / "reference-model"
ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ATTENTION = {"kv_cache": KvScheme().as_json(), "query": "fp8", "probabilities": "fp8"}
HEAD = "lm_head"


def bitvec(bits: int, group_size: int = 128, bias: bool = True) -> BitVecScheme:
    return BitVecScheme(bits, group_size, bias, 2, 64)


def packed(weight: Tensor, scheme: AnyScheme) -> Packed:
    """A weight [N, K], rounded to the nearest codes of a scheme."""
    return _integers(weight, scheme) if isinstance(scheme, IntScheme) else _vectors(weight, scheme)


def _integers(weight: Tensor, scheme: IntScheme) -> PackedInt:
    N, K = weight.shape
    group, top = scheme.group(K), (1 << (scheme.bits - 1)) - 1
    groups = weight.float().view(N, -1, group)
    scale = (groups.abs().amax(-1) / top).clamp_min(2.0**-20).bfloat16()
    # Neighbours in a row and in a column have opposite signs.
    scale[:, 1::2] *= -1
    scale[1::2] *= -1
    codes = (groups / scale.float()[..., None]).round().clamp(-top - 1, top)
    return PackedInt(
        codes.view(N, K).to(torch.int8), scale, scheme.bits, group, scheme.group_size is None
    )


def _vectors(weight: Tensor, scheme: AnyScheme) -> BitVec:
    # Lines whose sums are evenly spaced, of the scale that is nearest a group's own.
    assert isinstance(scheme, BitVecScheme)
    (N, K), g = weight.shape, scheme.group_size
    G, half = groups_per_row(K, g), 1 << (scheme.bits - 1)
    padded = torch.zeros(N, G * g)
    padded[:, :K] = weight
    groups = padded.view(N, G, g)
    wanted = groups.abs().amax(-1) / half
    scales = torch.linspace(float(wanted.min()), float(wanted.max()), scheme.scales)
    which = (wanted[..., None] - scales).abs().argmin(-1)
    centre = half - 0.5 if scheme.bias else 0.0
    codes = (groups / scales[which][..., None] + centre).round().clamp(0, 2 * half - 1)
    line = [float(1 << k) for k in range(scheme.bits)] + [-centre] * scheme.bias
    lines = torch.tensor([line, [0.5 * c for c in line]][: scheme.lines]).half()
    flat = codes.view(N, -1)[:, :K].to(torch.uint8)
    return BitVec(flat, which.int(), lines, scales.float(), scheme.bits, g)


def write(
    folder: Path,
    schemes: Mapping[str, AnyScheme],
    *,
    attention: Mapping[str, Any] | None = None,
    rotated: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """The reference model with these linears packed, by full name; those of `rotated` rotate their inputs.

    With attention S is not one. fields: of config.json, to change.
    """
    folder.mkdir()
    config = json.loads((REFERENCE / "config.json").read_text()) | dict(fields or {})
    tensors = load_file(REFERENCE / "model.safetensors")
    linears = [name.removesuffix(".weight") for name in tensors if "_proj." in name]
    if HEAD in schemes:
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name in rotated:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = apply_hadamard(weight.float()).to(weight.dtype)
    for name, scheme in schemes.items():
        found = packed(tensors.pop(f"{name}.weight"), scheme)
        assert found.scheme(scheme.fp8_activations) == scheme
        tensors |= {f"{name}.{suffix}": t for suffix, t in found.tensors().items()}
    if attention is not None:
        draw = torch.Generator().manual_seed(5)
        for i in range(config["num_hidden_layers"]):
            size = (config["num_key_value_heads"], config["head_dim"])
            for name, shape in KvNumerics.from_json(attention).tensors(*size).items():
                held = torch.rand(shape, generator=draw) + 0.5
                if name.endswith("rotation"):
                    held = torch.linalg.qr(held - 1)[0].contiguous()
                tensors[f"model.layers.{i}.self_attn.{name}"] = held
    left = [name for name in [*linears, HEAD] if name not in schemes]
    config["quantization_config"] = native_config(schemes, left, attention, rotated)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(REFERENCE / name, folder)
    return folder


def mixed_schemes(blocks: int = 3) -> dict[str, AnyScheme]:
    """A scheme of every kind, and linears of one matrix of vLLM's that are packed in different ways."""
    w4, w4a8 = IntScheme(4, 64, False), IntScheme(4, 128, True)
    ways: list[dict[str, AnyScheme]] = [
        {"q": w4, "k": w4, "v": w4, "o": bitvec(4), "gate": bitvec(2), "up": bitvec(3), "down": w4a8},
        {"q": w4a8, "k": w4a8, "v": bitvec(8, 64), "o": IntScheme(8, None, False), "gate": w4a8,
         "up": w4a8, "down": bitvec(5, 256, False)},
        {"q": bitvec(4), "v": IntScheme(3, 32, False), "o": w4a8, "gate": w4, "up": w4, "down": w4},
    ]  # fmt: skip
    out: dict[str, AnyScheme] = {
        f"model.layers.{i}.{ROLES[role]}": scheme
        for i in range(blocks)
        for role, scheme in ways[i % len(ways)].items()
    }
    return out | {HEAD: w4a8}


MOE_FIELDS = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "qkv_bias": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 3,
}
EXPERTS, SIZE = 6, 128


def write_moe(
    folder: Path, schemes: Mapping[str, AnyScheme], routing: Mapping[str, Policy]
) -> Path:
    """The reference model as `qwen2_moe`: its attention, and random experts, some of their linears packed."""
    write(folder, {}, fields=MOE_FIELDS)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(9)
    D, linears = config["hidden_size"], []
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for role, heads in (("q", 4), ("k", 2), ("v", 2)):
            tensors[f"{block}.self_attn.{role}_proj.bias"] = torch.zeros(heads * 64).bfloat16()
        for role in ("gate", "up", "down"):
            del tensors[f"{block}.mlp.{role}_proj.weight"]
        homes = [*(f"experts.{e}" for e in range(EXPERTS)), "shared_expert"]
        for home in homes:
            for role in ("gate", "up", "down"):
                size = (D, SIZE) if role == "down" else (SIZE, D)
                name = f"{block}.mlp.{home}.{role}_proj"
                linears.append(name)
                weight = torch.randn(size, generator=draw) / size[1] ** 0.5
                tensors[f"{name}.weight"] = weight.bfloat16()
        for name, rows in (("gate", EXPERTS), ("shared_expert_gate", 1)):
            weight = torch.randn(rows, D, generator=draw) / D**0.5
            tensors[f"{block}.mlp.{name}.weight"] = weight.bfloat16()
    for name, scheme in schemes.items():
        found = packed(tensors.pop(f"{name}.weight"), scheme)
        tensors |= {f"{name}.{suffix}": t for suffix, t in found.tensors().items()}
    left = [name for name in [*linears, HEAD] if name not in schemes]
    left += [f"model.layers.{i}.{ROLES[r]}" for i in range(3) for r in "qkvo"]
    config["quantization_config"] = native_config(schemes, left, None, (), routing)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


DENSE_EXPERTS = {"n": 2, "size": 128, "shared": 128}


def with_experts(
    folder: Path, schemes: Mapping[str, AnyScheme], routing: Mapping[str, Policy]
) -> Path:
    """A plain dense checkpoint whose FFNs of `routing` become experts, in place: their neurons are dealt out,
    and routers are random. The model's class stays."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(11)
    n, size = DENSE_EXPERTS["n"], DENSE_EXPERTS["size"]
    for ffn in routing:
        old = {r: tensors.pop(f"{ffn}.{r}_proj.weight") for r in ("gate", "up", "down")}
        homes = [*(f"experts.{e}" for e in range(n)), "shared_expert"]
        for place, home in enumerate(homes):
            own = slice(place * size, (place + 1) * size)
            for role, weight in old.items():
                part = weight[:, own] if role == "down" else weight[own]
                tensors[f"{ffn}.{home}.{role}_proj.weight"] = part.contiguous()
        for name, rows in (("gate", n), ("shared_expert_gate", 1)):
            weight = torch.randn(rows, config["hidden_size"], generator=draw) / 16
            tensors[f"{ffn}.{name}.weight"] = weight.to(old["up"].dtype)
    for name, scheme in schemes.items():
        found = packed(tensors.pop(f"{name}.weight"), scheme)
        tensors |= {f"{name}.{suffix}": t for suffix, t in found.tensors().items()}
    linears = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    config["quantization_config"] = native_config(
        schemes, [*linears, HEAD], None, (), routing, DENSE_EXPERTS
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_compressed_tensors(folder: Path) -> Path:
    """A native checkpoint of integers as the same in format compressed-tensors, in place."""
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": section["config_groups"],
        "ignore": section["ignore"],
        "kv_cache_scheme": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
