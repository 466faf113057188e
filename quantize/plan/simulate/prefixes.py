"""A prefix cache with a bound: blocks of answered requests stay until memory is wanted, as in vLLM 0.32.

Blocks that nobody uses stand in a queue in the order in which they were let go, of one request the
last block first, and new blocks are taken from its front. A prompt takes what leading blocks of it
are still there. Here runs of blocks that are always used together are one piece, so that a request
is a few pieces and not hundreds of blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.plan.simulate.memory import Share
from quantize.plan.simulate.requests import Requests


@dataclass(frozen=True)
class Chains:
    """The full blocks of every prompt, as pieces that are numbered from 0."""

    pieces: Sequence[tuple[int, ...]]
    """Of each prompt, from its start."""
    blocks: Sequence[int]
    """Of each piece."""
    full: Sequence[int]
    """Of each prompt, together."""


def chains(requests: Requests, block_tokens: int) -> Chains:
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
    blocks: list[int] = []
    made: list[tuple[int, ...]] = []
    for path in paths:
        pieces = []
        for owner, start, end in path:
            inside = sorted(cut for cut in cuts.get(owner, ()) if start < cut < end)
            for first, last in zip([start, *inside], [*inside, end], strict=True):
                number = numbers.setdefault((owner, first), len(blocks))
                if number == len(blocks):
                    blocks.append(last - first)
                pieces.append(number)
        made.append(tuple(pieces))
    return Chains(made, blocks, [tokens // block_tokens for tokens in inputs])


class Cached(Share):
    """A share of blocks in which what requests leave behind is found again.

    Of a request the blocks of its prompt are pieces of its chain, those of its answer a piece of its
    own (it comes again where the request was thrown out), and a block that is not full is of no use to
    anybody: it waits in the queue for its turn all the same, as vLLM lets it. A prompt counts as
    there from its admission on, also while it is computed in chunks.
    """

    def __init__(
        self, blocks: int, chained: Chains, block_tokens: int = 16, extra: int = 0
    ) -> None:
        super().__init__(blocks, block_tokens, extra)
        self._pieces, self._full = chained.pieces, chained.full
        self._size = list(chained.blocks)
        """Blocks of each piece: those of `chained`, an answer for each request, and, as they are let go,
        blocks that are not full, which nobody asks for again."""
        self._answers = len(self._size)
        """The piece of the first request's answer."""
        self._size += [0] * len(self._full)
        self._kept = [0] * len(self._size)
        """Leading blocks of each piece that are in memory."""
        self._users = [0] * len(self._size)
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pieces that nobody uses, those first that are taken next."""
        self.idle_blocks = 0
        """Of those pieces."""
        self._known: dict[int, int] = {}

    def known(self, request: int) -> int:
        """Leading tokens of an admitted request that were there, all but the last one at most."""
        return self._known[request]

    def admit(self, request: int, tokens: int, step: int) -> bool:
        """See `Memory`."""
        if self.idle_blocks:
            self._make_room(step)
        size, kept, users, idle = self._size, self._kept, self._users, self._idle
        pieces, full, b = self._pieces[request], self._full[request], self.block_tokens
        all_full = tokens // b
        if all_full > full:  # thrown out before: what it has said is part of its prompt
            answer = self._answers + request
            size[answer] = all_full - full
            pieces = (*pieces, answer)
        own = -(-tokens // b) + self.extra - all_full
        taken = own
        for piece in pieces:
            if not users[piece]:
                taken += size[piece]
        if not self.fits(step, taken):
            return False
        found, whole = 0, True
        for piece in pieces:
            n, there = size[piece], kept[piece]
            if not users[piece] and there:
                del idle[piece]
                self.idle_blocks -= there
            if whole:
                found += there if there < n else n
                whole = there >= n
            users[piece] += 1
            kept[piece] = n
        self.base += taken
        self._of[request] = own
        self._known[request] = min(found, (tokens - 1) // b) * b
        return True

    def release(self, request: int, step: int = 0, computed: int | None = None) -> None:
        """See `Memory`."""
        users, size = self._users, self._size
        del self._known[request]
        own = self._of[request]
        if (phase := self._phase.get(request)) is not None:
            own += (phase + step - 1) // self.block_tokens
        super().release(request)
        answer = self._answers + request
        if users[answer]:
            users[answer] = 0
            self.base -= size[answer]
            own += size[answer]
        if computed is not None:
            self._leave(request, own, computed // self.block_tokens)
            return
        if own:  # nobody asks for its answer again
            self._let_go_useless(own)
        idle = self._idle
        for piece in reversed(self._pieces[request]):
            users[piece] -= 1
            if not users[piece]:
                idle[piece] = None
                self.idle_blocks += size[piece]
                self.base -= size[piece]

    def _leave(self, request: int, own: int, full: int) -> None:
        """Let go of one that comes again, of which so many full blocks are computed."""
        kept, users, size = self._kept, self._users, self._size
        answer, at = self._answers + request, self._full[request]
        said = max(0, full - at)
        if own > said:
            self._let_go_useless(own - said)
        if said:
            self._let_go(answer, said)
        for piece in reversed(self._pieces[request]):
            n = size[piece]
            at -= n
            users[piece] -= 1
            if users[piece]:
                continue
            self.base -= n
            there = min(n, max(0, full - at))
            kept[piece] = 0
            if there < n:
                self._let_go_useless(n - there)
            if there:
                self._let_go(piece, there)

    def _let_go_useless(self, blocks: int) -> None:
        piece = len(self._kept)
        self._kept.append(blocks)
        self._idle[piece] = None
        self.idle_blocks += blocks

    def _let_go(self, piece: int, blocks: int) -> None:
        self._kept[piece] = blocks
        self._idle[piece] = None
        self.idle_blocks += blocks

    def _make_room(self, step: int) -> None:
        """Take from the queue what admitted requests and the steps before `step` have taken of it.

        This is soon enough before the next admission: until then blocks come to the queue's end alone.
        """
        room = self.blocks - self.base - self.idle_blocks
        if (self._sum + self._decoding * (step - 1)) // self.block_tokens <= room:
            return
        over = self.taken(step) + self.idle_blocks - self.blocks
        if over <= 0:
            return
        kept, idle = self._kept, self._idle
        self.idle_blocks -= over
        while over > 0:
            piece, _ = idle.popitem(last=False)
            there = kept[piece]
            if there > over:  # its last blocks go first
                kept[piece] = there - over
                idle[piece] = None
                idle.move_to_end(piece, last=False)
                return
            over -= there
            kept[piece] = 0
