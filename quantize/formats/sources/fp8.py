"""`quant_method: fp8`, as DeepSeek, Qwen and Mistral publish models.

Beside every FP8 `weight` [N, K] stands `weight_scale_inv`, which despite its name is what codes
are multiplied with: one for each block of `weight_block_size`, or where that is null one for all.
vLLM's older files call it `weight_scale`. Experts in one tensor (`gate_up_proj` [E, N, K]) have
`gate_up_proj_scale_inv`. Layout: transformers' FineGrainedFP8Config.
"""

from __future__ import annotations

from quantize.formats.sources.scaled import FP8, WHOLE, Block, scaled, shown
from quantize.formats.sources.source import Kinds, Section, SourceFormat, Stored, left_over

_SCALES = ("_scale_inv", "_scale")
_DROPPED = ("activation_scale", "input_scale", ".k_scale", ".v_scale")


class Fp8(SourceFormat):
    """FP8 codes with a scale for each block, or for each tensor."""

    name = "fp8"

    def recognizes(self, section: Section) -> bool:
        """By quant_method."""
        return section.get("quant_method") == "fp8"

    def stored(self, section: Section, kinds: Kinds) -> Stored:
        """What is FP8, whatever the list of modules that are not says."""
        if (fmt := section.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(f"fmt is {fmt!r}, expected 'e4m3'")
        block = _block(section.get("weight_block_size"))
        dropped = {name for name in kinds if name.endswith(_DROPPED)}
        tensors = {}
        scales = set()
        for name, (dtype, _) in kinds.items():
            if dtype == FP8 and name not in dropped:
                found = (f"{name}{ending}" for ending in _SCALES)
                scale = next((one for one in found if one in kinds), None)
                tensors[name] = scaled(kinds, name, scale, [block])
                scales.add(scale)
        for name in kinds:
            if name.endswith(("_scale_inv", ".weight_scale")) and name not in scales | dropped:
                raise ValueError(f"{name} is the scale of no FP8 tensor")
        stored = Stored(tensors, dropped, shown(block))
        left_over(kinds, stored, self.name)
        return stored


def _block(value: object) -> Block:
    """weight_block_size; ValueError for what is none."""
    if value is None:
        return WHOLE
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value):
        rows, columns = value
        if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(f"weight_block_size is {value!r}, expected null or two numbers above 0")
