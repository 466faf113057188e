"""A prefix cache with a bound: blocks of answered requests stay until memory is wanted, as in vLLM 0.32.

Blocks that nobody uses stand in a queue in the order in which they were let go, of one request the
last block first, and new blocks are taken from its front. A prompt takes what leading blocks of it
are still there. Here runs of blocks that are always used together are one piece, so that a request
is a few pieces and not hundreds of blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from quantize.plan.simulate.memory import Share
from quantize.plan.simulate.requests import Requests

Chain = tuple[tuple[int, int], ...]
"""(piece, its blocks) of one prompt, from its start."""


def chains(requests: Requests, block_tokens: int) -> list[Chain]:
    """The full blocks of every prompt in pieces. Prompts that begin alike, as `source` and `prefix`
    of the requests say, begin with the same pieces, and no prompt ends within a piece of another.

    A piece is called by the request that it first stood in and the block that it began with.
    """
    inputs, prefix = requests.input.tolist(), requests.prefix.tolist()
    source = requests.sources.tolist()
    paths: list[list[tuple[int, int, int]]] = []
    cuts: dict[int, set[int]] = {}
    for i, tokens in enumerate(inputs):
        path, at = [], 0
        if source[i] >= 0:
            shared = min(prefix[i], tokens) // block_tokens
            for owner, start, end in paths[source[i]]:
                if start >= shared:
                    break
                at = min(end, shared)
                path.append((owner, start, at))
                if at < end:
                    cuts.setdefault(owner, set()).add(at)
        if (full := tokens // block_tokens) > at:
            path.append((i, at, full))
        paths.append(path)
    numbers: dict[tuple[int, int], int] = {}
    made: list[Chain] = []
    for path in paths:
        pieces = []
        for owner, start, end in path:
            inside = sorted(cut for cut in cuts.get(owner, ()) if start < cut < end)
            for first, last in zip([start, *inside], [*inside, end], strict=True):
                number = numbers.setdefault((owner, first), len(numbers))
                pieces.append((number, last - first))
        made.append(tuple(pieces))
    return made


class Cached(Share):
    """A share of blocks in which what requests leave behind is found again.

    Of a request the blocks of its prompt are pieces of its chain, those of its answer a piece of its
    own (it comes again where the request was thrown out), and a block that is not full is of no use to
    anybody: it waits in the queue for its turn all the same, as vLLM lets it. A prompt counts as
    there from its admission on, also while it is computed in chunks.
    """

    def __init__(
        self, blocks: int, chained: Sequence[Chain], block_tokens: int = 16, extra: int = 0
    ) -> None:
        super().__init__(blocks, block_tokens, extra)
        self._chains = chained
        self._kept: dict[int, int] = {}
        """Piece → leading blocks of it that are in memory."""
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pieces that nobody uses, those first that are taken next."""
        self.idle_blocks = 0
        """Of those pieces."""
        self._chain_of: dict[int, list[tuple[int, int]]] = {}
        self._known: dict[int, int] = {}
        self._useless = 1 << 60
        """Last name of blocks that are not full; above those of all pieces."""

    def known(self, request: int) -> int:
        """Leading tokens of an admitted request that were there, all but the last one at most."""
        return self._known[request]

    def admit(self, request: int, tokens: int, step: int) -> bool:
        """See `Memory`."""
        self._make_room(step)
        b, users = self.block_tokens, self._users
        chain = list(self._chains[request])
        full = sum(n for _, n in chain)
        if (said := tokens // b - full) > 0:  # thrown out before
            chain.append((~request, said))
            full += said
        own = -(-tokens // b) + self.extra - full
        taken = own + sum(n for piece, n in chain if not users.get(piece))
        if not self.fits(step, taken):
            return False
        found, whole = 0, True
        for piece, n in chain:
            count = users.get(piece, 0)
            kept = self._kept.get(piece, 0)
            if not count and piece in self._idle:
                del self._idle[piece]
                self.idle_blocks -= kept
            if whole:
                found += min(kept, n)
                whole = kept >= n
            users[piece] = count + 1
            self._kept[piece] = n
        self.base += taken
        self._of[request] = own
        self._chain_of[request] = chain
        self._known[request] = min(found, (tokens - 1) // b) * b
        self._make_room(step)
        return True

    def release(self, request: int, step: int = 0, computed: int = 0) -> None:
        """See `Memory`."""
        self._make_room(step)
        b = self.block_tokens
        chain = self._chain_of.pop(request)
        del self._known[request]
        own = self._of[request]
        if (begun := self._phase.get(request)) is not None:
            own += (begun[0] + step - 1) // b - begun[1]
        super().release(request)
        if chain and chain[-1][0] == ~request:
            n = chain.pop()[1]
            del self._users[~request], self._kept[~request]
            self.base -= n
            own += n
        full, at = computed // b, sum(n for _, n in chain)
        said = max(0, full - at)
        if own > said:
            self._let_go_useless(own - said)
        if said:
            self._let_go(~request, said)
        for piece, n in reversed(chain):
            at -= n
            self._users[piece] -= 1
            if self._users[piece]:
                continue
            del self._users[piece], self._kept[piece]
            self.base -= n
            kept = min(n, max(0, full - at))
            if kept < n:
                self._let_go_useless(n - kept)
            if kept:
                self._let_go(piece, kept)

    def _let_go_useless(self, blocks: int) -> None:
        self._useless += 1
        self._let_go(self._useless, blocks)

    def _let_go(self, piece: int, blocks: int) -> None:
        self._kept[piece] = blocks
        self._idle[piece] = None
        self.idle_blocks += blocks

    def _make_room(self, step: int) -> None:
        """Take from the queue what the steps before `step` take of it."""
        if not self.idle_blocks:
            return
        room = self.blocks - self.base - self.idle_blocks
        if (self._sum + self._decoding * (step - 1)) // self.block_tokens <= room:
            return
        over = self.taken(step) + self.idle_blocks - self.blocks
        while over > 0:
            piece = next(iter(self._idle))
            kept = self._kept[piece]
            gone = min(kept, over)
            over -= gone
            self.idle_blocks -= gone
            if gone == kept:
                del self._idle[piece], self._kept[piece]
            else:
                self._kept[piece] = kept - gone  # its last blocks went first
