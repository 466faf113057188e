"""config.json of a `compressed-tensors` checkpoint (pack-quantized), as stock transformers and vLLM read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Scheme:
    """How one set of linears is stored and run."""

    bits: int
    group_size: int
    fp8_activations: bool

    def as_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """One entry of config_groups."""
        activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": list(targets),
            # Without it compressed-tensors >= 0.18 infers an 8-bit layout for INT4 weights with FP8 activations.
            "format": "pack-quantized",
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": self.group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": activations if self.fp8_activations else None,
            "output_activations": None,
        }


def quantization_config(schemes: Mapping[str, Scheme], left_alone: Sequence[str]) -> dict[str, Any]:
    """quantization_config for linears by full module name → scheme; `left_alone` are linears that stay 16-bit."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    single = len(by_scheme) == 1
    groups = {
        f"group_{i}": scheme.as_json(["Linear"] if single else sorted(names))
        for i, (scheme, names) in enumerate(sorted(by_scheme.items()))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(left_alone),
        "kv_cache_scheme": None,
    }


def schemes_of(config: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """Undo `quantization_config`: full linear names → scheme, for the subset of the format that pq writes.

    Raises ValueError for a scheme that pq does not write.
    """
    ignored = set(config.get("ignore", ()))
    out: dict[str, Scheme] = {}
    for group in config["config_groups"].values():
        weights, activations = group["weights"], group.get("input_activations")
        if weights["type"] != "int" or not weights["symmetric"] or weights["strategy"] != "group":
            raise ValueError(f"weights are {weights['type']}/{weights['strategy']}, only symmetric int groups are read")
        if activations and (activations["type"] != "float" or activations["strategy"] != "token"):
            raise ValueError("activations are not dynamic per-token FP8")
        scheme = Scheme(weights["num_bits"], weights["group_size"], bool(activations))
        targets = group["targets"]
        out |= {name: scheme for name in linears if name not in ignored and ("Linear" in targets or name in targets)}
    return out
