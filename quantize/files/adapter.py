"""Adapters (LoRA and its kin), which transformers applies where peft is installed."""

from __future__ import annotations

import os
from pathlib import Path

from quantize.errors import ModelError
from quantize.files.folder import inside, read_json

ADAPTER_CONFIG = "adapter_config.json"
_PROMPTS = ("PROMPT", "PREFIX", "P_TUNING", "CPT")
"""Kinds that put tokens before the text, and nothing into weights."""


def require_no_adapter(folder: Path) -> None:
    """ModelError for a folder with an adapter: alone, it is no model, and beside one it makes
    another of it, with peft installed and not without."""
    path = folder / ADAPTER_CONFIG
    if not os.path.isfile(path):  # nor in a folder that may not be read, which others refuse
        return
    config = read_json(inside(folder, path))
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    what = f"adapter ({kind})" if isinstance(kind, str) else "adapter"
    name = base if isinstance(base, str) and base else "a model that it does not name"
    prompts = isinstance(kind, str) and any(part in kind for part in _PROMPTS)
    if not (folder / "config.json").is_file() or not _holds_weights(folder):
        remedy = f"merge it first: {_merge(name, str(folder))}"
        if prompts:
            remedy = f"it puts tokens before the text and cannot be merged: convert {name} itself"
        raise ModelError(f"{folder}: is an {what} of {name} and no model; {remedy}")
    remedy = "move its adapter_* files out of the folder and convert the model without it"
    if not prompts:
        merged = _merge(str(folder), "ADAPTER")
        remedy = f"{remedy}, or with them in a folder ADAPTER merge it first: {merged}"
    raise ModelError(
        f"{path}: is an {what} beside a whole model, which transformers applies with peft alone; "
        f"{remedy}"
    )


def _merge(model: str, adapter: str) -> str:
    """A command that merges an adapter into a model."""
    return (
        'python -c "from peft import PeftModel; from transformers import AutoModelForCausalLM; '
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), {adapter!r})"
        ".merge_and_unload().save_pretrained('MERGED')\", and copy the tokenizer's files to MERGED"
    )


def _holds_weights(folder: Path) -> bool:
    weights = (p.name for p in folder.glob("*.safetensors"))
    return any(not name.startswith("adapter") for name in weights)
