"""Which channels of a head rotary position embedding rotates together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantize.errors import ModelError
from quantize.model.arch import RopeLayout


def rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """Leading channels of a head that are rotated (partial RoPE leaves the rest alone);
    ModelError unless they pair."""
    parameters = config.get("rope_parameters") or {}
    factor = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rotated = head_dim if factor is None else int(head_dim * factor)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise ModelError(
            f"config.json: partial_rotary_factor {factor} gives {rotated} of {head_dim} channels "
            "in pairs"
        )
    return rotated


def partners(layout: RopeLayout, head_dim: int, rotated: int) -> Tensor:
    """Partner [d] of every channel of a head; a channel that is not rotated is its own."""
    channel = torch.arange(head_dim)
    partner = (channel + rotated // 2) % rotated if layout == "half-split" else channel ^ 1
    return torch.where(channel < rotated, partner, channel)


def pair_norm(x: Tensor, partner: Tensor) -> Tensor:
    """Length [..., d] of the pair that each channel of x [..., d] belongs to:
    rotation does not change it."""
    alone = partner == torch.arange(len(partner), device=partner.device)
    return torch.where(alone, x.abs(), (x.square() + x[..., partner].square()).sqrt())
