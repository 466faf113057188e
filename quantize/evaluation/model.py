"""What an evaluation asks of a model, however it is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from quantize.parallel.ranks import Ranks

Span = tuple[int, int, int]
"""(window, first position, end): predictions wanted of one window, as
half-open positions of its inputs."""

Logits = Callable[[Sequence[Span]], Iterator[Tensor]]
"""Yields logits [end − first, V] of every span, in order."""

Tick = Callable[[], None]
"""Called after each unit of work; a model's `units` says how many there are in one pass."""


class Model(Protocol):
    """What evaluation needs of a model."""

    units: int
    kv_cache: str
    """`16-bit`, or how keys and values are rounded."""

    def read(self, inputs: Tensor, tick: Tick) -> Logits:
        """Run over inputs [B, T] int64; what it returns gives the logits of spans,
        more than once if need be."""
        ...

    def require_positions(self, length: int) -> None:
        """UsageError where the model cannot read so many tokens at once."""
        ...

    def hidden_bytes(self, tokens: int) -> int:
        """Bytes of hidden states that one pass over so many tokens holds in memory."""
        ...

    def count_together(self, ranks: Ranks) -> None:
        """Count what the same model read on other ranks as read; a meeting of all of them."""
        ...

    @property
    def experts_visited(self) -> Mapping[str, float]:
        """Block with experts → mean number of routed ones that a token visited in what was read."""
        ...

    @property
    def activated_parameters(self) -> float | None:
        """Parameters that a token is multiplied with, on average over what was read; the
        embedding table's are not."""
        ...

    @property
    def bits_per_weight(self) -> float | None:
        """Mean stored bits of quantized weights, scales counted; None without any."""
        ...

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of the stored weights that a token is multiplied with, on average over what was
        read: `activated_parameters` as they lie on the disk. None where that cannot be told."""
        ...

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """Bits that inputs of linears are rounded to, smallest first, all kinds that there are; 16
        stands for no rounding."""
        ...

    @property
    def kv_bits(self) -> float:
        """Stored bits of a cached key or value, scales counted."""
        ...
