"""Checkpoints in format compressed-tensors with INT4 weights and FP8 activations, where vLLM refuses them.

It multiplies them on compute capability 9.0 exactly, in groups of 128. Elsewhere, Ada and newer GPUs and CPUs, pq's
own kernels and twins do. All other checkpoints of the format, and these on H100 and H200, are left to vLLM.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from quantize.formats.groups import read_groups
from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import AnyScheme
from quantize.vllm.linear import PqLinearMethod
from quantize.vllm.names import parts_of, renamed_groups

NAME = "compressed-tensors"
_HOPPER = (9, 0)


class PqCompressedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]  # no types here
    """vLLM's own, and linears with INT4 weights and FP8 activations where it has no kernel."""

    pq_section: dict[str, Any] | None = None
    """quantization_config where pq can read all of it; None: left to vLLM."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """What config.json says."""
        made = super().from_config(config)
        made.pq_section = dict(config) if _needs_us(config) else None
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call linears as vLLM's model does."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.pq_section is not None:
            self.pq_section = renamed_groups(self.pq_section, hf_to_vllm_mapper)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """How `layer` works."""
        if self.pq_section is not None and isinstance(layer, LinearBase | ParallelLMHead):
            parts = parts_of(prefix, self.packed_modules_mapping)
            schemes = read_groups(self.pq_section, parts, IntScheme.from_json)
            if any(scheme.fp8_activations for scheme in schemes.values()):
                held: dict[str, AnyScheme | None] = {part: schemes.get(part) for part in parts}
                return PqLinearMethod(held, False)
        return super().get_quant_method(layer, prefix)


def _needs_us(config: dict[str, Any]) -> bool:
    """Whether pq reads all linears of the section, and vLLM would refuse some here."""
    capability = current_platform.get_device_capability()
    if capability is not None and tuple(capability) == _HOPPER:
        return False
    try:
        schemes = [IntScheme.from_json(group) for group in config["config_groups"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # not one that pq wrote
    return any(scheme.fp8_activations and scheme.bits == 4 for scheme in schemes)
