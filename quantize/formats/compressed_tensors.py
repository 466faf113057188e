"""The `compressed-tensors` format (pack-quantized), as stock transformers and vLLM read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.formats.groups import config_groups, read_groups
from quantize.formats.output import Finished, OutputFormat, Section
from quantize.formats.vllm import Unserved, unserved

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.formats.scheme import AnyScheme, Packed


class CompressedTensors(OutputFormat):
    """Integers in groups, and nothing that a stock loader would not make of them."""

    name = "compressed-tensors"
    about = "loads in stock transformers and vLLM"
    shared = True
    served = True

    def losses(
        self,
        attention: bool,
        experts: Collection[AnyScheme | None],
        unloadable: Sequence[str] = (),
    ) -> list[str]:
        """The INT4 cache, experts of several kinds, FP8 inputs of experts, and what stock
        transformers does not load."""
        lines = []
        if attention:
            lines += [
                "post-RoPE scales were not used, and value and key scales were fitted without them",
                "the INT4 KV cache is a run-time choice there (vLLM, on a GPU: --kv-cache-dtype "
                "int4_per_token_head, which rotates and rounds in its own way: "
                "pq eval --kv-cache vllm-int4 measures it)",
            ]
        lines += [f"stock transformers does not load this: {why}" for why in unloadable]
        if unloadable:
            return lines
        if len(experts) > 1 or None in experts:
            lines.append(
                "transformers reads experts only where all are packed alike, which they are not "
                "here (format: pq loads them in transformers)"
            )
        elif any(scheme and scheme.fp8_activations for scheme in experts):
            lines.append("transformers runs routed experts with 16-bit activations, not FP8 ones")
        return lines

    def unserved(
        self,
        schemes: Mapping[str, AnyScheme],
        shapes: Mapping[str, tuple[int, int]],
        fused: Collection[tuple[str, ...]],
        routed: Collection[tuple[str, ...]] = (),
    ) -> list[Unserved]:
        """As `quantize.formats.vllm.unserved`."""
        return unserved(schemes, shapes, fused, routed)

    def tensors(
        self,
        packed: Mapping[str, Packed],
        plain: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """All but the post-RoPE scales, which are one here and have no place in the model."""
        from quantize.formats.kv4 import KV_TENSORS

        ours = tuple(f".{name}" for name in KV_TENSORS)
        held = {name: tensor for name, tensor in plain.items() if not name.endswith(ours)}
        return super().tensors(packed, held)

    def config_section(self, model: Finished) -> dict[str, Any] | None:
        """None for a model without packed linears."""
        if not model.schemes:
            return None
        return quantization_config(model.schemes, model.left_alone, model.called)

    def reads_others(self, section: Section) -> bool:
        """Whether it is pack-quantized, without patterns and column orders, which others write."""
        self.schemes(section, [])
        if section.get("format") != "pack-quantized" or '"re:' in json.dumps(section):
            return False
        groups = section["config_groups"].values()
        return not any(group["weights"].get("actorder") for group in groups)

    def schemes(self, section: Section, linears: Sequence[str]) -> dict[str, AnyScheme]:
        """Scheme of every packed linear by full name."""
        from quantize.formats.packed_int import IntScheme

        return dict(read_groups(section, linears, IntScheme.from_json))


def quantization_config(
    schemes: Mapping[str, AnyScheme],
    left_alone: Sequence[str],
    called: Callable[[str], Sequence[str]] = lambda name: (name,),
) -> dict[str, Any]:
    """quantization_config for linears by full module name → scheme; `left_alone` are
    linears that stay 16-bit. called: all names by which loaders look for a linear."""
    return {
        "quant_method": CompressedTensors.name,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups(schemes, called),
        "ignore": list(dict.fromkeys(alias for name in left_alone for alias in called(name))),
        "kv_cache_scheme": None,
    }
