"""Heads that share the embedding's weight, as far as config.json and the tensors agree on that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from quantize.files.checkpoint import Checkpoint
from quantize.model.arch import Architecture, Shape

_TIED = "tie_word_embeddings"


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with a head of its own."""
    # Some classes let a section of the text decoder decide where the whole says no.
    sections = {
        name: {**section, _TIED: False}
        for name, section in config.items()
        if isinstance(section, Mapping) and (name == "text_config" or section.get(_TIED))
    }
    return {**config, _TIED: False, **sections}


def settle_tie(source: Checkpoint, arch: Architecture, shape: Shape) -> Shape:
    """The shape as transformers has it: a head that config.json ties to the embedding, and that is
    stored with other values, is left untied. Then `source.config` says so from now on, and
    `source.notes` a line more."""
    head, embedding = f"{arch.head}.weight", f"{arch.embedding}.weight"
    if not shape.tied or head not in source or embedding not in source:
        return shape
    if torch.equal(source.tensor(head), source.tensor(embedding)):
        return shape
    source.config = untied(source.config)
    source.notes = (
        *source.notes,
        f"{source.folder}: {head} differs from {embedding}, though config.json ties them; taken as "
        "a head of its own, as transformers does",
    )
    return replace(shape, tied=False)
