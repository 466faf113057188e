"""What holds a converted model: the stock architecture `qwen2_moe` for those that fit it, pq's own
format for all others, in which the model's class stays and its FFNs are experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from quantize.methods.ladimo.split import Layout
from quantize.model.arch import CONTAINER, Architecture, ExpertSizes, Role
from quantize.model.dense_ffn import dense_ffn_of, empty_experts
from quantize.model.moe import MoeFfn
from quantize.model.roles import role_by_name

if TYPE_CHECKING:
    from quantize.block.block import Block

MODEL_TYPE = CONTAINER
BIASED: tuple[Role, ...] = ("q", "k", "v")
"""Roles whose linears have a bias in the container: zero where the source has none,
since vLLM always reads one."""
_NAMES = re.compile(r"\.(?:experts|gate|shared_expert|shared_expert_gate)\.")
_ROLES: tuple[Role, ...] = ("gate", "up", "down", "gate_up")
_SOURCES = ("llama", "mistral", "qwen2")
_DROPPED = (
    "attention_bias",
    "mlp_bias",
    "pretraining_tp",
    "max_window_layers",
    "quantization_config",
    "auto_map",
)


def stock_misfit(parent: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json fits no stock container; None where it does."""
    kind = parent.get("model_type")
    if kind not in _SOURCES:
        return f"a {kind} model fits no stock Mixture of Experts ({', '.join(_SOURCES)} do)"
    if parent.get("attention_bias"):
        return f"config.json has attention_bias: true, which {MODEL_TYPE} has no place for"
    return None


def fits_stock(block: Block) -> bool:
    """The same of a block: whether its container is the stock one."""
    output = block.arch.find_role("o")
    return (
        block.arch.model_type in _SOURCES
        and output is not None
        and block.module.get_submodule(output).bias is None
    )


def container_config(
    parent: Mapping[str, Any], layout: Layout, top_k: int, dense_blocks: Collection[int]
) -> dict[str, Any]:
    """config.json of `parent`, which fits it, as the stock Mixture of Experts.

    top_k: experts a token visits where nothing else is said. dense_blocks:
    those whose FFN stays as it is.
    """
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


def container(dense: Architecture, moe: MoeFfn, stock: bool) -> Architecture:
    """A dense block with these experts in the place of its FFN."""
    return dense.with_experts(len(moe.experts), MODEL_TYPE if stock else "")


def is_of_experts(name: str) -> bool:
    """Whether a tensor of a converted block belongs to its experts or routers."""
    return bool(_NAMES.search(name))


def expert_linears(
    name: str, size: tuple[int, int], divide: Callable[[int], Layout | None]
) -> dict[str, tuple[int, int]] | None:
    """A linear [N, K] of a dense FFN → those that do the same in all experts; None for a linear of
    another kind. divide: hidden neurons of the FFN → sizes of the experts, settled."""
    place, _, _ = name.rpartition(".")
    role, (N, K) = role_by_name(name), size
    if role not in _ROLES:
        return None
    layout = divide(K if role == "down" else N // 2 if role == "gate_up" else N)
    assert layout is not None, "planned first"
    homes = {"shared_expert": layout.shared}
    homes |= {f"experts.{e}": layout.size for e in range(layout.n)}
    roles = ("gate", "up") if role == "gate_up" else (role,)
    return {
        f"{place}.{home}.{role}_proj": (N, neurons) if role == "down" else (neurons, K)
        for home, neurons in homes.items()
        for role in roles
    }


def empty_moe(layout: Layout, mean: float, block: Block) -> MoeFfn:
    """Experts without values in the place of a block's dense FFN, in its dtype."""
    sizes = ExpertSizes(
        layout.n, layout.size, layout.shared, max(1, round(mean)), False, frozenset()
    )
    place = dense_ffn_of(block.arch)
    dense: nn.Module = block.module.get_submodule(place)
    return empty_experts(block.full_name(place), dense, sizes).to_empty(device=block.device)


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
