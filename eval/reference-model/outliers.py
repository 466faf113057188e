"""Give a Llama the outlier channels of large models without changing the function that it computes.

A small model trained from scratch has flat weights and activations and so flatters every quantizer. Here a few channels
are multiplied by a power of two where they are produced and divided by it where they are consumed. Powers of two only
move the exponent, so that nothing is rounded, in bfloat16 as in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Factors = dict[int, float]
"""Channel -> power of two."""


def add_outliers(
    state_dict: Mapping[str, Tensor],
    config: Any,
    seed: int,
    channels: int,
    log2_range: tuple[int, int],
) -> dict[str, Tensor]:
    """Return a copy of a Llama's state dict with `channels` outlier channels per place, factors 2^lo..2^hi.

    The residual channels are the same in all layers and both norms; value, MLP and key channels differ by layer.
    `config` is a LlamaConfig; weights without biases, q/k norms and with the half-split RoPE layout.
    """
    weights = {name: tensor.clone() for name, tensor in state_dict.items()}
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Factors:
        chosen = torch.randperm(width, generator=generator)[:channels].tolist()
        low, high = log2_range
        exponents = torch.randint(low, high + 1, (len(chosen),), generator=generator).tolist()
        return {channel: 2.0**exponent for channel, exponent in zip(chosen, exponents, strict=True)}

    residual = draw(config.hidden_size)
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}."
        _scale_norms(weights, block, residual)
        _scale_values(weights, block, config, draw(config.num_key_value_heads * config.head_dim))
        _scale_mlp(weights, block, draw(config.intermediate_size))
        for kv_head in range(config.num_key_value_heads):
            _scale_keys(weights, block, config, kv_head, draw(config.head_dim // 2))
    return weights


def _scale_norms(weights: dict[str, Tensor], block: str, residual: Factors) -> None:
    sinks = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for channel, factor in residual.items():
        for norm, consumers in sinks.items():
            weights[f"{block}{norm}.weight"][channel] *= factor
            for consumer in consumers:
                weights[f"{block}{consumer}.weight"][:, channel] /= factor


def _scale_values(weights: dict[str, Tensor], block: str, config: Any, rows: Factors) -> None:
    for row, factor in rows.items():
        weights[f"{block}self_attn.v_proj.weight"][row] *= factor
        kv_head, channel = divmod(row, config.head_dim)
        weights[f"{block}self_attn.o_proj.weight"][
            :, _query_channels(config, kv_head, channel)
        ] /= factor


def _scale_mlp(weights: dict[str, Tensor], block: str, rows: Factors) -> None:
    for row, factor in rows.items():
        weights[f"{block}mlp.up_proj.weight"][row] *= factor
        weights[f"{block}mlp.down_proj.weight"][:, row] /= factor


def _scale_keys(
    weights: dict[str, Tensor], block: str, config: Any, kv_head: int, pairs: Factors
) -> None:
    half = config.head_dim // 2
    for first, factor in pairs.items():
        # RoPE mixes the two members of a pair, so that only a common factor passes through it.
        for channel in (first, first + half):
            weights[f"{block}self_attn.k_proj.weight"][kv_head * config.head_dim + channel] *= (
                factor
            )
            weights[f"{block}self_attn.q_proj.weight"][
                _query_channels(config, kv_head, channel)
            ] /= factor


def _query_channels(config: Any, kv_head: int, channel: int) -> list[int]:
    """Return the indices of `channel` in all query heads that read `kv_head`."""
    group = config.num_attention_heads // config.num_key_value_heads
    return [
        head * config.head_dim + channel for head in range(kv_head * group, (kv_head + 1) * group)
    ]
