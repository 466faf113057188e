"""How other tools and pq store a linear's weight, recognised by tensor
names and dtypes in headers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantize.files.headers import Header
from quantize.formats.bitvec import BitVecScheme
from quantize.formats.gguf.blocks import BLOCK, KINDS
from quantize.formats.gguf.blocks import SUFFIXES as BLOCK_SUFFIXES
from quantize.formats.packed_int import stored_bits
from quantize.model.stacked_storage import stacked_of

DTYPES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
"""Safetensors names of plain floats → torch names."""
_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    *BLOCK_SUFFIXES,
    "weight_planes",
    "weight_index",
    "weight_lines",
    "weight_scales",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "weight_scale_inv",
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "activation_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
_NOT_CODES = ("weight_shape",)


@dataclass(frozen=True)
class Storage:
    """How one weight matrix is stored. None where config.json and headers do not tell."""

    parts: tuple[str, ...]
    """Full names of its tensors."""
    shape: tuple[int, int] | None
    """(N, K): outputs, inputs."""
    weights: int | None
    format: str
    bits: int | None
    group_size: int | None
    activations: str
    quantized: bool
    bytes: int
    code_bytes: int
    """Without the note of the shape."""
    expected_bits: float | None
    """What config.json's scheme takes for this shape."""


def storage_of(
    headers: Mapping[str, Header],
    quantization: Any,
    shapes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, Storage]:
    """Every weight matrix by full module name. quantization: config.json's
    quantization_config, whatever it is.

    shapes: [N, K] by module of those whose tensors alone do not tell it; those that are missing are
    taken to fill their words.
    """
    quantization = quantization if isinstance(quantization, dict) else {}
    modules: dict[str, dict[str, str]] = {}
    for name in headers:
        # bitsandbytes puts its tables below the weight: q_proj.weight.absmax
        module, _, part = name.partition(".weight.") if ".weight." in name else name.rpartition(".")
        if part in _PARTS or ".weight." in name:
            modules.setdefault(module, {})[part] = name
    out = {}
    for module, names in modules.items():
        parts = {part: headers[name] for part, name in names.items()}
        facts = _facts(module, parts, quantization, shapes.get(module))
        if facts is not None:
            expected = _expected_bits(module, facts, quantization)
            sizes = {part: header.bytes for part, header in parts.items()}
            code_bytes = sum(size for part, size in sizes.items() if part not in _NOT_CODES)
            out[module] = Storage(
                tuple(names.values()), *facts, sum(sizes.values()), code_bytes, expected
            )
    for name, found in stacked_of(headers).items():
        size = sum(headers[part].bytes for part in found.parts)
        label = _label(quantization, {}) or found.kind
        facts = (None, found.weights, label, found.bits, found.group_size, "none", True)
        out[name] = Storage(found.parts, *facts, size, size, found.expected_bits)
    return out


_Facts = tuple["tuple[int, int] | None", "int | None", str, "int | None", "int | None", str, bool]
"""shape, weights, format, bits, group_size, activations, quantized."""


def _facts(
    module: str,
    parts: Mapping[str, Header],
    quantization: Mapping[str, Any],
    shape: tuple[int, int] | None,
) -> _Facts | None:
    if found := next((part for part in BLOCK_SUFFIXES if part in parts), None):
        return _blocks(found, parts[found])
    if "weight_planes" in parts:
        return _bitvec(module, parts, quantization, shape)
    if "weight_packed" in parts:
        return _packed_int(module, parts, quantization, shape)
    if "qweight" in parts:
        return _gptq_or_awq(parts, quantization)
    weight = parts.get("weight")
    if weight is None or len(weight.shape) < 2:
        return (
            _bitsandbytes(parts, quantization)
            if any(p.startswith("absmax") for p in parts)
            else None
        )
    shape = (weight.shape[0], weight.shape[1]) if len(weight.shape) == 2 else None
    weights = math.prod(weight.shape)
    if weight.dtype in DTYPES:
        return (
            shape,
            weights,
            DTYPES[weight.dtype],
            8 * weight.bytes // max(1, weights),
            None,
            "none",
            False,
        )
    if any(part.startswith(("absmax", "quant_")) for part in parts):
        return _bitsandbytes(parts, quantization)
    _, _, activations = _scheme(module, quantization)
    label = _label(quantization, _group(module, quantization))
    return (
        shape,
        weights,
        label or weight.dtype.lower(),
        8 * weight.bytes // max(1, weights),
        None,
        activations,
        True,
    )


def _blocks(part: str, stored: Header) -> _Facts:
    """llama.cpp's blocks, rows of whose bytes tell the inputs."""
    kind = KINDS[part.removeprefix("weight_")]
    shape = None
    if len(stored.shape) == 2:
        shape = (stored.shape[0], stored.shape[1] // kind.bytes * BLOCK)
    weights = math.prod(shape) if shape else None
    return shape, weights, f"gguf {kind.name}", kind.bits, BLOCK, "none", True


def _packed_int(
    module: str,
    parts: Mapping[str, Header],
    quantization: Mapping[str, Any],
    noted: tuple[int, int] | None,
) -> _Facts:
    packed, scale = parts["weight_packed"], parts.get("weight_scale")
    bits, group_size, activations = _scheme(module, quantization)
    label = _label(quantization, _group(module, quantization)) or "packed"
    shape = None
    if len(packed.shape) == 2:
        N, words = packed.shape
        if packed.dtype == "U8":  # two 4-bit floats in a byte
            bits, shape = bits or 4, (N, 2 * words)
        elif bits and group_size and scale is not None and len(scale.shape) == 2:
            shape = (N, scale.shape[1] * group_size)  # exact also where rows end within a word
        elif noted is not None:
            shape = noted
        elif bits:
            shape = (N, words * 32 // bits)
        if shape and scale is not None and scale.shape == (N, 1):
            group_size = group_size or shape[1]  # one scale a row: strategy channel names no group
    return shape, math.prod(shape) if shape else None, label, bits, group_size, activations, True


def _bitvec(
    module: str,
    parts: Mapping[str, Header],
    quantization: Mapping[str, Any],
    shape: tuple[int, int] | None,
) -> _Facts:
    """Bit planes [N, ceil(K / 32)·bits]; without its shape a row is taken to fill its words."""
    bits, group_size, activations = _scheme(module, quantization)
    label = _label(quantization, _group(module, quantization)) or "bitvec"
    planes = parts["weight_planes"]
    if shape is None and bits and len(planes.shape) == 2:
        shape = (planes.shape[0], planes.shape[1] // bits * 32)
    return shape, math.prod(shape) if shape else None, label, bits, group_size, activations, True


def _expected_bits(module: str, facts: _Facts, quantization: Mapping[str, Any]) -> float | None:
    shape, weights, _, bits, group_size, _, quantized = facts
    if not (quantized and weights and bits and group_size):
        return None
    group = _group(module, quantization)
    if shape is None:
        return None
    if group.get("format") in KINDS:
        return weights * KINDS[group["format"]].bits_per_weight
    if group.get("format") != "bitvec":
        return weights * stored_bits(bits, group_size, shape[1])
    try:
        return weights * BitVecScheme.from_json(group).stored_bits(*shape)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _gptq_or_awq(parts: Mapping[str, Header], quantization: Mapping[str, Any]) -> _Facts:
    """GPTQ packs along the inputs, qweight [K·bits/32, N]; AWQ along
    the outputs, [K, N·bits/32]."""
    method = str(quantization.get("quant_method", "qweight"))
    bits = _positive(quantization.get("bits"))
    scales = parts.get("scales")
    qweight = parts["qweight"]
    shape = group_size = None
    if bits and scales is not None and len(scales.shape) == len(qweight.shape) == 2:
        K = qweight.shape[0] if "awq" in method else qweight.shape[0] * 32 // bits
        shape, group_size = (scales.shape[1], K), K // max(1, scales.shape[0])
    return shape, math.prod(shape) if shape else None, method, bits, group_size, "none", True


def _bitsandbytes(parts: Mapping[str, Header], quantization: Mapping[str, Any]) -> _Facts | None:
    if "weight" not in parts:
        return None
    # Four bits: two codes in a byte, stored as a column; the shape is in a table that is data.
    return (
        None,
        2 * parts["weight"].bytes,
        str(quantization.get("quant_method", "bitsandbytes")),
        4,
        None,
        "none",
        True,
    )


def _scheme(module: str, quantization: Mapping[str, Any]) -> tuple[int | None, int | None, str]:
    """(bits, group_size, activations) that compressed-tensors' config_groups give the linear."""
    group = _group(module, quantization)
    weights, activations = group.get("weights"), group.get("input_activations")
    weights = weights if isinstance(weights, dict) else {}
    shown = "none"
    if isinstance(activations, dict):
        shown = f"{'fp' if activations.get('type') == 'float' else 'int'}{activations.get('num_bits', '?')}"
    return _positive(weights.get("num_bits")), _positive(weights.get("group_size")), shown


def _group(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of config_groups for a linear: one that names it, else one for all
    linears; empty without any."""
    groups = quantization.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    named = (g for g in found if any(_names(t, module) for t in _list(g.get("targets"))))
    general = (g for g in found if "Linear" in _list(g.get("targets")))
    return next(named, None) or next(general, None) or {}


def _names(target: Any, module: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _label(quantization: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """quant_method and, for compressed-tensors, the format within it."""
    names = (quantization.get("quant_method"), group.get("format") or quantization.get("format"))
    return " ".join(name for name in names if isinstance(name, str))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
