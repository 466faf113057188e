"""The prefix cache against one of single blocks in vLLM's queue, and what its bound does."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import UsageError
from quantize.plan.simulate.costs import StepCosts
from quantize.plan.simulate.memory import Share
from quantize.plan.simulate.prefixes import Cached, chains
from quantize.plan.simulate.requests import Requests, merged, read_trace
from quantize.plan.simulate.run import Outcome, simulate
from quantize.plan.simulate.setup import EngineSetup

B = 4
"""Tokens of a block in these tests."""


class Queue:
    """vLLM's block pool: every block by itself, those that are free in one queue from whose front they
    are taken, with the content that they still hold."""

    def __init__(self, blocks: int) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self.content: dict[int, tuple[int, ...]] = {}
        self.found: dict[tuple[int, ...], int] = {}
        self.users: dict[int, int] = {}
        self.of: dict[int, list[int]] = {}

    def _new(self) -> int:
        block, _ = self.free.popitem(last=False)
        if (key := self.content.pop(block, None)) is not None:
            del self.found[key]
        self.users[block] = 1
        return block

    def _fill(self, block: int, key: tuple[int, ...]) -> None:
        assert key not in self.found
        self.content[block], self.found[key] = key, block

    def admit(self, request: int, tokens: list[int]) -> int | None:
        """Blocks found of the prompt; None where there is no room."""
        keys = [tuple(tokens[: i + B]) for i in range(0, len(tokens) // B * B, B)]
        hits = []
        for key in keys:
            if key not in self.found:
                break
            hits.append(self.found[key])
        idle = sum(block in self.free for block in hits)
        need = -(-len(tokens) // B) - len(hits)
        if need + idle > len(self.free):
            return None
        for block in hits:
            self.free.pop(block, None)
            self.users[block] = self.users.get(block, 0) + 1
        mine = hits + [self._new() for _ in range(need)]
        for block, key in list(zip(mine, keys, strict=False))[len(hits) :]:
            self._fill(block, key)
        self.of[request] = mine
        return len(hits)

    def grow(self, request: int, tokens: list[int]) -> bool:
        """A block more where `tokens`, those of the request with its next one, need it."""
        mine = self.of[request]
        if len(tokens) > len(mine) * B:
            if not self.free:
                return False
            mine.append(self._new())
        return True

    def release(self, request: int, tokens: list[int]) -> None:
        """Let go of all blocks, the last one first; `tokens` are computed."""
        mine = self.of.pop(request)
        for i, block in enumerate(mine):
            key = tuple(tokens[: (i + 1) * B])
            if block not in self.content and len(tokens) >= (i + 1) * B:
                self._fill(block, key)
        for block in reversed(mine):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self.free[block] = None

    @property
    def taken(self) -> int:
        return len(self.users)


def conversations(draw: np.random.Generator, count: int) -> tuple[Requests, list[list[int]]]:
    """Prompts of which many begin as an earlier one does, and their tokens, all different but for
    that."""
    inputs, prefix, source, texts = [], [], [], []
    fresh = iter(range(10**6))
    for i in range(count):
        parent = int(draw.integers(i)) if i and draw.random() < 0.75 else -1
        kept = int(draw.integers(1, inputs[parent] + 1)) if parent >= 0 else 0
        text = (texts[parent][:kept] if kept else []) + [
            next(fresh) for _ in range(int(draw.integers(0 if kept else 1, 22)))
        ]
        inputs.append(len(text)), prefix.append(kept), source.append(parent), texts.append(text)
    zeros = np.zeros(count, dtype=np.int64)
    columns = (np.array(inputs), zeros + 1, np.array(prefix), zeros, np.array(source))
    return Requests(np.arange(count, dtype=float), *columns), texts


@given(seed=st.integers(0, 10**6))
def test_pieces_are_blocks_one_by_one(seed: int):
    """Prompts come, all running requests get tokens, some end or are thrown out and come again: the
    same room, the same hits, the same blocks in use as with every block by itself."""
    draw = np.random.default_rng(seed)
    asked, texts = conversations(draw, 30)
    size = int(draw.integers(8, 60))
    ours, theirs = Cached(size, chains(asked, B), B), Queue(size)
    coming, step = list(range(30)), 1
    running: dict[int, list[int]] = {}
    fresh = iter(range(10**6, 10**7))
    said: dict[int, list[int]] = {}
    hits = 0
    for _ in range(90):
        if coming and draw.random() < 0.6:
            request = coming[0]
            tokens = texts[request] + said.get(request, [])
            found = theirs.admit(request, tokens)
            assert ours.admit(request, len(tokens), step) == (found is not None)
            if found is not None:
                assert ours.known(request) == min(found, (len(tokens) - 1) // B) * B
                hits += found
                ours.decode(request, len(tokens), step)
                running[request] = tokens
                coming.pop(0)
            elif not running:
                coming.pop(0)  # never fits
        elif running and draw.random() < 0.5:
            if ours.run(step, 1):
                for request, tokens in running.items():
                    tokens.append(next(fresh))
                    assert theirs.grow(request, tokens)
                ours.grow(step, 1)
                step += 1
            else:
                free = theirs.free
                wanting = sum(len(t) % B == 0 for t in running.values())
                assert wanting > len(free)
                draw_out(draw, ours, theirs, running, coming, said, texts, step, back=True)
        elif running:
            back = bool(draw.random() < 0.3)
            draw_out(draw, ours, theirs, running, coming, said, texts, step, back)
        assert ours.taken(step) == theirs.taken
        held = sum(block in theirs.content for block in theirs.free)
        assert ours.idle_blocks >= held
        assert ours.taken(step) <= size


def draw_out(draw, ours, theirs, running, coming, said, texts, step, back) -> None:
    """One running request ends, or is thrown out and waits again."""
    request = list(running)[int(draw.integers(len(running)))]
    tokens = running.pop(request)
    # One that does not come again leaves the same, whether that is told or not.
    ours.release(request, step, len(tokens) if back or draw.random() < 0.5 else None)
    theirs.release(request, tokens)
    if back:
        said[request] = tokens[len(texts[request]) :]
        coming.insert(0, request)


COSTS = StepCosts([5e-3], kv=2e-8, token=1e-5, host=1e-3)


def replayed(asked: Requests, blocks: int, cached: bool = True) -> Outcome:
    made = chains(asked, 16)
    memory = Cached(blocks, made) if cached else Share(blocks)
    done = simulate(asked, [(EngineSetup(COSTS), memory)])
    assert memory.held() == (0, 0)
    return done


def turns() -> Requests:
    """Twenty users whose prompts grow by what was said before, one after the other."""
    draw = np.random.default_rng(5)
    inputs = np.concatenate([np.full(20, 400 * k) + draw.integers(0, 90, 20) for k in range(1, 9)])
    source = np.arange(160) - 20
    prefix = np.where(source >= 0, inputs[np.maximum(source, 0)], 0)
    arrival = np.cumsum(draw.exponential(0.2, 160))
    zeros = np.zeros(160, dtype=np.int64)
    return Requests(arrival, inputs, zeros + 30, prefix, zeros, np.maximum(source, -1))


def test_a_larger_cache_finds_more():
    waits = [float(replayed(turns(), n).ttft.mean()) for n in (250, 1200, 2500, 100_000)]
    none = float(replayed(turns(), 100_000, cached=False).ttft.mean())
    assert waits[1] > waits[2] > waits[3]
    assert waits[3] < 0.5 * none
    alone = replayed(turns(), 250, cached=False).ttft.mean()
    assert waits[0] == pytest.approx(alone, rel=0.15)  # all is gone before it comes again


def test_whose_prefix_it_is_is_guessed_where_it_was_not_told():
    zeros = np.zeros(4, dtype=np.int64)
    asked = Requests(
        np.arange(4.0), np.array([40, 100, 60, 80]), zeros + 1, np.array([0, 0, 50, 70]), zeros
    )
    assert asked.sources.tolist() == [-1, -1, 1, 1]
    both = merged([asked, asked.for_model(1)])
    assert both.sources.tolist() == [-1, -1, -1, -1, 2, 3, 2, 3]
    made = chains(asked, 16)
    assert made.full == [2, 6, 3, 5]
    assert [sum(made.blocks[piece] for piece in chain) for chain in made.pieces] == made.full
    first = [chain[0] for chain in made.pieces]
    assert first[1] == first[2] == first[3] != first[0]


def test_mooncakes_own_lines_are_read(tmp_path: Path):
    rows = [(0, 1100, 5, [1, 2, 3]), (2000, 600, 7, [1, 9]), (1000, 1300, 1, [1, 2, 8])]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path = tmp_path / "trace.jsonl"
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_trace(path)
    assert found.arrival.tolist() == [0.0, 1.0, 2.0]
    assert found.prefix.tolist() == [0, 1024, 512]
    assert found.sources.tolist() == [-1, 0, 1]
    path.write_text(lines[0] + '\n{"timestamp": 3}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="line 2: 'hash_ids'; a line must be a JSON object with"):
        read_trace(path)
