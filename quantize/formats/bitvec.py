"""`bitvec`: weights as sums of bit vectors (SBVR, arXiv 2509.18172), the sums taken
from a codebook of coefficients.

A group of `group_size` consecutive inputs of one output row uses one line of coefficients c: weight
= Σ_k c_k · b_k, plus one constant c_bits where lines carry a bias. Line i of a matrix is
lines[i // Z] · scales[i % Z], Z the number of
scales: one scale gives free lines, several give shapes × scales.

Worked bits, 4-bit: word 4·w + k of a row holds bit k of the codes of inputs 32·w … 32·w +
31, input 32·w + i at bit i.
Codes [1, 2, 3, 8] start a row with plane words 0x…5, 0x…6, 0x0, 0x…8: bit 0 of the codes is 1, 0,
1, 0 from the low end. The four words of 32 inputs lie side by side, so one 16-byte load brings all
planes of them. Bits beyond the last input are 0; a last group that is not full is only shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.formats.scheme import noted_shape

GROUP_SIZES = (64, 128, 256)
MIN_BITS, MAX_BITS = 2, 8
MAX_LINES = 1 << 16  # what a 16-bit index tells apart
_WORD = 32  # bits of a word of a plane, int32
_AT_ONCE = 1 << 18  # codes packed at once: their work space stays in the processor's cache

SUFFIXES = ("weight_planes", "weight_index", "weight_lines", "weight_scales", "weight_shape")
"""Names of a linear's tensors in the checkpoint, after the linear's own."""


def plane_words(columns: int, bits: int) -> int:
    """int32 words that hold one row of `columns` codes."""
    return math.ceil(columns / _WORD) * bits


def groups_per_row(columns: int, group_size: int) -> int:
    """Groups of one row; the last may be shorter than the others."""
    return math.ceil(columns / group_size)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, K] (any integer dtype, 0 … 2^bits − 1) into int32
    words [N, ceil(K / 32)·bits]."""
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes outside the {bits}-bit range [0, {(1 << bits) - 1}]")
    N, K = codes.shape
    runs = math.ceil(K / _WORD)
    weights = torch.tensor(
        [1 << i if i < 31 else -(1 << 31) for i in range(_WORD)], device=codes.device
    )
    out = torch.empty(N, runs, bits, dtype=torch.int32, device=codes.device)
    for first, rows in _row_pieces(codes):
        padded = torch.zeros(len(rows), runs * _WORD, dtype=torch.int64, device=codes.device)
        padded[:, :K] = rows
        run = padded.view(-1, runs, _WORD)
        for k in range(bits):
            out[first : first + len(rows), :, k] = (
                ((run >> k & 1) * weights).sum(dim=2).to(torch.int32)
            )
    return out.view(N, runs * bits)


def unpack_planes(planes: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_planes`: int32 words [N, ceil(columns / 32)·bits] → uint8 codes [N, columns]."""
    N = planes.shape[0]
    places = torch.arange(_WORD, dtype=torch.int32, device=planes.device)
    out = torch.empty(N, columns, dtype=torch.uint8, device=planes.device)
    for first, rows in _row_pieces(planes):
        words = rows.view(len(rows), -1, bits)
        codes = torch.zeros(*words.shape[:2], _WORD, dtype=torch.int32, device=planes.device)
        for k in range(bits):
            codes |= (words[:, :, k, None] >> places & 1) << k
        out[first : first + len(rows)] = codes.flatten(1)[:, :columns].to(torch.uint8)
    return out


def _row_pieces(matrix: Tensor) -> Sequence[tuple[int, Tensor]]:
    step = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    return [(first, matrix[first : first + step]) for first in range(0, len(matrix), step)]


def coefficients(lines: Tensor, scales: Tensor) -> Tensor:
    """Coefficients of all lines, float32 [S·Z, C], of shapes `lines` [S, C] and `scales` [Z]."""
    return (lines.float()[:, None, :] * scales.float()[None, :, None]).flatten(0, 1)


def levels(coefficients: Tensor, bits: int) -> Tensor:
    """Values of all codes, [L, 2^bits], of coefficients [L, bits] or, with a bias in
    the last place, [L, bits + 1].

    Added in the order bias, c_0, c_1 …: float32 sums are the same wherever they are computed so.
    """
    L, C = coefficients.shape
    out = coefficients[:, bits:] if bits < C else coefficients.new_zeros(L, 1)
    for k in range(bits):
        out = torch.cat([out, out + coefficients[:, k : k + 1]], dim=1)
    return out


def index_dtype(lines: int) -> torch.dtype:
    """Dtype of a group's index into this many lines."""
    return torch.uint8 if lines <= 256 else torch.uint16


@dataclass(frozen=True, order=True)
class BitVecScheme:
    """How one set of linears is stored."""

    bits: int
    group_size: int
    bias: bool
    lines: int
    """Shapes S in the codebook."""
    scales: int
    """Scales Z; the index tells S·Z lines apart."""

    fp8_activations = False
    suffixes = SUFFIXES

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"{self.bits} bit planes, expected {MIN_BITS} … {MAX_BITS}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group size {self.group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}"
            )
        if self.lines < 1 or self.scales < 1 or self.lines * self.scales > MAX_LINES:
            raise ValueError(f"{self.lines} × {self.scales} lines, expected 1 … {MAX_LINES}")

    @property
    def coefficients(self) -> int:
        """Coefficients of a line, the bias counted."""
        return self.bits + self.bias

    def layout(self, N: int, K: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of a linear [N, K], by suffix."""
        return {
            "weight_planes": (torch.int32, (N, plane_words(K, self.bits))),
            "weight_index": (
                index_dtype(self.lines * self.scales),
                (N, groups_per_row(K, self.group_size)),
            ),
            "weight_lines": (torch.float16, (self.lines, self.coefficients)),
            "weight_scales": (torch.float32, (self.scales,)),
            "weight_shape": (torch.int64, (2,)),
        }

    def stored_bits(self, N: int, K: int) -> float:
        """Bits that one weight of a linear [N, K] takes: planes, indices and the whole codebook."""
        layout = self.layout(N, K)
        stored = (shape for suffix, shape in layout.items() if suffix != "weight_shape")
        return sum(dtype.itemsize * 8 * math.prod(shape) for dtype, shape in stored) / (N * K)

    def read(self, tensors: Mapping[str, Tensor]) -> BitVec:
        """The weight stored in `tensors` by suffix; ValueError when they do not fit the scheme."""
        return BitVec.from_tensors(tensors, self)

    def as_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """One entry of config_groups."""
        weights = {"num_bits": self.bits, "type": "bitvec", "group_size": self.group_size}
        codebook = {"bias": self.bias, "lines": self.lines, "scales": self.scales}
        return {
            "targets": list(targets),
            "format": "bitvec",
            "weights": weights | codebook,
            "input_activations": None,
        }

    @classmethod
    def from_json(cls, group: Mapping[str, Any]) -> BitVecScheme:
        """Undo `as_json`; ValueError for what is no such scheme."""
        weights = group["weights"]
        wanted = {"num_bits", "type", "group_size", "bias", "lines", "scales"}
        if (
            set(weights) != wanted
            or weights["type"] != "bitvec"
            or group.get("input_activations") is not None
        ):
            raise ValueError(
                "weights of format bitvec have num_bits, group_size, bias, lines and scales alone"
            )
        numbers = [weights[key] for key in ("num_bits", "group_size", "lines", "scales")]
        if any(not isinstance(n, int) or isinstance(n, bool) for n in numbers) or not isinstance(
            weights["bias"], bool
        ):
            raise ValueError(
                "weights of format bitvec: sizes must be whole numbers, bias true or false"
            )
        bits, group_size, lines, scales = numbers
        return cls(bits, group_size, weights["bias"], lines, scales)


@dataclass(frozen=True)
class BitVec:
    """A linear's weight [N, K]: codes, a line of coefficients for each group, and
    the codebook of the lines."""

    codes: Tensor  # uint8 [N, K]; bit k: whether coefficient k is added
    index: Tensor  # int32 [N, G]; the group's line
    lines: Tensor  # float16 [S, bits + bias]
    scales: Tensor  # float32 [Z]
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        N, K = self.codes.shape
        if (self.codes.dtype, self.index.dtype) != (torch.uint8, torch.int32):
            raise ValueError("codes must be uint8 and index int32")
        if (self.lines.dtype, self.scales.dtype) != (torch.float16, torch.float32):
            raise ValueError("lines must be float16 and scales float32")
        if tuple(self.index.shape) != (N, groups_per_row(K, self.group_size)):
            raise ValueError(
                f"index is {tuple(self.index.shape)} for a weight {(N, K)} in groups of "
                f"{self.group_size}"
            )
        if self.lines.shape[1] not in (self.bits, self.bits + 1):
            raise ValueError(
                f"lines have {self.lines.shape[1]} coefficients, expected {self.bits} or "
                f"{self.bits + 1}"
            )
        count = self.lines.shape[0] * self.scales.shape[0]
        if self.index.numel() and (int(self.index.min()) < 0 or int(self.index.max()) >= count):
            raise ValueError(
                f"index {int(self.index.max())} is outside a codebook of {count} lines"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def scheme(self, fp8_activations: bool = False) -> BitVecScheme:
        """How it is stored; ValueError for FP8 activations."""
        if fp8_activations:
            raise ValueError("bit vectors are multiplied with 16-bit activations only")
        bias = self.lines.shape[1] > self.bits
        return BitVecScheme(
            self.bits, self.group_size, bias, self.lines.shape[0], self.scales.shape[0]
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: planes, indices and the whole codebook."""
        return self.scheme().stored_bits(*self.shape)

    def unit(self) -> Tensor:
        """Mean step between neighbouring codes of every group, float32 [N, G]."""
        return _steps(self._levels())[self.index.long()]

    def points(self) -> Tensor:
        """Values of all codes in units of the step, rising, float32
        [2^bits]: the mean over groups."""
        table = self._levels()
        counts = torch.bincount(self.index.flatten(), minlength=len(table)).float()
        steps = _steps(table)
        lines = table.sort(dim=1).values / torch.where(steps == 0, 1, steps)[:, None]
        return (counts @ lines) / counts.sum()

    def _levels(self) -> Tensor:
        return levels(coefficients(self.lines, self.scales), self.bits)

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint tensors by suffix."""
        dtype = index_dtype(self.lines.shape[0] * self.scales.shape[0])
        return {
            "weight_planes": pack_planes(self.codes, self.bits),
            "weight_index": self.index.to(dtype),
            "weight_lines": self.lines.contiguous(),
            "weight_scales": self.scales,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: BitVecScheme) -> BitVec:
        """Read back `tensors()`; ValueError when shapes or dtypes disagree."""
        N, K = noted_shape(tensors, SUFFIXES)
        for suffix, (dtype, shape) in scheme.layout(N, K).items():
            found = tensors[suffix]
            if (found.dtype, tuple(found.shape)) != (dtype, shape):
                raise ValueError(
                    f"{suffix} is {found.dtype} {tuple(found.shape)}, expected {dtype} {shape}"
                )
        codes = unpack_planes(tensors["weight_planes"], scheme.bits, K)
        index = tensors["weight_index"].to(torch.int32)
        return cls(
            codes,
            index,
            tensors["weight_lines"],
            tensors["weight_scales"],
            scheme.bits,
            scheme.group_size,
        )

    def unpack(self) -> Tensor:
        """Weight [N, K] in float32."""
        lines = self.index.long() << self.bits
        places = lines.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]].add_(
            self.codes
        )
        return self._levels().flatten()[places]

    def kernel_weight(self) -> Tensor:
        """As `unpack`: there is no kernel for FP8 activations."""
        return self.unpack()


def _steps(table: Tensor) -> Tensor:
    # Mean steps between neighbouring codes [L] of the levels of lines [L, 2^bits].
    return (table.amax(dim=1) - table.amin(dim=1)) / (table.shape[1] - 1)
