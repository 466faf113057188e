"""What goes from one layer of a model to the next, as one tensor [B, T, W].

In most models that is hidden states [B, T, D]. Some carry several streams of them (AltUp of Gemma 3n
[S, B, T, D], hyper-connections [B, T, S, D]), give a layer something of its tokens beside (per-layer
inputs), or let a layer read keys and values of an earlier one. All of it is laid side by side here,
so that whoever walks through the blocks keeps one tensor for each batch, whatever the model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.model.transformers_api import LayerCall

Path = tuple[Any, ...]
"""Where a value stands in a call: `args` or `kwargs`, then an index or a key a level."""

_DIGIT = 256
_DIGITS = 3
"""An integer below 2^24 is carried as three digits, which bfloat16 holds exactly."""


@dataclass(frozen=True)
class Piece:
    """A tensor with an axis of windows and one of tokens, as channels [first, end) of a stream."""

    first: int
    size: tuple[int, ...]
    """Sizes of its other axes, in order."""
    axes: tuple[int, int] = (0, 1)
    """Its axes of windows and of tokens."""
    integers: torch.dtype | None = None
    """Its dtype where it holds integers."""

    @property
    def end(self) -> int:
        """First channel behind it."""
        count = 1
        for size in self.size:
            count *= size
        return self.first + count * (_DIGITS if self.integers else 1)

    def pack(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor → its channels [B, T, end − first]."""
        front = tensor.movedim(self.axes, (0, 1))
        if self.integers is None:
            return front.reshape(*front.shape[:2], -1)
        rest = front.reshape(*front.shape[:2], -1).long()
        digits = [rest // _DIGIT**place % _DIGIT for place in range(_DIGITS)]
        return torch.cat(digits, dim=-1).to(dtype)

    def unpack(self, stream: Tensor) -> Tensor:
        """A stream [B, T, W] → the tensor."""
        part = stream[..., self.first : self.end]
        if self.integers is not None:
            digits = part.round().long().chunk(_DIGITS, dim=-1)
            whole = sum(digit * _DIGIT**place for place, digit in enumerate(digits))
            assert isinstance(whole, Tensor)
            part = whole.to(self.integers)
        elif self.first == 0 and self.end == stream.shape[-1] and len(self.size) == 1:
            return part.movedim((0, 1), self.axes)
        back = part.reshape(*part.shape[:2], *self.size)
        return back.movedim((0, 1), self.axes).contiguous()


@dataclass(frozen=True)
class Given:
    """What layers are given that depends on the tokens."""

    piece: Piece
    places: tuple[tuple[int, Path], ...]
    """(layer, where in its call)."""


@dataclass(frozen=True)
class Shared:
    """What one layer leaves for later ones in a mapping that all are given."""

    piece: Piece
    mapping: Path
    key: Any
    index: int
    """Of the tuple of tensors under the key."""
    writer: int
    """The first layer that leaves it."""


@dataclass(frozen=True)
class Stream:
    """Where in [B, T, W] what stands."""

    states: Piece
    given: tuple[Given, ...] = ()
    shared: tuple[Shared, ...] = ()

    @classmethod
    def plain(cls, width: int) -> Stream:
        """Hidden states [B, T, D] and nothing beside them."""
        return cls(Piece(0, (width,)))

    @property
    def pieces(self) -> Iterator[Piece]:
        """All there is, in order."""
        yield self.states
        yield from (one.piece for one in self.given)
        yield from (one.piece for one in self.shared)

    @property
    def width(self) -> int:
        """W."""
        return max(piece.end for piece in self.pieces)

    @property
    def extra(self) -> str:
        """What goes from layer to layer beside hidden states [B, T, D]; empty where nothing does."""
        if self.shared:
            return "layers read what earlier ones computed beside hidden states"
        if self.given:
            return "layers are given more of the tokens than hidden states"
        if self.states != Piece(0, self.states.size[:1]):
            return "several streams of hidden states go from layer to layer"
        return ""

    def draw(
        self, batch: int, length: int, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        """A stream [batch, length, W] of normal values; integers in it are below `length`, which
        may be tokens and places alike."""
        out = torch.randn(batch, length, self.width, generator=generator).to(dtype)
        for piece in self.pieces:
            if piece.integers is not None:
                out[..., piece.first : piece.end] = 0
                lowest = piece.first + (piece.end - piece.first) // _DIGITS
                size = out[..., piece.first : lowest].shape
                drawn = torch.randint(min(length, _DIGIT), size, generator=generator)
                out[..., piece.first : lowest] = drawn.to(dtype)
        return out

    def scaled(self, stream: Tensor, factor: float) -> Tensor:
        """The same stream, its hidden states times a factor."""
        out = stream.clone()
        out[..., : self.states.end] *= factor
        return out

    def states_of(self, stream: Tensor) -> Tensor:
        """Channels [B, T, ·] of the hidden states alone."""
        return stream[..., : self.states.end]

    def entering(self, states: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The stream that enters the first layer: these states, what the calls give, and room for
        what layers will leave."""
        parts = [self.states.pack(states, states.dtype)]
        for one in self.given:
            layer, path = one.places[0]
            parts.append(one.piece.pack(value_at(calls[layer], path), states.dtype))
        if len(parts) == 1 and not self.shared:
            return parts[0]
        room = self.width - sum(part.shape[-1] for part in parts)
        parts.append(parts[0].new_zeros(*parts[0].shape[:2], room))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class StreamCall:
    """A layer's call on streams of one batch shape."""

    call: LayerCall
    stream: Stream
    index: int

    def opened(self, stream: Tensor) -> tuple[Tensor, LayerCall]:
        """(the hidden states in a stream, what the layer is given beside them)."""
        values: dict[Path, Any] = {}
        for one in self.stream.given:
            for layer, path in one.places:
                if layer == self.index:
                    values[path] = one.piece.unpack(stream)
        for path in {one.mapping for one in self.stream.shared}:
            values[path] = self._mapping(path, stream)
        call = replaced(self.call, values) if values else self.call
        return self.stream.states.unpack(stream), call

    def _mapping(self, path: Path, stream: Tensor) -> dict[Any, tuple[Tensor, ...]]:
        found: dict[Any, list[Tensor]] = {}
        for one in self.stream.shared:
            if one.mapping == path and one.writer < self.index:
                found.setdefault(one.key, []).append(one.piece.unpack(stream))
        return {key: tuple(tensors) for key, tensors in found.items()}

    def run(self, layer: nn.Module, stream: Tensor) -> Tensor:
        """Call a layer on a stream [B, T, W] → the stream behind it."""
        whole = self.stream
        states, call = self.opened(stream)
        out = whole.states.pack(call.run(layer, states), stream.dtype)
        if out.shape[-1] == whole.width:
            return out
        after = stream.to(out.dtype, copy=True)
        after[..., : whole.states.end] = out
        for one in whole.shared:
            left = value_at(call, one.mapping).get(one.key)
            if left is not None:
                after[..., one.piece.first : one.piece.end] = one.piece.pack(
                    left[one.index], out.dtype
                )
        return after


def values_of(call: LayerCall) -> dict[Path, Tensor]:
    """All tensors in a call, by where they stand."""
    return dict(_walk(("args",), call.args)) | dict(_walk(("kwargs",), call.kwargs))


def _walk(path: Path, value: Any) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _walk((*path, key), one)
    elif isinstance(value, tuple | list):
        for index, one in enumerate(value):
            yield from _walk((*path, index), one)


def empty_mappings(call: LayerCall) -> dict[Path, Any]:
    """Mappings without entries among a call's arguments, which layers may write to."""
    named: list[tuple[Path, Any]] = [(("args", i), v) for i, v in enumerate(call.args)]
    named += [(("kwargs", name), v) for name, v in call.kwargs.items()]
    return {path: v for path, v in named if isinstance(v, Mapping) and not v}


def value_at(call: LayerCall, path: Path) -> Any:
    """What stands at a place in a call."""
    value: Any = call.args if path[0] == "args" else call.kwargs
    for key in path[1:]:
        value = value[key]
    return value


def replaced(call: LayerCall, values: Mapping[Path, Any]) -> LayerCall:
    """The same call with other values at these places."""
    args = _put(("args",), call.args, values)
    return LayerCall(args, _put(("kwargs",), dict(call.kwargs), values))


def _put(path: Path, value: Any, values: Mapping[Path, Any]) -> Any:
    if path in values:
        return values[path]
    if not any(place[: len(path)] == path for place in values):
        return value
    if isinstance(value, Mapping):
        return {key: _put((*path, key), one, values) for key, one in value.items()}
    return type(value)(_put((*path, index), one, values) for index, one in enumerate(value))


def argument(path: Path) -> str:
    """What to call a place in a message."""
    return f"positional argument {path[1] + 2}" if path[0] == "args" else str(path[1])
