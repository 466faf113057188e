"""Decoding with a model of Llama's shape and random weights: INT4×FP8 with an
INT4 cache, and plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.bench.speed.attention import SCHEME, Cache, Heads, backends, filled_cache, sdpa
from quantize.bench.speed.linears import (
    GROUP_SIZE,
    exact_norm,
    exact_product,
    gated_plain,
    random_weight,
)
from quantize.bench.speed.rows import Row
from quantize.bench.speed.stand import CHAIN_LIMIT, Stand, require_close
from quantize.kernels.attention import api as attention
from quantize.kernels.attention.reference import attend_reference, store_reference, visible
from quantize.kernels.fp8 import api as fp8
from quantize.kernels.int4 import api as int4
from quantize.kernels.int4.reference import Weight

# of RMSNorm and RoPE, as in Llama-3-8B's config
_EPS = 1e-5
_THETA = 500000.0


@dataclass(frozen=True)
class Sizes:
    """Shape of a model."""

    hidden: int = 4096
    intermediate: int = 14336
    vocabulary: int = 128256
    heads: Heads = field(default_factory=Heads)

    @property
    def qkv_outputs(self) -> int:
        """Outputs of query, key and value projections together."""
        return (self.heads.query + 2 * self.heads.key) * self.heads.channels

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """[N, K] of a block's linears: query, key and value; o; gate; up; down."""
        mixed, gate = self.heads.query * self.heads.channels, (self.intermediate, self.hidden)
        return (self.qkv_outputs, self.hidden), (self.hidden, mixed), gate, gate, gate[::-1]


LLAMA_3_8B = Sizes()


@dataclass(frozen=True)
class Place:
    """Where the new tokens of all sequences stand: after `tokens` others."""

    tokens: int
    start: Tensor
    """`tokens` for each sequence, int64 [B]; `lengths` counts the new token, too."""
    lengths: Tensor
    cos: Tensor
    """Of rotary embedding [d]; `sin` has the sign of the channel's partner."""
    sin: Tensor


def place(stand: Stand, B: int, tokens: int, heads: Heads) -> Place:
    """The place after so many tokens."""
    half = heads.channels // 2
    angle = tokens * _THETA ** (-torch.arange(half, device=stand.device) / half)
    sin = torch.cat([-angle.sin(), angle.sin()])
    start = torch.full((B,), tokens, device=stand.device)
    return Place(
        tokens, start, start + 1, angle.cos().repeat(2).to(stand.dtype), sin.to(stand.dtype)
    )


def rotate(x: Tensor, where: Place) -> Tensor:
    """Rotary embedding, half-split, of x [..., d]."""
    return torch.addcmul(x * where.cos, x.roll(x.shape[-1] // 2, -1), where.sin)


@dataclass(frozen=True)
class PackedBlock:
    """A decoder block with folded INT4 weights and an INT4 cache."""

    norms: tuple[Tensor, Tensor]
    qkv: Weight
    o: Weight
    gate: Weight
    up: Weight
    down: Weight
    cache: Cache
    heads: Heads

    def __call__(self, x: Tensor, where: Place) -> Tensor:
        """x [B, hidden] of the new tokens → [B, hidden]; writes their keys and values."""
        x = x + self._product(self._attention(x, where), self.o)
        codes, scale = fp8.quantize_tokens(x, self.norms[1], _EPS, group_size=GROUP_SIZE)
        return x + self._product(
            int4.multiply_gated_codes(codes, scale, self.gate, self.up, dtype=x.dtype), self.down
        )

    def _attention(self, x: Tensor, where: Place) -> Tensor:
        codes, scale = fp8.quantize_tokens(x, self.norms[0], _EPS, group_size=GROUP_SIZE)
        query, key, value = _split(
            int4.multiply_codes(codes, scale, self.qkv, dtype=x.dtype), self.heads, where
        )
        keys, values, S = self.cache.keys, self.cache.values, self.cache.S
        attention.append_records(key, value, S, SCHEME, keys, values, where.start)
        facts = keys, values, S, SCHEME, self.heads.channels**-0.5
        return attention.attend_records(query, *facts, lengths=where.lengths).flatten(1)

    def _product(self, x: Tensor, weight: Weight) -> Tensor:
        codes, scale = fp8.quantize_tokens(x, group_size=GROUP_SIZE)
        return int4.multiply_codes(codes, scale, weight, dtype=x.dtype)

    def exact(self, x: Tensor, where: Place) -> Tensor:
        """What a call must return, in float64 but for roundings that the format asks for."""
        qkv = exact_product(exact_norm(x, self.norms[0], _EPS), self.qkv).to(x.dtype)
        query, key, value = _split(qkv, self.heads, where)
        k, v = self.cache.part(0, where.tokens + 1).read()
        new = store_reference(key, value, self.cache.S, SCHEME)
        room = Cache(new[0], new[1], self.cache.S).read()
        k[:, :, where.tokens :], v[:, :, where.tokens :] = room
        seen = visible(1, k.shape[2], (True, None, None, None), k.device)
        mixed = attend_reference(
            query, k, v, self.cache.S, self.heads.channels**-0.5, seen
        ).flatten(1)
        x = (x + exact_product(mixed, self.o)).to(x.dtype)
        normed = exact_norm(x, self.norms[1], _EPS)
        hidden = (F.silu(exact_product(normed, self.gate)) * exact_product(normed, self.up)).to(
            x.dtype
        )
        return x + exact_product(hidden, self.down)


@dataclass(frozen=True)
class PlainBlock:
    """A decoder block as torch computes it: query, key and value in one
    product, gate and up in another."""

    norms: tuple[Tensor, Tensor]
    qkv: Tensor
    o: Tensor
    both: Tensor
    down: Tensor
    cache: Tensor
    """Keys and values [2, B, Hkv, L, d]."""
    heads: Heads
    attend: partial[Tensor]

    def __call__(self, x: Tensor, where: Place) -> Tensor:
        """x [B, hidden] of the new tokens → [B, hidden]; writes their keys and values."""
        query, key, value = _split(
            F.linear(_norm_plain(x, self.norms[0]), self.qkv), self.heads, where
        )
        self.cache[0, :, :, where.tokens] = key[:, :, 0]
        self.cache[1, :, :, where.tokens] = value[:, :, 0]
        held = self.cache[:, :, :, : where.tokens + 1]
        x = x + F.linear(self.attend(query, held[0], held[1]).flatten(1), self.o)
        return x + F.linear(gated_plain(_norm_plain(x, self.norms[1]), self.both), self.down)


Blocks = Sequence[PackedBlock] | Sequence[PlainBlock]


def time_model(
    stand: Stand, sizes: Sizes, layers: int, contexts: Sequence[int], batches: Sequence[int]
) -> Iterator[Row]:
    """One step of greedy decoding, from hidden states to tokens, after each
    context; QualityError as elsewhere.

    The vocabulary's weight stays in full precision, as `pq convert` leaves it.
    """
    head = stand.random(sizes.vocabulary, sizes.hidden).mul_(sizes.hidden**-0.5)
    norm = torch.ones(sizes.hidden, dtype=stand.dtype, device=stand.device)
    weights = [[random_weight(stand, *shape) for shape in sizes.shapes] for _ in range(layers)]
    folded = [[int4.fold(weight) for weight in of_block] for of_block in weights]
    full = [_full(stand, sizes) for _ in range(layers)]
    for tokens in contexts:
        for B in batches:
            where, x = place(stand, B, tokens, sizes.heads), stand.random(B, sizes.hidden)
            packed = [_packed_block(stand, sizes, of_block, norm, tokens, B) for of_block in folded]
            found, expected = packed[0](x, where), packed[0].exact(x, where)
            require_close(
                found - x,
                expected - x,
                f"block with INT4 weights, batch {B}, {tokens} tokens",
                CHAIN_LIMIT,
            )
            plain = [_plain(stand, sizes, of_block, norm, tokens, B) for of_block in full]
            steps: dict[str, Blocks] = {"pq": packed, stand.plain: plain}
            calls = {
                name: [partial(_step, blocks, x, where, norm, head)]
                for name, blocks in steps.items()
            }
            spreads = stand.clock(calls)
            moved = head.nbytes + sum(block.cache.keys.numel() * 2 for block in packed)
            moved += sum(w.packed.nbytes + w.scale.nbytes for of_block in weights for w in of_block)
            flops = 2 * B * (head.numel() + layers * sum(N * K for N, K in sizes.shapes))
            flops += layers * 4 * B * sizes.heads.query * tokens * sizes.heads.channels
            shape = f"{layers} blocks, {tokens} tokens"
            yield stand.row(
                "model", shape, B, tokens, spreads.pop("pq"), moved, flops, spreads, tokens=B
            )


def _step(blocks: Blocks, x: Tensor, where: Place, norm: Tensor, head: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, where)
    return F.linear(_norm_plain(x, norm), head).argmax(dim=-1)


def _split(qkv: Tensor, heads: Heads, where: Place) -> tuple[Tensor, Tensor, Tensor]:
    # Rotated query [B, H, 1, d] and key [B, Hkv, 1, d], and value, of [B, N].
    parts = qkv.view(len(qkv), -1, 1, heads.channels)
    both = rotate(parts[:, : heads.query + heads.key], where)
    return both[:, : heads.query], both[:, heads.query :], parts[:, heads.query + heads.key :]


def _norm_plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)


def _packed_block(
    stand: Stand, sizes: Sizes, weights: Sequence[Weight], norm: Tensor, tokens: int, B: int
) -> PackedBlock:
    qkv, o, gate, up, down = weights
    cache = filled_cache(stand, B, tokens, sizes.heads, mean=1.0, room=tokens + 1)
    return PackedBlock((norm, norm), qkv, o, gate, up, down, cache, sizes.heads)


def _full(stand: Stand, sizes: Sizes) -> list[Tensor]:
    qkv, o, (N, K), _, down = sizes.shapes
    return [stand.random(*shape).mul_(shape[1] ** -0.5) for shape in (qkv, o, (2 * N, K), down)]


def _plain(
    stand: Stand, sizes: Sizes, weights: Sequence[Tensor], norm: Tensor, tokens: int, B: int
) -> PlainBlock:
    cache = stand.random(2, B, sizes.heads.key, tokens + 1, sizes.heads.channels)
    attend = partial(sdpa, backends(stand)[stand.plain])
    qkv, o, both, down = weights
    return PlainBlock((norm, norm), qkv, o, both, down, cache, sizes.heads, attend)
