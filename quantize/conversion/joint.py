"""What the ranks of one conversion share outside the blocks: the text and
the state of a stopped run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor

from quantize.calibration.tokens import TokenSet
from quantize.errors import VerifyError
from quantize.files.memo import digest
from quantize.files.resume import Kept
from quantize.parallel.ranks import Ranks


def shared_tokens(ranks: Ranks, load: Callable[[], TokenSet]) -> TokenSet:
    """The calibration text, which the first rank loads."""
    mine = load() if ranks.first else None
    facts = ranks.tell(None if mine is None else [mine.sha256, mine.source, mine.origin])
    tokens = ranks.tensors(None if mine is None else {"tokens": mine.tokens})["tokens"]
    return mine or TokenSet(tokens, *facts)


def shared_state(ranks: Ranks, kept: Kept | None) -> Kept | None:
    """The state that the first rank takes up, if any."""
    facts = ranks.tell(None if kept is None else [kept.blocks, kept.facts, kept.written])
    if facts is None:
        return None
    tensors = ranks.tensors(kept.tensors if kept else None)
    return kept or Kept(facts[0], facts[1], tensors, facts[2])


def require_same_block(ranks: Ranks, index: int, tensors: Mapping[str, Tensor]) -> None:
    """VerifyError unless all ranks hold the same tensors of a finished block."""
    if ranks.size == 1:
        return
    first, *others = ranks.gather(digest(list(tensors), tensors.values()))
    for rank, other in enumerate(others, 1):
        if other != first:
            raise VerifyError(
                f"block {index}: rank {rank} computed other tensors than rank 0; use equal machines"
            )


class NoWriter:
    """Stands in for the writer on ranks that write nothing."""

    total_size = 0

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Leave nothing."""

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Drop the tensors, which the first rank writes."""
