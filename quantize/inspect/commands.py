"""Commands that serve a checkpoint, by engine, where an engine takes it as it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.formats.engines import LLAMA_CPP, TRANSFORMERS, VLLM
from quantize.inspect.engines import Loading, Loadings

USUAL_CONTEXT = 4096
"""Tokens of a sequence where nobody asks for others: what most chats stay below."""
USUAL_SEQUENCES = 8


def usual_context(allowed: int | None) -> int:
    """Tokens of a sequence of a model that allows for so many; None: unknown."""
    return min(USUAL_CONTEXT, allowed or USUAL_CONTEXT)


def loading_in(found: Loadings, engine: str) -> list[Loading]:
    """Where an engine takes the checkpoint."""
    return [x for x in found.engines if x.loads and x.engine.startswith(engine)]


def start_commands(
    name: str,
    folder: Path,
    found: Loadings,
    context: int,
    sequences: int = USUAL_SEQUENCES,
    kv_dtype: str | None = None,
    gpus: int = 1,
    on_hub: bool = False,
) -> dict[str, list[str]]:
    """Engine → lines that start it, those of the shell or of Python.

    name: what the checkpoint is called there, a folder or an id. folder: where it is now. context:
    tokens of a sequence. sequences: at once. kv_dtype: vLLM's word for a cache that the checkpoint
    itself does not ask for. gpus: that share it.
    on_hub: whether the name is an id there.
    """
    out: dict[str, list[str]] = {}
    if loading_in(found, VLLM.name):
        words = [f"vllm serve {shlex.quote(name)}", f"--max-model-len {context}"]
        words.append(f"--max-num-seqs {sequences}")
        if found.fp8 and found.dtype != "bfloat16":
            words.append("--dtype bfloat16")
        if kv_dtype is not None:
            words.append(f"--kv-cache-dtype {kv_dtype}")
        if gpus > 1:
            words.append(f"--tensor-parallel-size {gpus}")
        options = found.options.get(VLLM.name, ())
        out[VLLM.name] = [" ".join((*words, *options))]
        if options:
            out[VLLM.name].append(f"{' '.join(words)}  # on CPUs")
    if loading_in(found, LLAMA_CPP.name) and (files := sorted(folder.glob("*.gguf"))):
        file = shlex.quote(str(Path(name) / files[0].name))
        which = f"-hf {shlex.quote(name)}" if on_hub else f"-m {file}"
        total = context * sequences  # llama.cpp shares it among its slots
        out[LLAMA_CPP.name] = [f"llama-server {which} -c {total} -np {sequences}"]
    if places := loading_in(found, TRANSFORMERS.name):
        out[TRANSFORMERS.name] = [
            *([places[0].first] if places[0].first else []),
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f'model = AutoModelForCausalLM.from_pretrained({name!r}, device_map="auto")',
        ]
    return out


def context_in(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model allows for, by config.json or its part for text; None where it does not
    say."""
    for part in (config.get("text_config"), config):
        value = part.get("max_position_embeddings") if isinstance(part, Mapping) else None
        if type(value) is int and value > 0:
            return value
    return None
