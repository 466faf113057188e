"""A Llama of random weights in the shape of a real one, sharded, for measurements of memory and time.

    python eval/random_model.py 7B /scratch/7B [--layers 2]

The tokenizer is that of the embedded reference model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "0.1B": (768, 2048, 12, 12, 12, 32000),
    "1B": (2048, 5632, 22, 32, 4, 32000),
    "7B": (4096, 11008, 32, 32, 32, 32000),
}
"""Of a small Llama, TinyLlama-1.1B and Llama-2-7B."""
_REFERENCE = Path(__file__).parent / "reference-model"


def build(name: str, folder: Path, layers: int | None = None) -> None:
    """Write the model; layers: how many instead of the shape's own."""
    hidden, intermediate, usual, heads, kv_heads, vocab = SHAPES[name]
    layers = layers or usual
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((_REFERENCE / "config.json").read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_REFERENCE / file, folder / file)
    kv = hidden // heads * kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        norms = {
            f"{at}{norm}.weight": (hidden,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        shards.append(norms | {f"{at}{name}.weight": size for name, size in linears.items()})
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    _write(folder, shards)


def _write(folder: Path, shards: list[dict[str, tuple[int, ...]]]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, size in shapes.items():
            # Outputs of blocks then stay of order 1.
            spread = 1.0 if len(size) == 1 else 0.5 * size[1] ** -0.5
            noise = torch.randn(size, generator=generator, dtype=torch.float32).mul_(spread)
            tensors[name] = (torch.ones(size) if len(size) == 1 else noise).bfloat16()
            total += 2 * tensors[name].numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--layers", type=int)
    given = arguments.parse_args()
    build(given.shape, given.folder, given.layers)
