"""GEAR's KV cache (arXiv 2403.05527), simulated: rounded codes + a low-rank matrix + sparse outliers.

Keys or values X [T, d] of a head become Q + L + S. The largest and smallest entries of every vector
(of a channel over the tokens for keys, of a token over the channels of all heads for values) go to S
in 16 bits and are rounded in Q as the vector's mean; Q has asymmetric codes; L is the best rank r of
what is left, X − Q − S, for each head, found by power iteration. Facts from the paper and from
`opengear-project/GEAR`, GEARLM/Simulated: values of KCVT have one scale a token, keys one a channel;
KIVI's have one for every 64 tokens or channels; s = 2 %, r = 4 for a prompt and 2 for each group of
tokens that is generated after it, which waits in 16 bits until it is full.

Nothing here is stored: figures are those of a cache that would hold these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from quantize.formats.kv4 import KvNumerics, KvScheme, fake_quantize
from quantize.kernels.attention.reference import attend
from quantize.model import load
from quantize.model.arch import Shape
from quantize.model.attention import KvAttention
from quantize.model.skeleton import Skeleton

_POWER_STEPS = 3
"""As the authors' scripts have it."""


@dataclass(frozen=True)
class Gear:
    """What GEAR adds to which rounding."""

    base: Literal["kcvt", "kivi", "per-token"]
    """`per-token`: pq's own INT4 cache, a scale and a zero point for each token and head."""
    bits: int = 4
    rank: int = 0
    sparse: float = 0.0
    """Share of the entries that are kept in 16 bits."""
    chunk: int = 0
    """Tokens that are compressed together, and seen in 16 bits from among themselves; 0: the whole
    window at once, in which case a token sees itself compressed, too."""
    group: int = 64
    """Tokens or channels that share a scale in KIVI, channels in pq's cache."""
    apart: int = 0
    """`per-token`: entries of a token and head, the largest, that are kept in 16 bits: as many in
    every one, so that all take the same room, as pages of an engine want it."""

    @property
    def scheme(self) -> KvScheme:
        """Of pq's cache."""
        return KvScheme(self.group, symmetric=False)

    def bits_per_value(self, tokens: int, heads: int, head_dim: int) -> float:
        """Stored bits of a key or value channel, mean of both, with all that is stored beside codes.

        Positions of outliers take as few bits as tell them apart within their vector. A chunk that
        waits in 16 bits is left out, as in a cache much longer than it.
        """
        n = self.chunk or tokens
        channels = heads * head_dim
        if self.base == "per-token":
            scales = self.scheme.bits_per_value(head_dim) - 4
        elif self.base == "kivi":
            scales = 32 / self.group
        else:
            scales = (32 / n + 32 / channels) / 2
        low_rank = 16 * self.rank * (n + head_dim) / (n * head_dim)
        outliers = [
            2 * self.side(length) / length * (16 + math.ceil(math.log2(length)))
            for length in (n, channels)
        ]
        apart = self.apart * (16 + math.ceil(math.log2(head_dim))) / head_dim
        return self.bits + scales + low_rank + apart + sum(outliers) / 2

    def side(self, length: int) -> int:
        """Largest entries of a vector of that length that go to S, and as many of the smallest."""
        return round(length * self.sparse / 2)

    def key(self, x: Tensor) -> Tensor:
        """Keys [B, Hkv, T, d] as they come back from the cache, float32."""
        return self._chunked(x, self._key)

    def value(self, x: Tensor) -> Tensor:
        """Values [B, Hkv, T, d] as they come back from the cache, float32."""
        return self._chunked(x, self._value)

    def _chunked(self, x: Tensor, compress: Any) -> Tensor:
        x = x.float()
        if not self.chunk:
            made: Tensor = compress(x)
            return made
        whole = x.shape[2] // self.chunk * self.chunk  # what fills no chunk waits in 16 bits
        parts = [compress(part) for part in x[:, :, :whole].split(self.chunk, dim=2)]
        return torch.cat([*parts, x[:, :, whole:]], dim=2)

    def _key(self, x: Tensor) -> Tensor:
        columns = x.transpose(2, 3)  # [B, Hkv, d, T]: a vector is a channel
        plain, outlier = without_outliers(columns, self.side(x.shape[2]))
        if self.base == "per-token":
            rounded = self._per_token(plain.transpose(2, 3))
        else:
            group = self.group if self.base == "kivi" else x.shape[2]
            rounded = round_asymmetric(plain, self.bits, group).transpose(2, 3)
        return self._corrected(x, rounded, outlier.transpose(2, 3))

    def _value(self, x: Tensor) -> Tensor:
        B, heads, T, d = x.shape
        rows = x.transpose(1, 2).reshape(B, T, heads * d)  # a vector is a token
        plain, outlier = without_outliers(rows, self.side(heads * d))
        plain, outlier = (
            t.view(B, T, heads, d).transpose(1, 2) for t in (plain.contiguous(), outlier)
        )
        if self.base == "per-token":
            rounded = self._per_token(plain)
        else:
            group = self.group if self.base == "kivi" else heads * d
            together = plain.transpose(1, 2).reshape(B, T, heads * d)
            rounded = round_asymmetric(together, self.bits, group)
            rounded = rounded.view(B, T, heads, d).transpose(1, 2)
        return self._corrected(x, rounded, outlier)

    def _per_token(self, x: Tensor) -> Tensor:
        """x [B, Hkv, T, d] in pq's cache, the largest entries of every token and head apart."""
        if not self.apart:
            return fake_quantize(x, self.scheme)
        where = x.abs().topk(self.apart, dim=-1).indices
        # A range always holds 0, which therefore widens none.
        rounded = fake_quantize(x.scatter(-1, where, 0.0), self.scheme)
        return rounded.scatter(-1, where, x.gather(-1, where).half().float())

    def _corrected(self, x: Tensor, rounded: Tensor, outlier: Tensor) -> Tensor:
        """Q + S + L for X [B, Hkv, T, d]."""
        kept = torch.where(outlier, x.half().float(), rounded)
        return kept + low_rank(x - kept, self.rank) if self.rank else kept


def without_outliers(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Vectors [..., n] with the `side` largest and smallest entries of each set to its mean, and
    where these are."""
    outlier = torch.zeros_like(x, dtype=torch.bool)
    if side:
        for largest in (True, False):
            outlier.scatter_(-1, x.topk(side, dim=-1, largest=largest).indices, True)
    return torch.where(outlier, x.mean(dim=-1, keepdim=True), x), outlier


def round_asymmetric(x: Tensor, bits: int, group: int) -> Tensor:
    """x [..., n] on 2^bits evenly spaced levels from the least to the largest of every group; scale
    and least value are float16."""
    grouped = x.reshape(*x.shape[:-1], -1, min(group, x.shape[-1]))
    low = grouped.amin(dim=-1, keepdim=True).half().float()
    high = grouped.amax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(2.0**-24)
    codes = ((grouped - low) / scale).round_().clamp_(0, 2**bits - 1)
    return (codes * scale + low).reshape(x.shape)


def low_rank(x: Tensor, rank: int) -> Tensor:
    """Nearly the best approximation A Bᵀ of x [..., T, d] of that rank, its factors in float16.

    The right factor starts at random and is multiplied by x and xᵀ three times.
    """
    start = torch.Generator().manual_seed(0)
    right = torch.randn(x.shape[-1], rank, generator=start).to(x).expand(*x.shape[:-2], -1, -1)
    for _ in range(_POWER_STEPS):
        left = torch.linalg.qr(x @ right).Q
        right = x.transpose(-1, -2) @ left
    return left.half().float() @ right.half().float().transpose(-1, -2)


class GearAttention(KvAttention):
    """Attention on a cache that GEAR compressed, with the scales of the checkpoint where it has any."""

    gear: Gear

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """query [B, H, T, d], key and value [B, Hkv, T, d] of whole windows → [B, H, T, d]."""
        S = self.scale.float()
        q, k = self.rounded_query(query, S), key.float() * S[:, None]
        stored, held = self.gear.key(k), self.gear.value(value)
        fp8 = self.numerics.fp8_probabilities
        if not self.gear.chunk:
            return attend(q, stored, held, mask, scaling, fp8).to(query.dtype)
        parts = []
        for first in range(0, query.shape[2], self.gear.chunk):
            own = slice(first, min(first + self.gear.chunk, query.shape[2]))
            # What this chunk sees: those before it compressed, itself as it is.
            k_seen = torch.cat((stored[:, :, :first], k[:, :, own]), dim=2)
            v_seen = torch.cat((held[:, :, :first], value[:, :, own].float()), dim=2)
            seen = None if mask is None else mask[..., own, : own.stop]
            parts.append(attend(q[:, :, own], k_seen, v_seen, seen, scaling, fp8))
        return torch.cat(parts, dim=2).to(query.dtype)


@contextmanager
def geared(gear: Gear) -> Iterator[None]:
    """Let models that are loaded meanwhile, and attend on an INT4 cache, attend on this one.

    Put in from outside, because nothing in the package may know of a cache that nobody stores.
    """

    def place(
        skeleton: Skeleton, index: int, layer: torch.nn.Module, numerics: KvNumerics, shape: Shape
    ) -> KvAttention:
        here = skeleton.block_shape(index, shape)
        # The cache alone is compared: queries and probabilities are not rounded.
        plain = KvNumerics(numerics.scheme, False, False)
        kv = GearAttention(plain, here.n_kv_heads, here.head_dim).to(skeleton.device)
        kv.gear = gear
        layer.get_submodule(skeleton.block_arch(index).attention).kv = kv
        return kv

    with patch.object(load, "place_kv", place):
        yield
