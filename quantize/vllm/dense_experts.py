"""LaDiMo's experts in classes of vLLM whose FFNs are dense: each FFN that config.json says to be a Mixture of
Experts gives its place to one, made of vLLM's own linears, so that they are packed, loaded and divided among
GPUs as all others.

A model with such experts is made by a subclass `Pq…` of the class that its config.json names, which vLLM finds
in its registry of models; `PqConfig` asks for it. All other checkpoints keep vLLM's classes. Which ones there are says
`quantize.formats.engines`: their FFNs are `mlp.gate_up_proj`, `mlp.act_fn` and `mlp.down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import direct_register_custom_op

from quantize.formats.engines import EXPERTS_IN_VLLM
from quantize.formats.routing import Policy

PREFIX = "Pq"
"""Of the names of such classes."""


def register_classes() -> None:
    """Make vLLM find them."""
    for name in EXPERTS_IN_VLLM:
        ModelRegistry.register_model(f"{PREFIX}{name}", f"{__name__}:{PREFIX}{name}")


def __getattr__(name: str) -> Any:
    """The class `Pq…`, made when vLLM asks for it."""
    stock = name.removeprefix(PREFIX)
    if name == stock or stock not in EXPERTS_IN_VLLM:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    base = ModelRegistry.models[stock].load_model_cls()

    def make(self: Any, *, vllm_config: Any, prefix: str = "", **extra: Any) -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **extra)
        place_experts(self, vllm_config, prefix)

    return type(name, (base,), {"__init__": make, "__module__": __name__})


class NoLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Of a linear that something else takes the place of: it holds nothing."""

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """None are made."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """AssertionError: nobody calls it."""
        raise AssertionError(f"{layer.prefix} has experts in its place")


def place_experts(model: nn.Module, vllm_config: Any, prefix: str) -> None:
    """Put experts in the places of the dense FFNs that `routing` names."""
    config = vllm_config.quant_config
    start = f"{prefix}." if prefix else ""
    modules = dict(model.named_modules())
    for name, policy in config.routing.items():
        ffn = name.removeprefix(start)
        parent = modules.get(ffn.rpartition(".")[0])
        if parent is None or not [*parent.children()]:
            continue  # another stage of the pipeline has this block
        dense = modules.get(ffn)
        if dense is None or not hasattr(dense, "act_fn") or not hasattr(dense, "down_proj"):
            raise ValueError(
                f"routing names {name}, which is no dense FFN of {type(model).__name__}"
            )
        made = ExpertsFfn(dense, config.experts, policy, config, name)
        model.set_submodule(ffn, made)
        vllm_config.compilation_config.static_forward_context[name] = made


class _Expert(nn.Module):
    """y = (act(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ; of several GPUs, what its hidden neurons add to it."""

    def __init__(self, D: int, E: int, act: nn.Module, config: Any, prefix: str) -> None:
        super().__init__()
        own = {"bias": False, "quant_config": config}
        self.gate_up_proj = MergedColumnParallelLinear(
            D, [E, E], **own, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            E, D, **own, prefix=f"{prefix}.down_proj", reduce_results=False
        )
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """x [M, D] → [M, D]."""
        h = self.act_fn(self.gate_up_proj(x)[0])
        y: Tensor = self.down_proj(h)[0]
        return y


class ExpertsFfn(nn.Module):
    """Routed experts beside a shared one, named as in the checkpoint.

    sizes: n routed experts of `size` hidden neurons and one of `shared`. prefix: the FFN's full name.
    """

    def __init__(
        self, dense: Any, sizes: Mapping[str, int], policy: Policy, config: Any, prefix: str
    ) -> None:
        super().__init__()
        D, n, act = dense.down_proj.output_size, sizes["n"], dense.act_fn
        self.name, self.policy = prefix, policy
        self.parallel = dense.down_proj.tp_size > 1
        self.gate = ReplicatedLinear(D, n, bias=False, prefix=f"{prefix}.gate")
        self.shared_expert_gate = ReplicatedLinear(
            D, 1, bias=False, prefix=f"{prefix}.shared_expert_gate"
        )
        self.experts = nn.ModuleList(
            [_Expert(D, sizes["size"], act, config, f"{prefix}.experts.{e}") for e in range(n)]
        )
        self.shared_expert = _Expert(D, sizes["shared"], act, config, f"{prefix}.shared_expert")

    def forward(self, x: Tensor) -> Tensor:
        """x [M, D] → [M, D]."""
        y: Tensor = torch.ops.vllm.pq_experts_ffn(x, self.name)
        return tensor_model_parallel_all_reduce(y) if self.parallel else y

    def compute(self, x: Tensor) -> Tensor:
        """What this GPU adds to the outputs."""
        scores = self.gate(x)[0]
        weights = torch.softmax(scores, dim=1, dtype=torch.float32) * self.policy.select(scores)
        if self.policy.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        weights = weights.to(x.dtype)
        y: Tensor = torch.sigmoid(self.shared_expert_gate(x)[0]) * self.shared_expert(x)
        for e, expert in enumerate(self.experts):
            share = weights[:, e]
            if x.is_cuda:  # which tokens visit it would make the host wait
                y += expert(x) * share[:, None]
                continue
            rows = share.nonzero()[:, 0]
            if len(rows):
                y.index_add_(0, rows, expert(x[rows]) * share[rows, None])
        return y


def _experts_ffn(x: torch.Tensor, name: str) -> torch.Tensor:
    found: Tensor = get_forward_context().no_compile_layers[name].compute(x)
    return found.contiguous()  # as compiled code reads it


def _like(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op("pq_experts_ffn", _experts_ffn, fake_impl=_like)
