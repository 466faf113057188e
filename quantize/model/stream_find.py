"""What goes through a model from layer to layer (`stream`), found by running it around recorders."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UnderivedError
from quantize.model.experts import Experts
from quantize.model.moe import MoeFfn
from quantize.model.stream import (
    Given,
    Path,
    Piece,
    Shared,
    Stream,
    argument,
    empty_mappings,
    value_at,
    values_of,
)
from quantize.model.transformers_api import LayerCall
from quantize.model.transformers_decoder import mapped

SMALL, LARGE = (2, 3), (5, 7)
"""[B, T] of the passes: an axis of windows goes from 2 to 5, one of tokens from 3 to 7."""


@dataclass(frozen=True)
class Entry:
    """What one pass was seen to give the layers."""

    states: Tensor
    calls: Sequence[LayerCall]


def depends(one: Entry, other: Entry) -> Iterator[tuple[int, Path]]:
    """(layer, place in its call) of values that differ between two passes over other tokens, with
    other weights."""
    for index, (call, second) in enumerate(zip(one.calls, other.calls, strict=True)):
        ours, theirs = values_of(call), values_of(second)
        yield from ((index, path) for path in theirs if path not in ours)
        for path, value in ours.items():
            found = theirs.get(path)
            if found is None or found.shape != value.shape or not torch.equal(found, value):
                yield index, path


def require_independent(kind: str, one: Entry, other: Entry) -> None:
    """UnderivedError where layers are given what earlier ones put out beside hidden states: `other` is
    the same pass as `one`, but for layers that return something else."""
    for index, path in depends(one, other):
        raise UnderivedError(
            f"{kind}: layer {index} is given {argument(path)}, which depends on what earlier layers "
            "put out; pq takes decoders whose layers follow one another"
        )


def is_plain(one: Entry, other: Entry) -> bool:
    """Whether nothing but hidden states [B, T, D] goes from layer to layer, seen in two passes of
    SMALL windows."""
    return (
        one.states.ndim == 3
        and tuple(one.states.shape[:2]) == SMALL
        and next(depends(one, other), None) is None
        and not any(empty_mappings(call) for call in one.calls)
    )


def find_stream(
    kind: str, layers: Sequence[nn.Module], one: Entry, other: Entry, large: Entry
) -> Stream:
    """What goes from layer to layer.

    kind: the model's class. one, other: passes of SMALL windows with other tokens and weights. large:
    as `one`, of LARGE windows. UnderivedError names what cannot be carried from one to the next.
    """
    states = _piece(0, one.states, large.states, one.states.dtype)
    if states is None:
        raise UnderivedError(
            f"{kind}: hidden states {list(one.states.shape)} enter its layers, in which pq finds no "
            "axis of windows and of tokens"
        )
    end, given = states.end, list[Given]()
    places: dict[int, list[tuple[int, Path]]] = {}
    for index, path in depends(one, other):
        here = values_of(one.calls[index]).get(path)
        places.setdefault(id(here), []).append((index, path))
    for same in places.values():
        index, path = same[0]
        small, wide = (values_of(entry.calls[index]).get(path) for entry in (one, large))
        piece = _piece(end, small, wide, one.states.dtype)
        if piece is None:
            raise UnderivedError(
                f"{kind}: layer {index} is given {argument(path)}, which depends on the tokens, and "
                "not token by token; pq cannot carry it from layer to layer"
            )
        given.append(Given(piece, tuple(same)))
        end = piece.end
    return Stream(states, tuple(given), tuple(_shared(kind, layers, end, one, large)))


def _piece(
    first: int, small: Tensor | None, large: Tensor | None, dtype: torch.dtype
) -> Piece | None:
    """A tensor of a SMALL pass and the same of a LARGE one; None where these are not alike but for
    one axis of windows and one of tokens, or where the stream's dtype cannot hold it."""
    if small is None or large is None or small.ndim != large.ndim:
        return None
    sizes = list(zip(small.shape, large.shape, strict=True))
    windows, tokens = (
        [axis for axis, pair in enumerate(sizes) if pair == wanted]
        for wanted in zip(SMALL, LARGE, strict=True)
    )
    rest = [pair for axis, pair in enumerate(sizes) if axis not in (*windows, *tokens)]
    if len(windows) != 1 or len(tokens) != 1 or any(a != b for a, b in rest):
        return None
    if small.is_floating_point() and small.dtype != dtype:
        return None
    if small.is_complex():
        return None
    return Piece(
        first,
        tuple(a for a, _ in rest),
        (windows[0], tokens[0]),
        None if small.is_floating_point() else small.dtype,
    )


def _shared(
    kind: str, layers: Sequence[nn.Module], first: int, one: Entry, large: Entry
) -> Iterator[Shared]:
    if not any(empty_mappings(call) for call in one.calls):
        return
    here, there = (_left(kind, layers, entry) for entry in (one, large))
    for (mapping, key), (writer, values) in here.items():
        for index, value in enumerate(values):
            piece = _piece(first, value, there[mapping, key][1][index], one.states.dtype)
            if piece is None:
                raise UnderivedError(
                    f"{kind}: layer {writer} leaves {key!r} in {argument(mapping)} for later ones, "
                    "which pq cannot carry from layer to layer"
                )
            yield Shared(piece, mapping, key, index, writer)
            first = piece.end


def _left(
    kind: str, layers: Sequence[nn.Module], entry: Entry
) -> dict[tuple[Path, Any], tuple[int, tuple[Tensor, ...]]]:
    """(mapping, key) → (the first layer that leaves something there, what): all layers are run one
    after the other on the meta device."""
    states, found = entry.states.to("meta"), dict[tuple[Path, Any], Any]()
    boards: dict[Path, dict[Any, Any]] = {}
    for index, (layer, call) in enumerate(zip(layers, entry.calls, strict=True)):
        kwargs = mapped(dict(call.kwargs), lambda tensor: tensor.to("meta"))
        args = mapped(call.args, lambda tensor: tensor.to("meta"))
        for path in empty_mappings(call):
            board = boards.setdefault(path, {})
            if path[0] == "args":
                args = (*args[: path[1]], board, *args[path[1] + 1 :])
            else:
                kwargs[path[1]] = board
        alone = copy.deepcopy(layer)
        for module in alone.modules():
            if isinstance(module, MoeFfn | Experts):
                module.every_token = True
        there = LayerCall(args, kwargs)
        try:
            with torch.no_grad():
                states = there.run(alone, states)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError) as err:
            reason = " ".join(str(err).split())[:200]
            raise UnderivedError(
                f"{kind}: pq cannot run layer {index} without weights, to see what it leaves for "
                f"later ones ({reason})"
            ) from None
        for path in boards:
            for key, value in value_at(there, path).items():
                tensors = tuple(value) if isinstance(value, tuple | list) else (value,)
                found.setdefault((path, key), (index, tensors))
    return found
