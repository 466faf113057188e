"""`quant_method: compressed-tensors` with FP8 weights (float-quantized, naive-quantized).

Beside every FP8 `weight` [N, K] stands `weight_scale`: one for all (strategy tensor), [N, 1]
(channel), [N, K / group_size] (group) or one for each block of `block_structure` (block). Layout:
compressed-tensors' NaiveQuantizationCompressor. Scales of activations are of no use here: weights
are read as a 16-bit model has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantize.formats.sources.scaled import FP8, ROW, WHOLE, Block, scaled, shown
from quantize.formats.sources.source import Kinds, Section, SourceFormat, Stored, left_over

_FORMATS = ("float-quantized", "naive-quantized")
_DROPPED = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)


class FloatQuantized(SourceFormat):
    """FP8 codes with scales as the groups of config.json say."""

    name = "compressed-tensors float-quantized"

    def recognizes(self, section: Section) -> bool:
        """By quant_method and format, where every group rounds weights to FP8."""
        groups = section.get("config_groups")
        if section.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
            return False
        formats = {section.get("format")} | {_of(group).get("format") for group in groups.values()}
        kinds = [(w.get("type"), w.get("num_bits")) for w in map(_weights, groups.values())]
        return (
            any(known in formats for known in _FORMATS)
            and all(form is None or form in _FORMATS for form in formats)
            and all(kind == ("float", 8) for kind in kinds)
        )

    def stored(self, section: Section, kinds: Kinds) -> Stored:
        """What is FP8; which group it is of is told by the shape of its scale."""
        if _of(section.get("transform_config")).get("config_groups"):
            raise ValueError("transform_config changes activations at run time; give its parent")
        groups = section["config_groups"].values()
        blocks = list(dict.fromkeys(_block(_weights(group)) for group in groups))
        dropped = {name for name in kinds if name.endswith(_DROPPED)}
        tensors = {}
        scales = set()
        for name, (dtype, _) in kinds.items():
            if dtype == FP8 and name.endswith(".weight") and name not in dropped:
                scale = f"{name}_scale" if f"{name}_scale" in kinds else None
                found = scaled(kinds, name, scale, blocks)
                zero = f"{name}_zero_point"
                tensors[name] = replace(found, zero_point=zero) if zero in kinds else found
                scales.add(scale)
        for name in kinds:
            if name.endswith(".weight_scale") and name not in scales:
                raise ValueError(f"{name} is the scale of no FP8 tensor")
        used = {tensor.block for tensor in tensors.values()}
        form = " and ".join(shown(block) for block in blocks if block in used)
        stored = Stored(tensors, dropped, f"{form} (compressed-tensors)")
        left_over(kinds, stored, self.name)
        return stored


def _of(group: Any) -> Mapping[str, Any]:
    return group if isinstance(group, dict) else {}


def _weights(group: Any) -> Mapping[str, Any]:
    return _of(_of(group).get("weights"))


def _block(weights: Mapping[str, Any]) -> Block:
    """The block of a group's strategy; ValueError for a strategy that is not known."""
    if weights.get("symmetric", True) is not True:
        raise ValueError("FP8 weights with zero points (symmetric: false) are not known")
    strategy = weights.get("strategy")
    if strategy in ("tensor", "channel"):
        return WHOLE if strategy == "tensor" else ROW
    sizes: Any = weights.get("block_structure")
    if strategy == "group":
        sizes = [1, weights.get("group_size")]
    if strategy not in ("group", "block") or not (
        isinstance(sizes, list)
        and len(sizes) == 2
        and all(type(size) is int and size > 0 for size in sizes)
    ):
        raise ValueError(f"strategy {strategy!r} of FP8 weights with {sizes!r} is not known")
    return sizes[0], sizes[1]
