"""config.json of a `compressed-tensors` checkpoint (pack-quantized), as stock transformers and vLLM read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from quantize.formats.scheme import AnyScheme, config_groups


def quantization_config(schemes: Mapping[str, AnyScheme], left_alone: Sequence[str]) -> dict[str, Any]:
    """quantization_config for linears by full module name → scheme; `left_alone` are linears that stay 16-bit."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups(schemes),
        "ignore": list(left_alone),
        "kv_cache_scheme": None,
    }


def lost(attention: bool, experts: Collection[AnyScheme | None]) -> list[str]:
    """What this format cannot hold, or its loaders do not make of it, in lines for people.

    attention: whether a recipe has attention on an INT4 cache. experts: schemes of all routed experts, None for those
    that stay 16-bit; empty where there are none.
    """
    lines = []
    if attention:
        lines += [
            "post-RoPE scales were not used, and value and key scales were fitted without them",
            "the INT4 KV cache is a run-time choice there (vLLM, on a GPU: --kv-cache-dtype int4_per_token_head, "
            "which rotates and rounds in another way than pq eval --kv-cache int4 does)",
        ]
    if len(experts) > 1 or None in experts:
        lines.append(
            "transformers reads experts only where all are packed alike, which they are not here "
            "(format: pq loads them in transformers)"
        )
    elif any(scheme and scheme.fp8_activations for scheme in experts):
        lines.append("transformers runs routed experts with 16-bit activations, not FP8 ones")
    return lines
