"""KV memory that engines of different precision share: slabs, cut into blocks of one format at a time.

A block holds the keys (or the values) that one layer keeps of `tokens` tokens. Engines address all
layers by the same block number, so slabs are handed out in groups: one for each layer's keys and one
for each layer's values. An empty group's slabs go back and may be cut for another format.

Two ways to size slabs: `paper`, twice the least common multiple of all formats' blocks, memory split
into pools by number of layers beforehand (FineServe, arXiv 2509.06261, and its code); and `fixed`,
2 MiB for all, whatever does not divide them left over, one pool.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from quantize.errors import UsageError

FIXED = 2 << 20
"""Bytes of a fixed slab: the page in which CUDA maps memory."""
LEFT_OVER = 0.005
"""Share of a slab that its blocks may leave unused before a larger slab is taken."""

Blocks = dict[int, list[int]]
"""Group → places of blocks in it."""


@dataclass(frozen=True)
class KvFormat:
    """How an engine keeps its cache."""

    block_bytes: int
    """One layer's keys, or values, of a block's tokens, scales counted."""
    parts: int
    """Such pieces of one block: two a layer, or one where keys and values are one (MLA)."""
    tokens: int = 16

    @property
    def token_bytes(self) -> float:
        """Bytes of one token in all layers."""
        return self.block_bytes * self.parts / self.tokens

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.tokens)


@dataclass
class _Group:
    format: KvFormat
    slabs: list[int]
    free: list[int]
    """Blocks not taken, the next one last."""
    taken: set[int]
    size: int
    queued: bool = True


@dataclass
class _Held:
    """What engines of one format hold together."""

    groups: int = 0
    blocks: int = 0
    free_blocks: int = 0
    """In groups that they hold."""
    guaranteed: int = 0
    """Groups that no other format may take."""
    partial: list[int] = field(default_factory=list)
    """Heap of groups with free blocks; full and returned ones are dropped when met."""


def _twice(places: list[int]) -> bool:
    return len(places) > 1 and len(set(places)) < len(places)


class SlabPool:
    """Slabs of one size and who holds them.

    Blocks come from the lowest group that has one free, which leaves high groups to become empty.
    `slabs_of` says where a group lies.
    """

    def __init__(self, slabs: int, slab_bytes: int) -> None:
        self.slabs, self.slab_bytes = slabs, slab_bytes
        self._free: list[int] = []
        """Slabs that came back; those from `_fresh` on were never used."""
        self._fresh = 0
        self._groups: dict[int, _Group] = {}
        self._numbers: list[int] = []
        self._held: dict[KvFormat, _Held] = {}
        self._owed = 0

    def register(self, kind: KvFormat, blocks: int = 0) -> None:
        """Let a format take slabs; `blocks` of it are guaranteed, beside what was before.

        Raises UsageError if a block is larger than a slab, or the guarantees are more than all.
        """
        if self.per_group(kind) == 0:
            reason = f"a block of {kind.block_bytes:,} bytes is larger than a slab"
            raise UsageError(f"KV slabs of {self.slab_bytes:,} bytes: {reason}")
        held = self._held.setdefault(kind, _Held())
        held.guaranteed += -(-blocks // self.per_group(kind))
        self._owed = sum(h.guaranteed * k.parts for k, h in self._held.items())
        if self._owed > self.slabs:
            reason = f"{self._owed:,} slabs are guaranteed, of {self.slabs:,}"
            raise UsageError(f"KV slabs: {reason}; place fewer engines here")

    def per_group(self, kind: KvFormat) -> int:
        """Blocks of a group."""
        return self.slab_bytes // kind.block_bytes

    @property
    def free_slabs(self) -> int:
        """Slabs that nobody holds."""
        return len(self._free) + self.slabs - self._fresh

    def available(self, kind: KvFormat) -> int:
        """Blocks that could be taken now, those promised to others left alone."""
        held = self._held[kind]
        own = max(0, held.guaranteed - held.groups) * kind.parts
        groups = (self.free_slabs - (self._owed - own)) // kind.parts
        return held.free_blocks + max(0, groups) * self.per_group(kind)

    def take(self, kind: KvFormat, count: int) -> Blocks | None:
        """Take blocks, or None and nothing taken where there are not so many."""
        if count > self.available(kind):
            return None
        held = self._held[kind]
        held.blocks += count
        taken: Blocks = {}
        while count:
            number = self._partial(held, kind)
            group = self._groups[number]
            free = group.free
            places = free[-count:]
            del free[-count:]
            group.taken.update(places)
            taken[number] = places
            held.free_blocks -= len(places)
            count -= len(places)
        return taken

    def give(self, blocks: Blocks) -> None:
        """Give blocks back. Raises ValueError, and takes none, if one of them is not taken."""
        for number, places in blocks.items():
            group = self._groups.get(number)
            if group is None or not group.taken.issuperset(places) or _twice(places):
                raise ValueError(f"not all of blocks {places} of group {number} are taken")
        for number, places in blocks.items():
            group = self._groups[number]
            held = self._held[group.format]
            group.taken.difference_update(places)
            group.free += places
            held.blocks -= len(places)
            held.free_blocks += len(places)
            if not group.taken:
                self._return(number, group, held)
            elif not group.queued:
                group.queued = True
                heapq.heappush(held.partial, number)

    def slabs_of(self, group: int) -> Sequence[int]:
        """The slabs of a group, one for each part of a block."""
        return tuple(self._groups[group].slabs)

    def held(self, kind: KvFormat) -> tuple[int, int]:
        """(bytes of the slabs that a format holds, bytes of its blocks that are taken)."""
        held = self._held[kind]
        slabs = held.groups * kind.parts * self.slab_bytes
        return slabs, held.blocks * kind.block_bytes * kind.parts

    def _partial(self, held: _Held, kind: KvFormat) -> int:
        while held.partial:
            number = held.partial[0]
            group = self._groups.get(number)
            if group is not None and group.format == kind and group.free:
                return number
            heapq.heappop(held.partial)
            if group is not None and group.format == kind:
                group.queued = False
        return self._cut(held, kind)

    def _cut(self, held: _Held, kind: KvFormat) -> int:
        number = heapq.heappop(self._numbers) if self._numbers else len(self._groups)
        size = self.per_group(kind)
        slabs = self._free[-kind.parts :]
        del self._free[-kind.parts :]
        more = kind.parts - len(slabs)
        slabs += range(self._fresh, self._fresh + more)
        self._fresh += more
        self._groups[number] = _Group(kind, slabs, list(range(size - 1, -1, -1)), set(), size)
        heapq.heappush(held.partial, number)
        if held.groups < held.guaranteed:
            self._owed -= kind.parts
        held.groups += 1
        held.free_blocks += size
        return number

    def _return(self, number: int, group: _Group, held: _Held) -> None:
        self._free += group.slabs
        del self._groups[number]
        heapq.heappush(self._numbers, number)
        held.groups -= 1
        held.free_blocks -= group.size
        if held.groups < held.guaranteed:
            self._owed += group.format.parts


@dataclass(frozen=True)
class Tenant:
    """An engine that shares memory."""

    name: str
    kind: KvFormat
    rate: float = 1.0
    """Requests a second that it is to serve."""
    guarantee: int = 0
    """Tokens that it can always hold, whatever others do; `paper` counts its own."""

    @property
    def layers(self) -> int:
        """What FineServe's pools are kept apart by: parts stand for layers."""
        return self.kind.parts


def paper_slab(kinds: Iterable[KvFormat]) -> int:
    """Bytes of FineServe's slab: 2 · lcm of the formats' blocks."""
    return 2 * math.lcm(*(kind.block_bytes for kind in kinds))


def left_over(kind: KvFormat, slab_bytes: int) -> float:
    """Share of a slab that its blocks do not fill."""
    return slab_bytes % kind.block_bytes / slab_bytes


def smallest_slab(kinds: Iterable[KvFormat], allowed: float = LEFT_OVER) -> int:
    """The smallest power of two, 64 KiB at least, of which each format leaves no more than
    `allowed` over: groups of a few slabs instead of many become empty sooner."""
    formats = list(kinds)
    size = 64 << 10
    while any(kind.block_bytes > size or left_over(kind, size) > allowed for kind in formats):
        size *= 2
    return size


def fixed_pools(
    total: int, tenants: Sequence[Tenant], slab_bytes: int = FIXED
) -> dict[str, SlabPool]:
    """One pool of fixed slabs for all. Tenant → its pool. Raises UsageError."""
    pool = SlabPool(total // slab_bytes, slab_bytes)
    for tenant in tenants:
        pool.register(tenant.kind, tenant.kind.blocks(tenant.guarantee))
    return {tenant.name: pool for tenant in tenants}


def paper_pools(
    total: int, tenants: Sequence[Tenant], batched_tokens: int = 4096
) -> dict[str, SlabPool]:
    """FineServe's pools: one for each number of layers, of a least size that `batched_tokens` of
    each of its engines fit, the rest by Σ rate · layers. Tenant → its pool.

    Raises UsageError where the least sizes are more than there is.
    """
    slab = paper_slab(tenant.kind for tenant in tenants)
    slabs = total // slab
    by_layers: dict[int, list[Tenant]] = {}
    for tenant in tenants:
        by_layers.setdefault(tenant.layers, []).append(tenant)
    least = {
        layers: layers
        * sum(
            -(-(batched_tokens // t.kind.tokens) // (slab // t.kind.block_bytes)) for t in sharing
        )
        for layers, sharing in by_layers.items()
    }
    rest = slabs - sum(least.values())
    if rest < 0:
        need = sum(least.values()) * slab
        reason = f"slabs of {slab:,} bytes need {need / 2**30:.1f} GiB at least"
        raise UsageError(f"KV slabs: {reason}, of {total / 2**30:.1f} GiB")
    weight = {n: n * sum(t.rate for t in sharing) for n, sharing in by_layers.items()}
    pools: dict[str, SlabPool] = {}
    for layers, sharing in by_layers.items():
        share = int(rest * weight[layers] / sum(weight.values()))
        pool = SlabPool(share - share % layers + least[layers], slab)
        for kind in {tenant.kind for tenant in sharing}:
            pool.register(kind)
        pools |= {tenant.name: pool for tenant in sharing}
    return pools


def static_pools(
    total: int, tenants: Sequence[Tenant], shares: Mapping[str, float] | None = None
) -> dict[str, SlabPool]:
    """A part of memory for each engine alone, by rate · bytes a token unless `shares` are given;
    a slab of one block, so that nothing but the partition is lost. Tenant → its pool."""
    weight = shares or {t.name: t.rate * t.kind.token_bytes for t in tenants}
    pools = {}
    for tenant in tenants:
        part = total * weight[tenant.name] / sum(weight.values())
        group = tenant.kind.block_bytes * tenant.kind.parts
        pool = SlabPool(int(part // group) * tenant.kind.parts, tenant.kind.block_bytes)
        pool.register(tenant.kind)
        pools[tenant.name] = pool
    return pools


def precision_pools(total: int, tenants: Sequence[Tenant]) -> dict[str, SlabPool]:
    """A part of memory for each format, which its engines share. Tenant → its pool."""
    kinds = dict.fromkeys(tenant.kind for tenant in tenants)
    weight = {k: sum(t.rate * k.token_bytes for t in tenants if t.kind == k) for k in kinds}
    alone = [Tenant(str(i), kind, weight[kind]) for i, kind in enumerate(kinds)]
    shares = {str(i): weight[kind] for i, kind in enumerate(kinds)}
    made = static_pools(total, alone, shares)
    by_kind = {kind: made[str(i)] for i, kind in enumerate(kinds)}
    return {tenant.name: by_kind[tenant.kind] for tenant in tenants}
