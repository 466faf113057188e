"""Small random models that behave like trained ones: of every type that transformers knows.

What a trained model has and a freshly initialized one lacks, and what would hide mistakes if it were
missing: logits that neither are flat nor name one token for certain, blocks of which each changes the
stream, weights of norms that are not all alike, biases that are not zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT,
)

from models.balance import CHANGE, ENTROPY, balance, enliven
from models.passes import apart, causality, entropy, logits, measure, tokens
from models.shrink import shrunken
from models.stack import find_blocks

__all__ = [
    "CHANGE",
    "ENTROPY",
    "apart",
    "build",
    "causality",
    "entropy",
    "find_blocks",
    "liven",
    "loader_of",
    "logits",
    "measure",
    "outline",
    "save",
    "tokens",
]

SENTENCES = (
    "Seven small boats went down the river before noon.",
    "The price of 128 bolts is 3.20, of 64 it is 1.75; nails cost less.",
    "Nobody had asked the gardener why the gate stood open that night.",
    "If rain is measured in millimetres, what does a drop measure?",
)


def loader_of(model_type: str, image_text: bool | None = None) -> Any:
    """The auto class of a type; a type that is both is a causal one unless `image_text`."""
    if image_text is None:
        image_text = model_type not in CAUSAL
    if model_type not in (IMAGE_TEXT if image_text else CAUSAL):
        raise KeyError(
            f"{model_type} is no type of {'image-text' if image_text else 'causal'} models"
        )
    return AutoModelForImageTextToText if image_text else AutoModelForCausalLM


def outline(
    model_type: str, seed: int = 0, image_text: bool | None = None, **changes: Any
) -> PreTrainedModel:
    """A small float32 model of a type as its class initializes it; `changes` are of its config."""
    loader = loader_of(model_type, image_text)
    torch.manual_seed(seed)
    model: PreTrainedModel = loader.from_config(
        shrunken(model_type, **changes), dtype=torch.float32
    )
    return model.eval()


def build(
    model_type: str, seed: int = 0, image_text: bool | None = None, **changes: Any
) -> PreTrainedModel:
    """The same with weights that are not degenerate."""
    model = outline(model_type, seed, image_text, **changes)
    liven(model, seed)
    return model


def liven(model: PreTrainedModel, seed: int = 0) -> None:
    """Give a model the weights that `build` gives it."""
    enliven(model, torch.Generator().manual_seed(seed + 1))
    balance(model)


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a checkpoint folder with a tokenizer and a short text, text.txt → the folder."""
    from conftest import save_side_files

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_side_files(folder)
    lines = [f"{SENTENCES[i % 4]} That was line {i * 37 % 101}." for i in range(80)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
