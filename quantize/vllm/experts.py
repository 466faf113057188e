"""Routed experts of vLLM's Mixtures of Experts, their linears packed or not, each token sent to as many as its
policy says.

The router's scores come in unchosen ("monolithic"), since vLLM's own choice is of a fixed number. Stacked 16-bit
experts are computed at once; packed ones one after the other, each for the tokens that visit it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from quantize.formats.routing import Policy, TopK
from quantize.formats.scheme import AnyScheme
from quantize.kernels.experts.api import routed_experts
from quantize.vllm import ops
from quantize.vllm.cuts import Cut, inputs_cut, rows_cut
from quantize.vllm.parts import Part, PlainPart, joined, part_of

_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""vLLM's names of the linears of an expert → those of checkpoints."""


class PqExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Experts whose linears, by full name, have the schemes of `schemes`, or stayed 16-bit.

    rotated: full names of those that rotate their inputs. policy: which experts a token visits; None: as the
    model's own fields say.
    """

    def __init__(
        self,
        name: str,
        moe: Any,
        schemes: Mapping[str, AnyScheme],
        rotated: frozenset[str],
        policy: Policy | None,
    ) -> None:
        super().__init__(moe)
        self.name, self.schemes, self.rotated, self.policy = name, schemes, rotated, policy

    @property
    def is_monolithic(self) -> bool:
        """Scores are chosen among here."""
        return True

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's is used."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Empty parts for every expert, and a parameter for each suffix by which vLLM's loader finds them;
        ValueError for what is not served."""
        self._require_served(layer, num_experts)
        if self.policy is None:
            self.policy = TopK(layer.top_k, layer.renormalize)
        self.parts: dict[tuple[int, str], Part] = {}
        for e in range(num_experts):
            for shard, role in _ROLES.items():
                name = f"{self.name}.{e}.{role}"
                cut = self._cut(name, shard, intermediate_size_per_partition, hidden_size)
                self.parts[e, shard] = part_of(name, cut, self.schemes.get(name), params_dtype)
        layer.pq_parts = nn.ModuleList(self.parts.values())
        layer.pq_dtype = params_dtype
        kinds = {
            ("w2" if s == "w2" else "w13", x) for (_, s), p in self.parts.items() for x in p.missing
        }
        layer.pq_places = sorted(f"{kind}_{suffix}" for kind, suffix in kinds)
        for kind, suffix in sorted(kinds):
            place = nn.Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(place, {"weight_loader": self._loader(suffix)})
            layer.register_parameter(f"{kind}_{suffix}", place)

    def _cut(self, name: str, shard: str, E: int, D: int) -> Cut:
        """What this GPU, which holds E hidden neurons of every expert, has of one of its linears."""
        where = self.moe.moe_parallel_config
        rank, ranks = where.tp_rank, where.tp_size
        if ranks == 1:
            return Cut((D, E) if shard == "w2" else (E, D))
        if shard == "w2":
            return inputs_cut(D, E * ranks, self.schemes.get(name), rank, ranks, name)
        return rows_cut(E, D, rank, ranks)

    def _loader(self, suffix: str) -> Any:
        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            self.parts[expert_id, shard_id].load(suffix, loaded_weight)
            return True

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack 16-bit experts, join gate and up of packed ones; ValueError for what was not loaded."""
        for place in layer.pq_places:
            delattr(layer, place)
        layer.pq_places = []
        for part in self.parts.values():
            part.check()
        N = len(self.parts) // len(_ROLES)
        if all(isinstance(part, PlainPart) for part in self.parts.values()) and not self.rotated:
            self.stacked = [
                torch.stack([self._weight(e, *shards) for e in range(N)])
                for shards in (("w1", "w3"), ("w2",))
            ]
            layer.pq_parts, self.parts = nn.ModuleList(), {}
            return
        self.stacked = []
        self.gate_up = [joined([self.parts[e, "w1"], self.parts[e, "w3"]]) for e in range(N)]
        self.down = [self.parts[e, "w2"] for e in range(N)]
        every = [*(part for parts in self.gate_up for part in parts), *self.down]
        for part in every:
            part.prepare(layer.pq_dtype)
        layer.pq_parts = nn.ModuleList(every)

    def _weight(self, e: int, *shards: str) -> Tensor:
        return torch.cat([self.parts[e, shard].get_parameter("weight").data for shard in shards])

    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        """Tokens x [M, D] and their scores [M, N] → what their experts come to, [M, D]."""
        if layer.routing_sink is not None:
            raise NotImplementedError(f"{self.name}: pq's experts do not report where tokens go")
        weights = self.weights(router_logits).to(x.dtype)
        if self.stacked:
            most = self.policy.k if isinstance(self.policy, TopK) else None
            gate_up, down = self.stacked
            return routed_experts(x, weights, gate_up, down, most=most)
        y = torch.zeros_like(x)
        for e, (sides, last) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = weights[:, e]
            if x.is_cuda:  # which tokens visit it would make the host wait
                y += self._expert(e, sides, last, x) * share[:, None]
                continue
            rows = share.nonzero()[:, 0]
            if len(rows):
                y.index_add_(0, rows, self._expert(e, sides, last, x[rows]) * share[rows, None])
        return y

    def weights(self, scores: Tensor) -> Tensor:
        """Routing weights [M, N] of scores [M, N], float32; 0 where a token does not visit an expert."""
        assert self.policy is not None
        weights = torch.softmax(scores, dim=1, dtype=torch.float32) * self.policy.select(scores)
        if self.policy.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return weights

    def _expert(self, e: int, gate_up: list[Part], down: Part, x: Tensor) -> Tensor:
        inputs = {
            role: self._inputs(f"{self.name}.{e}.{role}", x) for role in ("gate_proj", "up_proj")
        }
        names = ["gate_proj"] if len(gate_up) == 1 else ["gate_proj", "up_proj"]
        sides = [part.multiply(inputs[n], None) for part, n in zip(gate_up, names, strict=True)]
        h = SiluAndMul.forward_native(torch.cat(sides, dim=-1))
        return down.multiply(self._inputs(f"{self.name}.{e}.down_proj", h), None)

    def _inputs(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = ops.rotate_inputs(x) if name in self.rotated else x
        return y

    def _require_served(self, layer: Any, num_experts: int) -> None:
        activation = str(layer.activation.value)
        last = {f"{self.name}.{e}.down_proj" for e in range(num_experts)}
        odd = {
            f"{num_experts} of {layer.global_num_experts} experts here: serve without expert "
            "parallelism": num_experts != layer.global_num_experts,
            "the inputs of down_proj are rotated, which needs all of them: serve with "
            "--tensor-parallel-size 1": (
                bool(last & self.rotated) and self.moe.moe_parallel_config.tp_size > 1
            ),
            f"activation {activation}: only SwiGLU is served": activation not in ("silu", "swiglu"),
            f"scores by {layer.scoring_func}: only softmax is served": layer.scoring_func
            != "softmax",
            "routing among groups of experts is not served": bool(layer.use_grouped_topk),
        }
        if found := [what for what, is_so in odd.items() if is_so]:
            raise ValueError(f"{self.name}: {'; '.join(found)}")
        rotated = {
            f"{self.name}.{e}.{role}"
            for e in range(num_experts)
            for role in ("gate_proj", "up_proj")
        }
        if (both := rotated & self.rotated) and both != rotated:
            raise ValueError(
                f"{self.name}: only some experts' gate_proj and up_proj rotate their inputs"
            )
