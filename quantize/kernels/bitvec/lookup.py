"""Products with `bitvec` weights (`quantize/formats/bitvec.py`) in plain torch, as fast as it allows: sums
looked up for few rows of inputs, weights decoded by rows for many."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.bitvec import groups_per_row
from quantize.kernels.by_rows import pieces

# Rows of x up to which, on the CPU, looking sums up is faster than decoding: the first takes time
# for every row, the second once.
_FEW = 16


def looks_up(x: Tensor) -> bool:
    """Whether looking sums up for x [..., K] is faster than decoding."""
    return x.device.type == "cpu" and 0 < x.shape[:-1].numel() <= _FEW


@dataclass(frozen=True)
class Stored:
    """A weight [N, K] by its tensors; an index is trusted to lie within the codebook."""

    planes: Tensor
    """int32 [N, ceil(K / 32)·bits]."""
    index: Tensor
    """uint8 or uint16 [N, G]."""
    lines: Tensor
    """float16 [S, bits], or [S, bits + 1] with a bias."""
    scales: Tensor
    """float32 [Z]."""
    bits: int
    group_size: int

    def rows(self, first: int, last: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Decoded weight [last − first, columns] of these output rows; in float32 the very values of
        `BitVec.unpack`."""
        lines = self._coefficients(first, last)  # [R, G, C]
        octets, bits = self._octets(first, last), self.bits
        place = torch.arange(8, device=octets.device)
        spread = (torch.arange(256, device=octets.device)[:, None] >> place & 1).float()
        weight = lines[:, :, bits:] if lines.shape[2] > bits else lines.new_zeros(())
        for k in range(bits):
            plane = spread.index_select(0, octets[:, :, k].flatten().int()).view(
                *lines.shape[:2], -1
            )
            weight = plane.mul_(lines[:, :, k, None]).add_(weight)
        return weight.flatten(1)[:, :columns].to(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] → [..., N] in x's dtype, plus bias [N]; summed in float32 (float64 for such x)."""
        return (self.multiply_by_lookup if looks_up(x) else self.multiply_by_rows)(x, bias)

    def multiply_by_rows(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`multiply` with weights decoded a few rows at a time; the only way that has a gradient."""
        exact, K = x.to(_sums_in(x)), x.shape[-1]
        parts = [
            F.linear(exact, self.rows(p.start, p.stop, K, exact.dtype))
            for p in pieces(len(self.planes), K, x.device)
        ]
        return _finish(torch.cat(parts, dim=-1), bias, x.dtype)

    def multiply_by_lookup(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`multiply` without decoding: every 8 inputs have 256 sums, bytes of the planes choose among
        them, coefficients weight a group's choices."""
        bits, group_size, K = self.bits, self.group_size, x.shape[-1]
        G, M, N = groups_per_row(K, group_size), x.shape[:-1].numel(), len(self.planes)
        inputs = F.pad(x.reshape(M, -1).to(_sums_in(x)), (0, G * group_size - K)).T
        table = _sums(inputs.reshape(-1, 8, M))  # [256·G·group_size/8, M]
        start = torch.arange(0, len(table), 256, dtype=torch.int32).view(G, 1, -1)
        total = inputs.reshape(G, group_size, M).sum(dim=1)
        out = inputs.new_empty(N, M)
        for part in pieces(N, K, x.device):
            first, last = part.start, part.stop
            lines = self._coefficients(first, last).to(table.dtype)
            chosen = (self._octets(first, last) + start).view(-1, group_size // 8)
            sums = F.embedding_bag(chosen, table, mode="sum").view(last - first, -1, M)
            out[part] = (lines[:, :, :bits].reshape(last - first, 1, -1) @ sums).squeeze(1)
            if lines.shape[2] > bits:
                out[part] += lines[:, :, bits] @ total
        return _finish(out.T, bias, x.dtype).view(*x.shape[:-1], N)

    def _coefficients(self, first: int, last: int) -> Tensor:
        # Of every group: float32 [R, G, C].
        index, Z = self.index[first:last].to(torch.int32), len(self.scales)
        return self.lines[index // Z].float() * self.scales[index % Z].unsqueeze(-1)

    def _octets(self, first: int, last: int) -> Tensor:
        # Bytes of the planes, those of a group together: uint8 [R, G, bits, group_size / 8].
        bits, runs, G = self.bits, self.group_size // 32, self.index.shape[1]
        words = self.planes[first:last]
        words = F.pad(words, (0, G * runs * bits - words.shape[1])).view(-1, G, runs, bits)
        octets = words.transpose(2, 3).contiguous().view(torch.uint8)
        if sys.byteorder == "big":
            octets = octets.view(*octets.shape[:3], runs, 4).flip(4).flatten(3)
        return octets


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def _sums_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums(inputs: Tensor) -> Tensor:
    # Sums that the bits of a byte choose from 8 inputs [B, 8, M]: [B·256, M].
    B, _, M = inputs.shape
    out = inputs.new_zeros(B, 1, M)
    for i in range(8):
        out = torch.cat([out, out + inputs[:, i : i + 1]], dim=1)
    return out.view(-1, M)
