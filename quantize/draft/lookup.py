"""The draft that costs nothing: what followed the last n-gram where it stood before (prompt lookup).

It has no distribution: a token is accepted where it is what the parent writes, at every temperature
(with q = 1 at one token, min(1, p/q) is its p).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantize.draft.replay import Replay
from quantize.draft.rollout import Rollout

NGRAM = 2
"""Longest n-gram looked for, then the shorter ones: transformers' default."""


def candidates(text: Sequence[int], count: int, ngram: int = NGRAM) -> list[int]:
    """Up to `count` tokens that followed the first place where the last `ngram` tokens (else fewer)
    of `text` stand, as transformers' prompt lookup takes them; none where they stand nowhere else."""
    for size in range(min(ngram, len(text) - 1), 0, -1):
        tail = list(text[-size:])
        for at in range(len(text) - size):
            if list(text[at : at + size]) == tail:
                return list(text[at + size : at + size + count])
    return []


def replay_lookup(rollout: Rollout, gamma: int, ngram: int = NGRAM) -> Replay:
    """Replay prompt lookup on the parent's texts."""
    tokens, steps, drafted = (np.zeros(len(rollout.tokens)) for _ in range(3))
    for number, (prompt, written) in enumerate(zip(rollout.prompts, rollout.tokens, strict=True)):
        index = _Index(ngram)
        text: list[int] = []
        for token in prompt.ids:
            text.append(token)
            index.add(text)
        done = 0
        while done < len(written):
            left = len(written) - done
            proposed = index.find(text, min(gamma, left - 1))
            matched = 0
            while matched < len(proposed) and proposed[matched] == written[done + matched]:
                matched += 1
            steps[number] += 1
            drafted[number] += len(proposed)
            for token in written[done : done + matched + 1]:
                text.append(token)
                index.add(text)
            done += min(matched + 1, left)
        tokens[number] = len(written)
    return Replay(tokens, steps, drafted, gamma)


class _Index:
    """`candidates` without a search: where each n-gram stood first."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.first: dict[tuple[int, ...], int] = {}

    def add(self, text: Sequence[int]) -> None:
        """Take note of the n-grams that end with the last token."""
        for size in range(1, min(self.ngram, len(text)) + 1):
            self.first.setdefault(tuple(text[-size:]), len(text) - size)

    def find(self, text: Sequence[int], count: int) -> list[int]:
        """What `candidates` gives."""
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            at = self.first[tuple(text[-size:])]
            if at < len(text) - size:
                return list(text[at + size : at + size + count])
        return []
