"""KV memory as an engine sees it: a fixed share, where blocks are counted, or slabs with others.

A sequence of c tokens holds ⌈c/b⌉ blocks. Sequences that take their next block in the same step stand
in one of b phases, so the blocks that k steps take are known without a look at each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quantize.plan.slabs import Blocks, KvFormat, SlabPool


class Memory(Protocol):
    """What an engine asks of its memory."""

    block_tokens: int
    longest_run: int
    """Steps that may be decided at once."""
    pools: tuple[SlabPool, ...]
    """Shared with other engines."""

    def could_hold(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits, if it is alone."""

    def admit(self, request: int, tokens: int, step: int) -> bool:
        """Take the blocks of a prompt, if the step before `step`, which is still to grow, leaves
        them free."""

    def decode(self, request: int, tokens: int, step: int) -> None:
        """An admitted request that holds `tokens` takes one more in each step from `step` on."""

    def run(self, step: int, steps: int) -> int:
        """How many of so many steps there is memory for."""

    def grow(self, step: int, steps: int) -> None:
        """Take the blocks of so many steps."""

    def shrink(self, step: int, kept: int, steps: int) -> None:
        """Give back those of all but the first `kept` steps."""

    def release(self, request: int, step: int = 0, computed: int | None = None) -> None:
        """Give back all of a request. step: that runs next; computed: tokens whose keys and values are
        there, of one that is thrown out and comes again; None: it is answered."""

    def held(self) -> tuple[float, float]:
        """(bytes or blocks in use, of `capacity`; those of them that blocks of requests lie on)."""

    @property
    def capacity(self) -> float:
        """All there is."""


class Share:
    """A fixed number of blocks that one engine has for itself.

    A sequence that began to decode in step f with t tokens has, after the steps before s,
    ⌈t/b⌉ − ⌊(p + f − 1)/b⌋ + ⌊(p + s − 1)/b⌋ blocks, p = (t − f) mod b its phase. All but the last
    term stands in `base`; the last ones are bounded by that of their sum, and counted by phase only
    where the bound is above what there is.

    extra: blocks that every sequence takes beside those of its tokens, for layers with a window.
    """

    longest_run = 1 << 60
    pools: tuple[SlabPool, ...] = ()

    def __init__(self, blocks: int, block_tokens: int = 16, extra: int = 0) -> None:
        self.blocks, self.block_tokens, self.extra = blocks, block_tokens, extra
        self.base = 0
        self._of: dict[int, int] = {}
        """What a request has in `base`."""
        self._phase: dict[int, int] = {}
        """Of a decoding request."""
        self._counts = [0] * block_tokens
        self._sum = self._decoding = self._step = 0

    def taken(self, step: int) -> int:
        """Blocks in use when all steps before `step` are done or under way."""
        whole, part = divmod(step - 1, self.block_tokens)
        # ⌊(p + s)/b⌋ is ⌊s/b⌋, and one more in the phases that pass a boundary in s mod b steps.
        passed = sum(self._counts[-part:]) if part else 0
        return self.base + whole * self._decoding + passed

    def fits(self, step: int, more: int = 0) -> bool:
        """Whether the steps before `step` can be done, and `more` blocks taken."""
        bound = (self._sum + self._decoding * (step - 1)) // self.block_tokens
        room = self.blocks - self.base - more
        return bound <= room or self.taken(step) + more <= self.blocks

    def could_hold(self, tokens: int) -> bool:
        """See `Memory`."""
        return -(-tokens // self.block_tokens) + self.extra <= self.blocks

    def admit(self, request: int, tokens: int, step: int) -> bool:
        """See `Memory`."""
        blocks = -(-tokens // self.block_tokens) + self.extra
        if not self.fits(step, blocks):
            return False
        self.base += blocks
        self._of[request] = blocks
        return True

    def decode(self, request: int, tokens: int, step: int) -> None:
        """See `Memory`."""
        b = self.block_tokens
        self._phase[request] = phase = (tokens - step) % b
        before = (phase + step - 1) // b
        self.base -= before
        self._of[request] -= before
        self._counts[phase] += 1
        self._sum += phase
        self._decoding += 1

    def run(self, step: int, steps: int) -> int:
        """See `Memory`."""
        self._step = step
        after = (self._sum + self._decoding * (step + steps - 1)) // self.block_tokens
        if after <= self.blocks - self.base or self.fits(step + steps):
            return steps
        low, high = 0, steps  # the largest number of steps whose blocks are free
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(step + middle) else (low, middle)
        return low

    def grow(self, step: int, steps: int) -> None:
        """Nothing to do: what is taken follows from the step."""

    def shrink(self, step: int, kept: int, steps: int) -> None:
        """Nothing to do, as for `grow`."""

    def release(self, request: int, step: int = 0, computed: int | None = None) -> None:
        """See `Memory`."""
        self.base -= self._of.pop(request)
        phase = self._phase.pop(request, None)
        if phase is not None:
            self._counts[phase] -= 1
            self._sum -= phase
            self._decoding -= 1

    def held(self) -> tuple[float, float]:
        """Blocks, twice."""
        taken = self.taken(self._step)
        return taken, taken

    @property
    def capacity(self) -> float:
        """Blocks."""
        return self.blocks


class Slabs:
    """Blocks of slabs that several engines share; each sequence knows which are its own."""

    def __init__(self, pool: SlabPool, kind: KvFormat, extra: int = 0) -> None:
        self.pool, self.kind, self.extra = pool, kind, extra
        self.pools: tuple[SlabPool, ...] = (pool,)
        self.block_tokens = kind.tokens
        self.longest_run = kind.tokens
        """So that no blocks are taken long before they are used, while others want them."""
        self._of: dict[int, Blocks] = {}
        self._phase: dict[int, int] = {}
        self._phases: list[dict[int, None]] = [{} for _ in range(kind.tokens)]
        self._grown: list[tuple[int, int, int]] = []
        """(request, group, place) of what the steps that run take, in their order."""

    def could_hold(self, tokens: int) -> bool:
        """See `Memory`."""
        groups = self.pool.slabs // self.kind.parts
        return self.kind.blocks(tokens) + self.extra <= groups * self.pool.per_group(self.kind)

    def admit(self, request: int, tokens: int, step: int) -> bool:
        """See `Memory`."""
        need = self.kind.blocks(tokens) + self.extra
        if need + len(self._phases[-(step - 1) % self.block_tokens]) > self.pool.available(
            self.kind
        ):
            return False
        taken = self.pool.take(self.kind, need)
        if taken is None:
            return False
        self._of[request] = taken
        return True

    def decode(self, request: int, tokens: int, step: int) -> None:
        """See `Memory`."""
        phase = (tokens - step) % self.block_tokens
        self._phase[request] = phase
        self._phases[phase][request] = None

    def run(self, step: int, steps: int) -> int:
        """See `Memory`."""
        free, b = self.pool.available(self.kind), self.block_tokens
        for k in range(steps):
            free -= len(self._phases[-(step + k) % b])
            if free < 0:
                return k
        return steps

    def grow(self, step: int, steps: int) -> None:
        """See `Memory`."""
        b, phases = self.block_tokens, self._phases
        who = [request for k in range(step, step + steps) for request in phases[-k % b]]
        self._grown = []
        if not who:
            return
        taken = self.pool.take(self.kind, len(who))
        if taken is None:
            raise RuntimeError("steps were decided for which there is no memory")
        where = ((group, place) for group, places in taken.items() for place in places)
        for request, (group, place) in zip(who, where, strict=True):
            self._of[request].setdefault(group, []).append(place)
            self._grown.append((request, group, place))

    def shrink(self, step: int, kept: int, steps: int) -> None:
        """See `Memory`."""
        b = self.block_tokens
        stay = sum(len(self._phases[-k % b]) for k in range(step, step + kept))
        back: Blocks = {}
        for request, group, place in reversed(self._grown[stay:]):
            own = self._of[request][group]
            own.remove(place)
            if not own:
                del self._of[request][group]
            back.setdefault(group, []).append(place)
        self.pool.give(back)
        del self._grown[stay:]

    def release(self, request: int, step: int = 0, computed: int | None = None) -> None:
        """See `Memory`."""
        self.pool.give(self._of.pop(request))
        phase = self._phase.pop(request, None)
        if phase is not None:
            del self._phases[phase][request]

    def held(self) -> tuple[float, float]:
        """Bytes: of the slabs that its format holds, and of its blocks that are taken."""
        return self.pool.held(self.kind)

    @property
    def capacity(self) -> float:
        """Bytes of the pool."""
        return self.pool.slabs * self.pool.slab_bytes


class Everywhere:
    """Slabs on several GPUs that a replica runs on together and shares with different engines."""

    def __init__(self, parts: Sequence[Slabs]) -> None:
        self.parts = tuple(parts)
        self.pools: tuple[SlabPool, ...] = tuple(part.pool for part in parts)
        self.block_tokens, self.longest_run = parts[0].block_tokens, parts[0].longest_run

    def could_hold(self, tokens: int) -> bool:
        """See `Memory`."""
        return all(part.could_hold(tokens) for part in self.parts)

    def admit(self, request: int, tokens: int, step: int) -> bool:
        """See `Memory`."""
        for i, part in enumerate(self.parts):
            if not part.admit(request, tokens, step):
                for done in self.parts[:i]:
                    done.release(request)
                return False
        return True

    def decode(self, request: int, tokens: int, step: int) -> None:
        """See `Memory`."""
        for part in self.parts:
            part.decode(request, tokens, step)

    def run(self, step: int, steps: int) -> int:
        """See `Memory`."""
        return min(part.run(step, steps) for part in self.parts)

    def grow(self, step: int, steps: int) -> None:
        """See `Memory`."""
        for part in self.parts:
            part.grow(step, steps)

    def shrink(self, step: int, kept: int, steps: int) -> None:
        """See `Memory`."""
        for part in self.parts:
            part.shrink(step, kept, steps)

    def release(self, request: int, step: int = 0, computed: int | None = None) -> None:
        """See `Memory`."""
        for part in self.parts:
            part.release(request)

    def held(self) -> tuple[float, float]:
        """Of the GPUs that hold most."""
        used, live = zip(*(part.held() for part in self.parts), strict=True)
        return max(used), max(live)

    @property
    def capacity(self) -> float:
        """Of the smallest pool."""
        return min(part.capacity for part in self.parts)
