"""Encoding shared among ranks: each encodes some linears of a block, and all get the results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from quantize.block.block import Block
from quantize.block.moments import Moments
from quantize.formats.registry import scheme_of
from quantize.model.linear import PackedLinear


def share_out(
    block: Block,
    groups: Sequence[tuple[Sequence[str], Moments | None]],
    encode: Callable[[Block, Sequence[str], Moments | None], None],
) -> None:
    """Let `encode` encode groups of linears with the moments of their
    inputs, each linear on one rank.

    encode: encodes all linears it is given, may note facts about them alone, and must meet no other
    rank. Several groups go to one rank each, a single one is divided by the linears' sizes.
    """
    names = [name for group, _ in groups for name in group]
    noted = list(block.report)
    owners = _owners(block, [group for group, _ in groups])
    for group, moments in groups:
        if mine := [name for name in group if owners[name] == block.ranks.rank]:
            encode(block, mine, moments)
    if block.ranks.size > 1:
        for name in names:
            _pass_on(block, name, owners[name])
        keep_order(block, names, noted)


def keep_order(block: Block, names: Sequence[str], noted: Collection[str] = ()) -> None:
    """Put what is known of these linears behind everything else, in their order: what is written
    does not depend on who encoded them when.

    noted: linears of which something was noted before; those keep their places in the report.
    """
    _order(block.packed, names)
    _order(block.histograms, names)
    _order(block.report, [name for name in names if name not in noted])


def _owners(block: Block, groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """Rank of every linear."""
    if len(groups) == 1:
        sizes = [block.linear(name).weight.numel() for name in groups[0]]
        return dict(zip(groups[0], block.ranks.owners(sizes), strict=True))
    ranks = block.ranks.owners([1] * len(groups))
    return {name: rank for group, rank in zip(groups, ranks, strict=True) for name in group}


def _pass_on(block: Block, name: str, owner: int) -> None:
    """Give all ranks what the owner made of a linear: its packed form,
    and what was noted about it."""
    told: dict[str, Any] = {}
    tensors = None
    if block.ranks.rank == owner:
        linear = block.module.get_submodule(name)
        assert isinstance(linear, PackedLinear)
        scheme = linear.packed.scheme(linear.fp8_activations).as_json([])
        told, tensors = {"scheme": scheme, "noted": block.report.get(name)}, linear.packed.tensors()
    told, tensors = block.ranks.tell(told, owner), block.ranks.tensors(tensors, owner)
    if block.ranks.rank != owner:
        layout = scheme_of(told["scheme"])
        block.encode(name, layout.read(tensors), layout.fp8_activations)
        if told["noted"] is not None:
            block.report[name] = told["noted"]


def _order(table: dict[str, Any], names: Sequence[str]) -> None:
    """Put these entries behind the others, in the order in which one process makes them."""
    for name in names:
        if name in table:
            table[name] = table.pop(name)
