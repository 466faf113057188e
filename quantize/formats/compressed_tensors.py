"""config.json of a `compressed-tensors` checkpoint (pack-quantized), as stock transformers and vLLM read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import AnyScheme, config_groups, read_groups


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


def schemes_of(config: Mapping[str, Any], linears: Sequence[str]) -> dict[str, IntScheme]:
    """Undo `quantization_config`: full linear names → scheme, for the subset of the format that pq writes.

    Raises ValueError for a scheme that pq does not write.
    """
    return read_groups(config, linears, IntScheme.from_json)
