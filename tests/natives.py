"""Checkpoints in pq's own format, and what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rows import architecture_of, block_architecture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantize.files.checkpoint import INDEX_NAME
from quantize.formats.kv4 import KvNumerics, KvScheme
from quantize.formats.packed_int import IntScheme
from quantize.model.arch import Shape

Maker = Callable[..., Path]
ATTENTION = {"kv_cache": KvScheme().as_json(), "query": "fp8", "probabilities": "fp8"}
W4A16, W4A8 = IntScheme(4, 64, False), IntScheme(4, 128, True)
KV_SHARD = "kv.safetensors"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change config.json's quantization_config in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: t
        for shard in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(shard).items()
    }


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the checkpoint's tensors in place."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
    held = {shard.name: load_file(shard) for shard in sorted(folder.glob("*.safetensors"))}
    where = {name: shard for shard, tensors in held.items() for name in tensors}
    (folder / INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
    )
    return folder


def native(folder: Path, source: Path, attention: Mapping[str, Any] | None = None) -> Path:
    """Copy a compressed-tensors checkpoint as the same in the native format; S is not one where there is attention."""
    shutil.copytree(source, folder)

    def change(found: dict[str, Any]) -> None:
        kept = {"config_groups": found["config_groups"], "ignore": found["ignore"]}
        found.clear()
        found.update({"quant_method": "pq", "version": 1, "attention": attention, **kept})

    rewritten(folder, change)
    if attention is None:
        return folder
    shape = Shape.of(json.loads((folder / "config.json").read_text()))
    generator = torch.Generator().manual_seed(3)
    sizes = KvNumerics.from_json(attention).tensors(shape.n_kv_heads, shape.head_dim)
    scales = {
        f"model.layers.{i}.self_attn.{name}": drawn(name, size, generator)
        for i in range(shape.n_blocks)
        for name, size in sizes.items()
    }
    save_file(scales, folder / KV_SHARD, metadata={"format": "pt"})
    return edited(folder, lambda tensors: None)


def drawn(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Tensors of a cache that all change something."""
    if name.endswith("rotation"):
        return torch.linalg.qr(torch.randn(size, generator=generator))[0].contiguous()
    return torch.rand(size, generator=generator) + 0.5


def linears_of(folder: Path) -> int:
    """How many linears the blocks of a model have."""
    config = json.loads((folder / "config.json").read_text())
    arch, n = architecture_of(config), Shape.of(config).n_blocks
    return sum(len(block_architecture(arch, config, index).roles) for index in range(n))


def tokens(length: int = 24) -> Tensor:
    return torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens(), **kwargs).logits
    return out


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
