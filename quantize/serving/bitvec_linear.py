"""A linear layer whose weight stays sums of bit vectors: a kernel, lookup or decoding
by rows multiplies with it."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.bitvec import BitVecScheme, groups_per_row
from quantize.kernels.bitvec.api import multiply
from quantize.kernels.device import has_kernel
from quantize.serving.native_linear import NativeLinear, constant

# Rows of x up to which, on the CPU, looking sums up is faster than decoding: the first takes time
# for every row, the second once.
_FEW = 16


class BitVecLinear(NativeLinear[BitVecScheme]):
    """y = x Wᵀ + b in x's dtype, W as `BitVec` unpacks it, summed in float32 (float64 for such x).

    An index is trusted to lie within the codebook.
    """

    weight_planes: Tensor
    weight_index: Tensor
    weight_lines: Tensor
    weight_scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if x.requires_grad and torch.is_grad_enabled():
            return self._by_rows(x)  # the only way that knows its gradient
        if has_kernel(x):
            weight = (self.weight_planes, self.weight_index, self.weight_lines, self.weight_scales)
            return multiply(
                x, *weight, self.bias, bits=self.scheme.bits, group_size=self.scheme.group_size
            )
        M = x.shape[:-1].numel()
        return self._by_lookup(x) if x.device.type == "cpu" and 0 < M <= _FEW else self._by_rows(x)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Decoded weight [last − first, K] of these output rows; in float32 the very
        values of `BitVec.unpack`."""
        lines = self._lines(first, last)  # [R, G, C]
        octets, bits = self._octets(first, last), self.scheme.bits
        place = torch.arange(8, device=octets.device)
        spread = (torch.arange(256, device=octets.device)[:, None] >> place & 1).float()
        weight = lines[:, :, bits:] if self.scheme.bias else lines.new_zeros(())
        for k in range(bits):
            plane = spread.index_select(0, octets[:, :, k].flatten().int()).view(
                *lines.shape[:2], -1
            )
            weight = plane.mul_(lines[:, :, k, None]).add_(weight)
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    def _by_rows(self, x: Tensor) -> Tensor:
        exact = x.to(_sums_in(x))
        parts = [
            F.linear(exact, self.rows(p.start, p.stop, exact.dtype)) for p in self.pieces(x.device)
        ]
        return self._finish(torch.cat(parts, dim=-1), x.dtype)

    def _by_lookup(self, x: Tensor) -> Tensor:
        # Every 8 inputs have 256 sums; bytes of the planes choose among them,
        # coefficients weight a group's choices.
        bits, group_size = self.scheme.bits, self.scheme.group_size
        G, M = groups_per_row(self.in_features, group_size), x.shape[:-1].numel()
        inputs = F.pad(x.reshape(M, -1).to(_sums_in(x)), (0, G * group_size - self.in_features)).T
        table = _sums(inputs.reshape(-1, 8, M))  # [256·G·group_size/8, M]
        start = torch.arange(0, len(table), 256, dtype=torch.int32).view(G, 1, -1)
        total = inputs.reshape(G, group_size, M).sum(dim=1)
        out = inputs.new_empty(self.out_features, M)
        for part in self.pieces(x.device):
            first, last = part.start, part.stop
            lines = self._lines(first, last).to(table.dtype)
            chosen = (self._octets(first, last) + start).view(-1, group_size // 8)
            sums = F.embedding_bag(chosen, table, mode="sum").view(last - first, -1, M)
            out[part] = (lines[:, :, :bits].reshape(last - first, 1, -1) @ sums).squeeze(1)
            if self.scheme.bias:
                out[part] += lines[:, :, bits] @ total
        return self._finish(out.T, x.dtype).view(*x.shape[:-1], self.out_features)

    def _lines(self, first: int, last: int) -> Tensor:
        # Coefficients of every group: float32 [R, G, C].
        index, Z = self.weight_index[first:last].to(torch.int32), self.scheme.scales
        return self.weight_lines[index // Z].float() * self.weight_scales[index % Z].unsqueeze(-1)

    def _octets(self, first: int, last: int) -> Tensor:
        # Bytes of the planes, those of a group together: uint8 [R, G, bits, group_size / 8].
        bits, runs = self.scheme.bits, self.scheme.group_size // 32
        G = groups_per_row(self.in_features, self.scheme.group_size)
        words = self.weight_planes[first:last]
        words = F.pad(words, (0, G * runs * bits - words.shape[1])).view(-1, G, runs, bits)
        octets = words.transpose(2, 3).contiguous().view(torch.uint8)
        if sys.byteorder == "big":
            octets = octets.view(*octets.shape[:3], runs, 4).flip(4).flatten(3)
        return octets

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle cannot hold unsigned 16-bit integers.
        index = self.weight_index.detach()
        signed = index.view(torch.int16) if index.dtype == torch.uint16 else index
        return self.__dict__ | {
            "_parameters": self._parameters | {"weight_index": constant(signed)}
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.weight_index.dtype == torch.int16:
            self.weight_index = constant(self.weight_index.detach().view(torch.uint16))


def _sums_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums(inputs: Tensor) -> Tensor:
    # Sums that the bits of a byte choose from 8 inputs [B, 8, M]: [B·256, M].
    B, _, M = inputs.shape
    out = inputs.new_zeros(B, 1, M)
    for i in range(8):
        out = torch.cat([out, out + inputs[:, i : i + 1]], dim=1)
    return out.view(-1, M)
