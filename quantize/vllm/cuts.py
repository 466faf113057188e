"""Which part of a linear of the checkpoint one of several GPUs holds, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from quantize.formats.shards import inputs_of, rows_of, span

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

_REMEDY = "serve with another --tensor-parallel-size"


@dataclass(frozen=True)
class Cut:
    """Some rows, or some inputs, of a linear [N, K]; all of both where neither is named."""

    shape: tuple[int, int]
    """Of the whole linear, as the checkpoint has it."""
    rows: slice | None = None
    inputs: slice | None = None

    @property
    def held(self) -> tuple[int, int]:
        """What is left, [N, K]."""
        N, K = self.shape
        rows, inputs = (
            length if part is None else part.stop - part.start
            for length, part in ((N, self.rows), (K, self.inputs))
        )
        return rows, inputs

    def of(self, tensors: Mapping[str, Tensor], scheme: AnyScheme | None) -> dict[str, Tensor]:
        """The part of a linear's tensors by suffix, as it is stored; scheme: None for one that is not
        packed."""
        if scheme is None:
            rows, inputs = self.rows or slice(None), self.inputs or slice(None)
            return {suffix: tensor[rows, inputs] for suffix, tensor in tensors.items()}
        if self.rows is not None:
            return rows_of(tensors, scheme, self.rows)
        return dict(tensors) if self.inputs is None else inputs_of(tensors, scheme, self.inputs)


def rows_cut(held: int, inputs: int, rank: int, ranks: int, copies: int = 1) -> Cut:
    """Rows of one of several GPUs that holds `held` of them. copies: GPUs that hold the same ones."""
    place = rank // copies
    return Cut((held * (ranks // copies), inputs), rows=slice(place * held, (place + 1) * held))


def inputs_cut(
    rows: int, inputs: int, scheme: AnyScheme | None, rank: int, ranks: int, what: str
) -> Cut:
    """Inputs of one of several GPUs. what: the linear's name, for the ValueError where whole groups do
    not divide among so many."""
    group = None if scheme is None else scheme.group_size
    try:
        part = span(inputs, group or 1, rank, ranks, "inputs")
    except ValueError as err:
        raise ValueError(f"{what}: {err}; {_REMEDY}") from None
    return Cut((rows, inputs), inputs=part)
