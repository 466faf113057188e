"""Time of attention over the INT4 cache, decode and prefill, and of writing it,
against torch's own attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantize.bench.speed.rows import Row
from quantize.bench.speed.stand import Calls, Stand, require_close
from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention import api as attention
from quantize.kernels.attention.reference import (
    attend_reference,
    read_reference,
    store_reference,
    visible,
)

SCHEME = KvScheme()


@dataclass(frozen=True)
class Heads:
    """Heads of an attention layer."""

    query: int = 32
    key: int = 8
    channels: int = 128


@dataclass(frozen=True)
class Cache:
    """Records of K·S and V [B, Hkv, L, R] in memory of their own, and the S
    [Hkv, d] they were made with."""

    keys: Tensor
    values: Tensor
    S: Tensor

    def clone(self) -> Cache:
        """Another one with the same records."""
        B, H, L, _ = self.keys.shape
        made = empty_cache(B, H, L, self.S)
        made.keys.copy_(self.keys)
        made.values.copy_(self.values)
        return made

    def part(self, first: int, last: int) -> Cache:
        """A view of these tokens."""
        return Cache(self.keys[:, :, first:last], self.values[:, :, first:last], self.S)

    def read(self) -> tuple[Tensor, Tensor]:
        """K·S and V, float32 [B, Hkv, L, d]."""
        k, v = (read_reference(x, SCHEME, self.S.shape[1]) for x in (self.keys, self.values))
        return k, v


def empty_cache(B: int, H: int, L: int, S: Tensor) -> Cache:
    """Room for L tokens; records begin at multiples of 16 bytes, as they load fastest."""
    R = SCHEME.record_bytes(S.shape[1])
    room = torch.zeros(2, B, H, L, math.ceil(R / 16) * 16, dtype=torch.uint8, device=S.device)
    return Cache(room[0, ..., :R], room[1, ..., :R], S)


def filled_cache(
    stand: Stand, B: int, L: int, heads: Heads, mean: float = 0.0, room: int | None = None
) -> Cache:
    """A cache of L random tokens; values have a mean, so that attention to many tokens
    does not come to nothing."""
    S = torch.rand(heads.key, heads.channels, device=stand.device) + 0.5
    cache = empty_cache(B, heads.key, room or L, S)
    for b in range(B):
        key, value = (stand.random(1, heads.key, L, heads.channels) for _ in range(2))
        row = Cache(cache.keys[b : b + 1, :, :L], cache.values[b : b + 1, :, :L], S)
        stored = store_reference(key, value + mean, S, SCHEME)
        row.keys.copy_(stored[0])
        row.values.copy_(stored[1])
    return cache


def time_decode(
    stand: Stand, contexts: Sequence[int], batches: Sequence[int], heads: Heads
) -> Iterator[Row]:
    """One new token a sequence: attention to the INT4 cache, and appending to it,
    at each length and batch."""
    for L in contexts:
        for B in batches:
            cache = filled_cache(stand, B, L, heads)
            query = stand.random(B, heads.query, 1, heads.channels)
            yield _decode_row(stand, cache, query, L)
            yield _append_row(stand, cache, heads, 1)


def time_prefill(stand: Stand, lengths: Sequence[int], heads: Heads) -> Iterator[Row]:
    """T causal queries on T keys and values, in INT4 and in E4M3, and
    storing them, at each length."""
    for T in lengths:
        cache = filled_cache(stand, 1, T, heads)
        query = stand.random(1, heads.query, T, heads.channels)
        yield from _prefill_rows(stand, cache, query)
        yield _append_row(stand, cache, heads, T)


def sdpa(
    backend: SDPBackend | None, query: Tensor, key: Tensor, value: Tensor, causal: bool = False
) -> Tensor:
    """torch's attention of query [B, H, T, d] to key and value [B, Hkv, L, d]
    by this backend, or by any."""
    with nullcontext() if backend is None else sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def backends(stand: Stand) -> dict[str, SDPBackend | None]:
    """torch's attention by the name of a peer."""
    if stand.device.type != "cuda":
        return {stand.plain: None}
    return {stand.plain: SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def _decode_row(stand: Stand, cache: Cache, query: Tensor, L: int) -> Row:
    B, H, _, d = query.shape
    moved = 2 * cache.keys.numel() + 2 * query.nbytes
    caches = [cache, *(cache.clone() for _ in range(stand.copies(moved) - 1))]
    ours = [_attend(query, held, causal=True) for held in caches]
    k, v = cache.read()
    expected = attend_reference(
        query, k, v, cache.S, d**-0.5, visible(1, L, (True, None, None, None), k.device)
    )
    require_close(ours[0](), expected, f"decode attention, {L} tokens, batch {B}")
    others = _plain_calls(stand, query, k / cache.S[:, None], v, expected, causal=False)
    spreads = stand.clock({"pq": ours, **others})
    return stand.row(
        "attention", f"{L} tokens", B, L, spreads.pop("pq"), moved, 4 * B * H * L * d, spreads
    )


def _prefill_rows(stand: Stand, cache: Cache, query: Tensor) -> Iterator[Row]:
    _, H, T, d = query.shape
    k, v = cache.read()
    stored = attention.quantize_fp8(
        (k / cache.S[:, None]).to(query.dtype), v.to(query.dtype), cache.S
    )
    rounded = (
        stored[0].float() * stored[1][..., None],
        stored[2].float() * stored[3][..., None, None],
    )
    ours: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, Tensor], int]] = {
        "attention INT4 KV": (_attend(query, cache, causal=True), (k, v), cache.keys.shape[3]),
        "attention FP8 KV": (
            partial(attention.attend_fp8, query, *stored, cache.S, d**-0.5),
            rounded,
            d,
        ),
    }
    seen = visible(T, T, (True, None, None, None), query.device)
    for name, (call, parts, _) in ours.items():
        expected = attend_reference(query, *parts, cache.S, d**-0.5, seen)
        require_close(call(), expected, f"prefill {name}, {T} tokens")
    others = _plain_calls(stand, query, k / cache.S[:, None], v, expected, causal=True)
    spreads = stand.clock({**{name: [call] for name, (call, _, _) in ours.items()}, **others})
    peers = {name: spreads[name] for name in others}
    for name, (_, _, stored_bytes) in ours.items():
        moved = 2 * query.nbytes + 2 * cache.keys.shape[1] * T * stored_bytes
        yield stand.row(
            name, f"{T} tokens", 1, T, spreads[name], moved, 2 * H * T * (T + 1) * d, peers
        )


def _append_row(stand: Stand, cache: Cache, heads: Heads, T: int) -> Row:
    B, _, L, R = cache.keys.shape
    key, value = (stand.random(B, heads.key, T, heads.channels) for _ in range(2))
    held = cache.clone()
    start = torch.full((B,), L - T, device=stand.device)
    ours = partial(
        attention.append_records, key, value, cache.S, SCHEME, held.keys, held.values, start
    )
    ours()
    expected = [
        read_reference(x, SCHEME, heads.channels)
        for x in store_reference(key, value, cache.S, SCHEME)
    ]
    for found, wanted in zip(held.part(L - T, L).read(), expected, strict=True):
        require_close(found, wanted, f"appending {T} tokens, batch {B}")
    room = stand.random(2, B, heads.key, T, heads.channels)
    spreads = stand.clock(
        {"pq": [ours], stand.plain: [lambda: (room[0].copy_(key), room[1].copy_(value))]}
    )
    moved = 2 * key.nbytes + 2 * B * heads.key * T * R
    name = "append" if T == 1 else "store"
    flops = 6 * key.numel()
    return stand.row(
        name, f"{L} tokens", B, L, spreads.pop("pq"), moved, flops, spreads, precision="none"
    )


def _attend(query: Tensor, cache: Cache, causal: bool) -> Callable[[], Tensor]:
    facts = cache.keys, cache.values, cache.S, SCHEME, query.shape[3] ** -0.5
    return partial(attention.attend_records, query, *facts, causal=causal)


def _plain_calls(
    stand: Stand, query: Tensor, key: Tensor, value: Tensor, expected: Tensor, causal: bool
) -> dict[str, Calls]:
    key, value = key.to(query.dtype), value.to(query.dtype)
    copies = stand.copies(key.nbytes + value.nbytes) if query.shape[2] == 1 else 1
    pairs = [(key, value), *((key.clone(), value.clone()) for _ in range(copies - 1))]

    def make(backend: SDPBackend | None) -> Calls:
        return [partial(sdpa, backend, query, *pair, causal) for pair in pairs]

    return stand.working(
        {name: partial(make, backend) for name, backend in backends(stand).items()}, expected
    )
