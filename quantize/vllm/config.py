"""quantization_config of a checkpoint in pq's own format, as vLLM asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import regex
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from quantize.formats.engines import EXPERTS_IN_VLLM
from quantize.formats.groups import read_groups
from quantize.formats.kv4 import KV_TENSORS
from quantize.formats.native import (
    NATIVE,
    attention_of,
    experts_of,
    require_understood,
    rotated_inputs_of,
    routing_of,
    scheme_from_json,
)
from quantize.vllm.attention import PqKvMethod
from quantize.vllm.dense_experts import PREFIX, NoLinearMethod
from quantize.vllm.experts import PqExpertsMethod
from quantize.vllm.linear import PqLinearMethod, RotatedLinearMethod
from quantize.vllm.names import parts_of, renamed, renamed_groups

NAME = NATIVE


class PqConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Says what each layer of a model is packed as; ValueError for a section that this release does not
    understand, or that it cannot serve."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        super().__init__()
        require_understood(section)
        self.experts = experts_of(section)
        self.routing = routing_of(section)
        self.section = dict(section)
        self.rotated = frozenset(rotated_inputs_of(section))
        self.attention = attention_of(section)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PqConfig:
        """What config.json says."""
        return cls(config)

    def get_name(self) -> str:
        """`quant_method`."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What activations may be."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability times ten: what Triton's tensor-core kernels need."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything stands in config.json."""
        return []

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """What the cache needs is loaded into vLLM's attention layer, below that of the checkpoint."""
        places = {
            regex.compile(rf"\.{regex.escape(name)}$"): f".attn.pq_{name.removeprefix('kv.')}"
            for name in KV_TENSORS
        }
        return WeightsMapper(orig_to_new_regex=places)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Ask for the class that puts experts in the places of dense FFNs, where the checkpoint has them;
        ValueError for a model of which there is none."""
        names = [*(getattr(hf_config, "architectures", None) or [])]
        if self.experts is None or names[0].removeprefix(PREFIX) != names[0]:
            return
        if names[0] not in EXPERTS_IN_VLLM:
            raise ValueError(
                f"{model_name}: pq-vllm serves LaDiMo's experts in {', '.join(EXPERTS_IN_VLLM)} and qwen2_moe, this "
                f"is {names[0]}; load it with transformers"
            )
        hf_config.architectures = [f"{PREFIX}{names[0]}"]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Call linears as vLLM's model does."""
        self.section = renamed_groups(self.section, hf_to_vllm_mapper)
        self.rotated = frozenset(renamed(name, hf_to_vllm_mapper) for name in self.rotated)
        self.routing = {renamed(ffn, hf_to_vllm_mapper): p for ffn, p in self.routing.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How `layer` works; None where it works as if the model were not quantized."""
        if isinstance(layer, Attention):
            return PqKvMethod(self.attention) if self.attention else None
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        if self.experts is not None and prefix.rpartition(".")[0] in self.routing:
            return NoLinearMethod()
        parts = parts_of(prefix, self.packed_modules_mapping)
        schemes = read_groups(self.section, parts, scheme_from_json)
        rotates = {part in self.rotated for part in parts}
        if len(rotates) > 1:
            raise ValueError(f"{prefix}: only some of {', '.join(parts)} rotate their inputs")
        if schemes:
            return PqLinearMethod({part: schemes.get(part) for part in parts}, rotates.pop())
        if isinstance(layer, ParallelLMHead):
            return None
        return RotatedLinearMethod() if rotates.pop() else UnquantizedLinearMethod()

    def _experts(self, layer: Any, prefix: str) -> Any:
        # One method for all: vLLM's own for 16-bit experts cannot choose as many as a token needs.
        ffn = prefix.removesuffix(".routed_experts").removesuffix(".experts")
        name = f"{ffn}.experts"
        linears = [
            f"{name}.{e}.{role}_proj"
            for e in range(layer.global_num_experts)
            for role in ("gate", "up", "down")
        ]
        schemes = read_groups(self.section, linears, scheme_from_json)
        policy = self.routing.get(ffn)
        if not schemes and policy is None and not self.rotated & set(linears):
            return None
        return PqExpertsMethod(name, layer.moe_config, schemes, self.rotated & set(linears), policy)
