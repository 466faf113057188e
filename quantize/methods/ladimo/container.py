"""config.json and tensors of the stock architecture that holds a converted model: `qwen2_moe`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from quantize.errors import ModelError
from quantize.methods.ladimo.split import Layout
from quantize.model.arch import CONTAINER, Architecture, ExpertSizes, Role
from quantize.model.moe import MoeFfn

if TYPE_CHECKING:
    from quantize.block.block import Block

MODEL_TYPE = CONTAINER
FFN = "mlp"
"""Name of the FFN within a block, in the sources and in the container."""
BIASED: tuple[Role, ...] = ("q", "k", "v")
"""Roles whose linears have a bias in the container: zero where the source has none,
since vLLM always reads one."""
_SOURCES = ("llama", "mistral", "qwen2")
_DROPPED = (
    "attention_bias",
    "mlp_bias",
    "pretraining_tp",
    "max_window_layers",
    "quantization_config",
    "auto_map",
)


def require_source(parent: Mapping[str, Any]) -> None:
    """ModelError for a config.json of a type that has no container."""
    kind = parent.get("model_type")
    if kind not in _SOURCES:
        raise ModelError(
            f"ladimo: a {kind} model fits no stock Mixture of Experts (those that do: "
            f"{', '.join(_SOURCES)})"
        )


def container_config(
    parent: Mapping[str, Any], layout: Layout, top_k: int, dense_blocks: Collection[int]
) -> dict[str, Any]:
    """config.json of `parent` as a Mixture of Experts; ModelError for what
    the container has no place for.

    top_k: experts a token visits where nothing else is said. dense_blocks:
    those whose FFN stays as it is.
    """
    require_source(parent)
    for field in ("attention_bias", "mlp_bias"):
        if parent.get(field):
            raise ModelError(
                f"ladimo: config.json has {field}: true, which {MODEL_TYPE} has no place for"
            )
    config = {key: value for key, value in parent.items() if key not in _DROPPED}
    return config | _window(parent) | {
        "model_type": MODEL_TYPE,
        "architectures": ["Qwen2MoeForCausalLM"],
        "qkv_bias": True,
        "num_experts": layout.n,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": False,
        "moe_intermediate_size": layout.size,
        "shared_expert_intermediate_size": layout.shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(dense_blocks),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }  # fmt: skip


def container(dense: Architecture, moe: MoeFfn) -> Architecture:
    """A dense block with these experts in the place of its FFN."""
    return dense.with_experts(len(moe.experts))


def empty_moe(layout: Layout, mean: float, block: Block) -> MoeFfn:
    """Experts without values in the place of a block's dense FFN, in its dtype."""
    sizes = ExpertSizes(
        layout.n, layout.size, layout.shared, max(1, round(mean)), False, frozenset()
    )
    dense = block.module.get_submodule(FFN)
    with torch.device("meta"):
        moe = MoeFfn(block.shape.hidden, sizes, dense.get_submodule("act_fn"))
    dtype = block.linear(block.arch.of_role("down")).weight.dtype
    return moe.to(dtype).to_empty(device=block.device).eval().requires_grad_(False)


def _window(parent: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the sliding window: the container's own rule which blocks have one is
    another than its sources'."""
    blocks, window = parent["num_hidden_layers"], parent.get("sliding_window")
    kinds = parent.get("layer_types")
    if kinds is None:
        slides = bool(window) and (
            parent["model_type"] == "mistral" or bool(parent.get("use_sliding_window"))
        )
        first = parent.get("max_window_layers", 28) if parent["model_type"] == "qwen2" else 0
        kinds = [
            "sliding_attention" if slides and index >= first else "full_attention"
            for index in range(blocks)
        ]
    slides = "sliding_attention" in kinds
    return {
        "layer_types": kinds,
        "use_sliding_window": slides,
        "sliding_window": window if slides else None,
    }
