"""INT4 keys and values of an attention cache: two codes a byte, a dynamic scale per
token, head and group of channels.

Worked bits, a head of 4 channels in one group, symmetric: [0.5, -3.5, 7, -0.4] has the scale s = 7
/ 7 = 1 and codes round(x / s) = [0, -4, 7, 0] (ties to even). Every code is stored as code + 8 =
[8, 4, 15, 8], the even channel in the low nibble, so the token takes the bytes 0x48, 0x8F and the
bfloat16 scale 0x3F80. Its value is (nibble − 8)·s.

Asymmetric: s = (max − min) / 15 over a range that always holds 0, zero point z = round(−min / s) in
0 … 15, nibble = round(x / s) + z, value (nibble − z)·s.

Scales are rounded to their stored type first and codes are found against the rounded
scale; all arithmetic is float32.
A scale is never below the smallest one stored (bfloat16: 2⁻¹²⁶, E4M3: 2⁻⁹), so zeros stay
zeros; an E4M3 scale saturates at 448. A group with a NaN or an infinity has the scale NaN
and decodes to NaN throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quantize.formats.fp8 import e4m3

ScaleDtype = Literal["bfloat16", "e4m3"]
_TORCH = {"bfloat16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
# What a scale becomes that is smaller, so that nothing is divided by 0: the smallest normal
# bfloat16 and the smallest E4M3 subnormal.
_SMALLEST = {"bfloat16": 2.0**-126, "e4m3": 2.0**-9}
AFFINE_TENSORS = ("key_shift", "key_rotation", "value_shift", "value_rotation")
"""What an attention module has beside S where keys and values enter the cache by affine maps."""
KV_TENSORS = ("kv.scale", *(f"kv.{name}" for name in AFFINE_TENSORS))
"""Names of all that a checkpoint holds of an attention module's cache, relative to it."""
_FIELDS = {"bits": int, "group_size": int, "symmetric": bool, "scale_dtype": str}


@dataclass(frozen=True)
class KvScheme:
    """How keys and values are rounded; ValueError for a group or a scale
    type that does not exist."""

    group_size: int = 128
    """Channels that share a scale; a smaller head is one group."""
    symmetric: bool = True
    """Codes -8 … 7 around zero; otherwise 0 … 15 with a zero point per group."""
    scale_dtype: ScaleDtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"KV cache: group_size {self.group_size} is not positive")
        if self.scale_dtype not in get_args(ScaleDtype):
            raise ValueError(
                f"KV cache: scale_dtype {self.scale_dtype!r} is none of "
                f"{', '.join(get_args(ScaleDtype))}"
            )

    def group(self, head_dim: int) -> int:
        """Channels in a group of a head; ValueError when head_dim is odd or no multiple of them."""
        group = min(self.group_size, head_dim)
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"KV cache: head_dim {head_dim} is odd, but a byte holds two channels")
        if head_dim % group:
            raise ValueError(
                f"KV cache: head_dim {head_dim} is no multiple of group_size {self.group_size}"
            )
        return group

    def bits_per_value(self, head_dim: int) -> float:
        """Stored bits per key or value channel, its share of scale and zero point counted."""
        extra = 8 * _TORCH[self.scale_dtype].itemsize + (0 if self.symmetric else 8)
        return 4 + extra / self.group(head_dim)

    def label(self, head_dim: int) -> str:
        """For people: `int4 g64`, with what differs from the default."""
        kind = "" if self.symmetric else " asymmetric"
        return f"int4 g{self.group(head_dim)}{kind}{'' if self.scale_dtype == 'bfloat16' else ' e4m3 scales'}"

    def record_bytes(self, head_dim: int) -> int:
        """Bytes of one token of one head (see `KvCodes.records`)."""
        return round(head_dim * self.bits_per_value(head_dim)) // 8

    def as_json(self) -> dict[str, Any]:
        """As it stands in config.json; `from_json` reads it back."""
        return {
            "bits": 4,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> KvScheme:
        """Read `as_json()`; ValueError for a missing, unknown or mistyped
        field or anything but 4 bits."""
        if set(facts) != set(_FIELDS):
            odd = ", ".join(sorted(set(facts) ^ set(_FIELDS)))
            raise ValueError(
                f"KV cache: exactly the fields {', '.join(_FIELDS)} are known; missing or too "
                f"many: {odd}"
            )
        for name, kind in _FIELDS.items():
            if type(facts[name]) is not kind:
                raise ValueError(f"KV cache: {name} is {facts[name]!r}, expected {kind.__name__}")
        if facts["bits"] != 4:
            raise ValueError(f"KV cache: {facts['bits']} bits are not supported, only 4")
        return cls(facts["group_size"], facts["symmetric"], facts["scale_dtype"])


@dataclass(frozen=True)
class KvNumerics:
    """How attention rounds: INT4 cache, queries and probabilities."""

    scheme: KvScheme = field(default_factory=KvScheme)
    fp8_query: bool = True
    fp8_probabilities: bool = True
    affine: bool = False
    """Whether keys and values are shifted and rotated before they are rounded
    (`quantize.kernels.attention.affine`)."""

    def tensors(self, n_kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of an attention module's tensors of `KV_TENSORS`, all float32."""
        size = (n_kv_heads, head_dim)
        found: dict[str, tuple[int, ...]] = {"kv.scale": size}
        for name in AFFINE_TENSORS if self.affine else ():
            found[f"kv.{name}"] = (*size, head_dim) if name.endswith("rotation") else size
        return found

    def as_json(self) -> dict[str, Any]:
        """The `attention` part of a native checkpoint's quantization_config."""
        return {
            "kv_cache": self.scheme.as_json(),
            "query": "fp8" if self.fp8_query else None,
            "probabilities": "fp8" if self.fp8_probabilities else None,
            # Absent where there is none, so that readers which know of none refuse the others alone.
            **({"affine": True} if self.affine else {}),
        }

    def label(self, head_dim: int) -> str:
        """As `KvScheme.label`."""
        return self.scheme.label(head_dim)

    def bits_per_value(self, head_dim: int) -> float:
        """As `KvScheme.bits_per_value`."""
        return self.scheme.bits_per_value(head_dim)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> KvNumerics:
        """Undo `as_json`; ValueError or KeyError for what pq does not write."""
        if not {facts["query"], facts["probabilities"]} <= {None, "fp8"}:
            raise ValueError(
                f"query {facts['query']!r} and probabilities {facts['probabilities']!r}: fp8 or "
                "null"
            )
        scheme, affine = KvScheme.from_json(facts["kv_cache"]), facts.get("affine", False)
        if not isinstance(affine, bool):
            raise ValueError(f"affine is {affine!r}, expected true or false")
        return cls(scheme, facts["query"] == "fp8", facts["probabilities"] == "fp8", affine)


@dataclass(frozen=True)
class KvCodes:
    """Rounded keys or values of heads of d channels in G groups; leading dimensions are free."""

    packed: Tensor  # uint8 [..., d / 2]
    scale: Tensor  # bfloat16 or float8_e4m3fn [..., G]
    zero: Tensor | None  # uint8 [..., G]; None where symmetric

    def records(self) -> Tensor:
        """Everything of a token side by side, uint8 [..., R]: packed codes, bytes
        of the scales, zero points."""
        parts = [self.packed, self.scale.contiguous().view(torch.uint8)]
        return torch.cat(parts if self.zero is None else [*parts, self.zero], dim=-1)

    @classmethod
    def from_records(cls, records: Tensor, scheme: KvScheme, head_dim: int) -> KvCodes:
        """Undo `records()` for heads of `head_dim` channels; ValueError when R is not theirs."""
        if records.dtype != torch.uint8 or records.shape[-1] != scheme.record_bytes(head_dim):
            raise ValueError(
                f"KV cache: records are {records.dtype} [..., {records.shape[-1]}], "
                f"expected uint8 [..., {scheme.record_bytes(head_dim)}] for head_dim {head_dim}"
            )
        groups = head_dim // scheme.group(head_dim)
        dtype = _TORCH[scheme.scale_dtype]
        sizes = [head_dim // 2, groups * dtype.itemsize, 0 if scheme.symmetric else groups]
        packed, scale, zero = torch.split(records, sizes, dim=-1)
        # A view as another type needs aligned memory, which a slice of the records is not.
        return cls(
            packed,
            scale.clone(memory_format=torch.contiguous_format).view(dtype),
            zero if sizes[2] else None,
        )


def quantize(x: Tensor, scheme: KvScheme) -> KvCodes:
    """Round floating-point x [..., d] to the nearest codes. ValueError for a d that
    the scheme cannot divide."""
    groups = _groups(x, scheme)
    scale, zero = _scale_and_zero(groups, scheme)
    shift: Tensor | float = 8.0 if zero is None else zero
    codes = (
        (groups / scale)
        .round_()
        .add_(shift)
        .clamp_(0, 15)
        .nan_to_num_(nan=0.0)
        .to(torch.uint8)
        .flatten(-2)
    )
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    zeros = None if zero is None else zero.squeeze(-1).nan_to_num(nan=0.0).to(torch.uint8)
    return KvCodes(packed, scale.squeeze(-1).to(_TORCH[scheme.scale_dtype]), zeros)


def dequantize(codes: KvCodes, scheme: KvScheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., d] in `dtype` (computed in float32) of rounded keys or values."""
    nibbles = torch.stack((codes.packed & 15, codes.packed >> 4), dim=-1).flatten(-2)
    values = _split(nibbles, scheme).float()
    values.sub_(8.0 if codes.zero is None else codes.zero.unsqueeze(-1).float())
    return values.mul_(codes.scale.unsqueeze(-1).float()).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, scheme: KvScheme) -> Tensor:
    """What x [..., d] is after `quantize` and `dequantize`, bit for bit, without
    packing; float32 [..., d]."""
    groups = _groups(x, scheme)
    scale, zero = _scale_and_zero(groups, scheme)
    values = (groups / scale).round_()
    if zero is None:
        values.clamp_(-8, 7).add_(0.0)  # the sum turns −0, which no code holds, into 0
    else:
        values.add_(zero).clamp_(0, 15).sub_(zero)
    return values.mul_(scale).flatten(-2)


def _groups(x: Tensor, scheme: KvScheme) -> Tensor:
    """x [..., d] as float32 [..., G, d / G]."""
    if not x.is_floating_point():
        raise ValueError(f"KV cache: keys and values are floating-point, not {x.dtype}")
    return _split(x.float(), scheme)


def _split(x: Tensor, scheme: KvScheme) -> Tensor:
    group = scheme.group(x.shape[-1])
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _scale_and_zero(groups: Tensor, scheme: KvScheme) -> tuple[Tensor, Tensor | None]:
    """Stored scale [..., G, 1] and zero point (None where symmetric) of x
    [..., G, g], both float32."""
    if scheme.symmetric:
        return _representable(groups.abs().amax(dim=-1, keepdim=True) / 7, scheme), None
    low = groups.amin(dim=-1, keepdim=True).clamp_max(0)
    high = groups.amax(dim=-1, keepdim=True).clamp_min(0)
    # Divided first: the difference may overflow.
    scale = _representable(high / 15 - low / 15, scheme)
    return scale, (-low / scale).round_().clamp_(0, 15)


def _representable(scale: Tensor, scheme: KvScheme) -> Tensor:
    """Float32 scale as its stored type holds it."""
    rounded = e4m3(scale) if scheme.scale_dtype == "e4m3" else scale.to(torch.bfloat16).float()
    return torch.where(
        scale.isfinite(), rounded.clamp_min(_SMALLEST[scheme.scale_dtype]), torch.nan
    )
