"""Slabs against a brute-force twin, and the sizes FineServe's least common multiple leads to."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.errors import UsageError
from quantize.plan.slabs import (
    FIXED,
    KvFormat,
    SlabPool,
    Tenant,
    fixed_pools,
    left_over,
    paper_pools,
    paper_slab,
    precision_pools,
    smallest_slab,
    static_pools,
)

KIB = 1024
BF16, FP8, INT4 = (KvFormat(int(kib * KIB), 64) for kib in (32, 16, 8.25))
PACKED = KvFormat(int(8.5 * KIB), 64)


class Twin:
    """Every byte of every slab is an entry in a table: which block lies on it."""

    def __init__(self, slabs: int, slab_bytes: int) -> None:
        self.slabs, self.slab_bytes = slabs, slab_bytes
        self.owner: dict[tuple[int, int], tuple[int, int]] = {}

    def put(self, pool: SlabPool, kind: KvFormat, group: int, place: int) -> None:
        for slab in pool.slabs_of(group):
            assert 0 <= slab < self.slabs
            for byte in range(place * kind.block_bytes, (place + 1) * kind.block_bytes):
                assert byte < self.slab_bytes
                assert (slab, byte) not in self.owner, "used twice"
                self.owner[slab, byte] = (group, place)

    def take_out(self, group: int, place: int) -> None:
        self.owner = {key: who for key, who in self.owner.items() if who != (group, place)}


KINDS = (KvFormat(2, 1), KvFormat(3, 2), KvFormat(5, 3), KvFormat(3, 1))


@given(st.integers(1, 9), st.integers(0, 10**9), st.lists(st.integers(0, 3), max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_byte_is_used_twice_and_none_is_lost(slabs: int, seed: int, promised: list[int]):
    rng = random.Random(seed)
    pool, twin = SlabPool(slabs, 7), Twin(slabs, 7)
    kinds = []
    for kind, blocks in zip(KINDS, [*promised, 0, 0, 0, 0], strict=False):
        try:
            pool.register(kind, blocks)
        except UsageError:
            return
        kinds.append(kind)
    held: list[tuple[KvFormat, dict[int, list[int]]]] = []
    for _ in range(40):
        if held and rng.random() < 0.45:
            kind, blocks = held.pop(rng.randrange(len(held)))
            pool.give(blocks)
            for group, places in blocks.items():
                for place in places:
                    twin.take_out(group, place)
        else:
            kind = rng.choice(kinds)
            count, room = rng.randint(1, 5), pool.available(kind)
            taken = pool.take(kind, count)
            assert (taken is not None) == (count <= room)
            if taken is None:
                continue
            assert sum(map(len, taken.values())) == count
            for group, places in taken.items():
                for place in places:
                    twin.put(pool, kind, group, place)
            held.append((kind, taken))
        used = {slab for slab, _ in twin.owner}
        groups = {(kind.parts, g) for kind, blocks in held for g in blocks}
        assert pool.free_slabs == slabs - len(used) == slabs - sum(n for n, _ in groups)
    for _, blocks in held:
        pool.give(blocks)
    assert pool.free_slabs == slabs


def test_slab_0_is_a_slab_like_the_others():
    """FineServe asks `if not slab_id` and takes a new slab where slab 0 has blocks left."""
    pool = SlabPool(1, 4)
    pool.register(KvFormat(1, 1))
    got = [pool.take(KvFormat(1, 1), 1) for _ in range(4)]
    assert got == [{0: [0]}, {0: [1]}, {0: [2]}, {0: [3]}]
    assert pool.take(KvFormat(1, 1), 1) is None
    pool.give({0: [0]})
    assert pool.take(KvFormat(1, 1), 1) == {0: [0]}


def test_an_empty_slab_is_cut_for_another_format():
    pool = SlabPool(2, 6)
    small, large = KvFormat(2, 1), KvFormat(3, 2)
    pool.register(small)
    pool.register(large)
    first, second = pool.take(small, 3), pool.take(small, 1)
    assert pool.available(large) == 0
    pool.give(first or {})
    assert pool.available(large) == 0  # it needs both slabs
    pool.give(second or {})
    assert pool.available(large) == 2


def test_what_is_guaranteed_stays():
    pool = SlabPool(10, 4)
    greedy, quiet = KvFormat(1, 1), KvFormat(2, 1)
    pool.register(greedy)
    pool.register(quiet, blocks=5)  # three slabs of two blocks
    assert pool.available(greedy) == 28
    assert pool.take(greedy, 29) is None
    pool.take(greedy, 28)
    mine = pool.take(quiet, 5)
    assert mine is not None
    assert pool.available(greedy) == 0
    pool.give(mine)
    assert pool.available(greedy) == 0
    with pytest.raises(UsageError, match="guaranteed"):
        pool.register(quiet, blocks=20)


def test_what_is_not_taken_cannot_be_given():
    pool = SlabPool(4, 4)
    pool.register(KvFormat(1, 1))
    taken = pool.take(KvFormat(1, 1), 2)
    assert taken is not None
    for wrong in ({0: [2]}, {7: [0]}, {0: [0, 0]}):
        with pytest.raises(ValueError, match="taken"):
            pool.give(wrong)
    pool.give(taken)
    with pytest.raises(ValueError, match="taken"):
        pool.give(taken)


def test_the_least_common_multiple_grows_out_of_hand():
    plain = KvFormat(8 * KIB, 64)
    assert paper_slab([BF16, FP8, plain]) == 2 * 32 * KIB
    assert paper_slab([BF16, FP8, INT4]) == 2 * 1056 * KIB
    assert paper_slab([BF16, FP8, INT4, PACKED]) == 2 * 17952 * KIB
    # FineServe's own escape: INT4 in blocks of 64 tokens, 4 bytes a token and head.
    assert paper_slab([BF16, FP8, KvFormat(34 * KIB, 64, 64)]) == 2 * 544 * KIB
    assert left_over(INT4, FIXED) == pytest.approx(0.0010, abs=5e-5)
    assert left_over(PACKED, FIXED) == pytest.approx(0.0039, abs=5e-5)
    # An eighth of the size wastes no more.
    size = smallest_slab([BF16, FP8, INT4, PACKED])
    assert size == 256 * KIB
    assert left_over(PACKED, size) == left_over(PACKED, FIXED)


def tenants() -> list[Tenant]:
    return [
        Tenant("bf16", BF16, 3.0, 4096),
        Tenant("fp8", FP8, 2.0, 4096),
        Tenant("int4", INT4, 1.0, 4096),
        Tenant("large", KvFormat(16 * KIB, 160), 1.0, 4096),
    ]


@pytest.mark.parametrize("pools", [fixed_pools, paper_pools, static_pools, precision_pools])
def test_pools_hold_no_more_than_there_is(pools):
    total = 32 << 30
    made = pools(total, tenants())
    distinct = {id(pool): pool for pool in made.values()}.values()
    size = sum(pool.slabs * pool.slab_bytes for pool in distinct)
    assert 0.98 * total < size <= total
    for tenant in tenants():
        taken = made[tenant.name].take(tenant.kind, tenant.kind.blocks(4096))
        assert taken is not None, tenant.name


def test_too_small_a_memory_says_so():
    with pytest.raises(UsageError, match=r"at least, of 1\.0 GiB"):
        paper_pools(1 << 30, [*tenants(), Tenant("packed", PACKED, 1.0)])
    with pytest.raises(UsageError, match="larger than a slab"):
        fixed_pools(1 << 30, [Tenant("huge", KvFormat(FIXED + 1, 2))])
