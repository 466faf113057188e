"""config.json of a `compressed-tensors` checkpoint (pack-quantized), as stock transformers and vLLM read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
