"""Models that other tools quantized in ways that pq does not read: as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.registry import format_in
from quantize.model.attention_cache import CacheNumerics
from quantize.model.dequantized import open_source
from quantize.model.linear import Numerics
from quantize.model.load import load_model
from quantize.model.transformers_api import load_pretrained


def of_others(source: Checkpoint) -> bool:
    """Whether a checkpoint is quantized, and not in a way that pq reads in full: another
    quant_method, or other tools' use of a format that they share with pq."""
    section: Any = source.config.get("quantization_config")
    if not section:
        return False
    form = format_in(section)
    if form is None or not form.shared:
        return form is None
    try:
        return not form.reads_others(section)
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def rounds_inputs(source: Checkpoint) -> bool:
    """Whether config.json asks, as compressed-tensors writes it, for inputs of linears to be rounded."""
    section: Any = source.config.get("quantization_config")
    groups = section.get("config_groups") if isinstance(section, dict) else None
    return isinstance(groups, dict) and any(
        isinstance(group, dict) and group.get("input_activations") for group in groups.values()
    )


def load_others(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model as transformers loads it, quantized as its tool left it. ModelError where
    transformers, or a package that it asks for, does not do that here."""
    try:
        model, missing = load_pretrained(folder, dtype)
    # Each quantization method of transformers has errors of its own.
    except Exception as err:
        reason = " ".join(str(err).split())[:300] or type(err).__name__
        raise ModelError(
            f"{folder}: transformers does not load this model here ({reason})"
        ) from None
    if missing:
        raise ModelError(f"{folder}: tensor {missing[0]} is missing from the checkpoint")
    found: nn.Module = model.to(device).eval().requires_grad_(False)
    return found


def load_any(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics = "kernel",
    attention: CacheNumerics | None = None,
) -> nn.Module:
    """`load_model`, and of what it does not read `load_others`."""
    if attention is None and of_others(open_source(folder)):
        try:
            return load_model(folder, device, dtype, numerics)
        except ModelError:
            return load_others(folder, device, dtype)
    return load_model(folder, device, dtype, numerics, attention)
