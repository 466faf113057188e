"""What goes from layer to layer: laid side by side and taken apart, found, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantize.errors import UnderivedError
from quantize.model.stream import Given, Piece, Shared, Stream, StreamCall
from quantize.model.stream_find import (
    LARGE,
    SMALL,
    Entry,
    find_stream,
    is_plain,
    require_independent,
)
from quantize.model.transformers_api import LayerCall


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (0, 2), (2, 0)])
def test_a_piece_comes_back_as_it_was(axes: tuple[int, int]):
    shape = [4, 6, 8]
    shape[axes[0]], shape[axes[1]] = 2, 5
    tensor, before = draw(*shape), draw(2, 5, 3)
    rest = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    piece = Piece(3, rest, axes)
    stream = torch.cat((before, piece.pack(tensor, torch.float32)), dim=-1)
    assert stream.shape == (2, 5, piece.end)
    assert torch.equal(piece.unpack(stream), tensor)
    assert piece.unpack(stream).is_contiguous()


def test_tokens_survive_a_stream_of_bfloat16():
    tokens = torch.randint(0, 1 << 24, (2, 9))
    piece = Piece(0, (), integers=torch.int64)
    packed = piece.pack(tokens, torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert packed.isfinite().all()
    assert torch.equal(piece.unpack(packed), tokens)


class Adds(nn.Module):
    """Adds what it is given for the tokens, and what the layer before left; leaves twice its input."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, hidden: Tensor, extra: Tensor, board: dict[str, tuple[Tensor]]) -> Tensor:
        left = torch.zeros_like(hidden) if self.first else board["twice"][0].movedim(1, 0)
        if self.first:
            board["twice"] = (2 * hidden.movedim(0, 1),)
        return hidden + extra.sum(-1, keepdim=True) + left


def entry(size: tuple[int, int], seed: int) -> Entry:
    drawn = torch.Generator().manual_seed(seed)
    board: dict[str, Tensor] = {}
    extra = [torch.randn(*size, 4, generator=drawn) for _ in range(2)]
    calls = [LayerCall((one,), {"board": board}) for one in extra]
    return Entry(torch.randn(*size, 8, generator=drawn), calls)


def test_what_layers_are_given_and_leave_is_found_and_carried():
    layers = [Adds(True), Adds(False)]
    one, other, large = entry(SMALL, 0), entry(SMALL, 1), entry(LARGE, 0)
    assert not is_plain(one, other)
    found = find_stream("Model", layers, one, other, large)
    assert found.states == Piece(0, (8,))
    assert [given.places for given in found.given] == [((0, ("args", 0)),), ((1, ("args", 0)),)]
    (shared,) = found.shared
    assert (shared.writer, shared.key, shared.piece.axes) == (0, "twice", (1, 0))
    assert found.width == 8 + 4 + 4 + 8

    # Through calls of another batch, whose own values must not matter.
    static = entry((3, 5), 7)
    fresh = entry((3, 5), 8)
    stream = found.entering(fresh.states, fresh.calls)
    for index, layer in enumerate(layers):
        stream = StreamCall(static.calls[index], found, index).run(layer, stream)
    sums = [call.args[0].sum(-1, keepdim=True) for call in fresh.calls]
    wanted = (fresh.states + sums[0]) + sums[1] + 2 * fresh.states
    assert torch.allclose(found.states_of(stream), wanted, atol=1e-5)
    assert not static.calls[0].kwargs["board"]


def test_one_tensor_that_all_layers_are_given_is_carried_once():
    def shared(size: tuple[int, int], seed: int) -> Entry:
        one = entry(size, seed)
        tensor = one.calls[0].args[0]
        return Entry(one.states, [LayerCall((tensor,), {}) for _ in range(2)])

    found = find_stream("Model", [], shared(SMALL, 0), shared(SMALL, 1), shared(LARGE, 0))
    assert [one.places for one in found.given] == [((0, ("args", 0)), (1, ("args", 0)))]
    assert found.width == 8 + 4


def test_hidden_states_alone_are_plain():
    def bare(seed: int) -> Entry:
        mask = torch.ones(1, 1, 3, 3)
        return Entry(torch.randn(2, 3, 8), [LayerCall((mask,), {})] * 2)

    assert is_plain(bare(0), bare(1))
    assert Stream.plain(8).extra == ""


def test_a_mask_that_depends_on_tokens_is_refused_by_name():
    def masked(size: tuple[int, int], seed: int) -> Entry:
        drawn = torch.Generator().manual_seed(seed)
        mask = torch.rand(size[0], 1, size[1], size[1], generator=drawn)
        return Entry(torch.zeros(*size, 8), [LayerCall((), {"mask": mask})])

    with pytest.raises(UnderivedError, match="layer 0 is given mask, which depends on the tokens"):
        find_stream("Model", [], masked(SMALL, 0), masked(SMALL, 1), masked(LARGE, 0))


def test_what_another_dtype_would_round_is_refused():
    def wide(size: tuple[int, int], seed: int) -> Entry:
        one = entry(size, seed)
        call = LayerCall((one.calls[0].args[0],), {})
        return Entry(one.states.bfloat16(), [call])

    with pytest.raises(UnderivedError, match="positional argument 2"):
        find_stream("Model", [], wide(SMALL, 0), wide(SMALL, 1), wide(LARGE, 0))


def test_a_drawn_stream_has_integers_that_are_tokens_and_places():
    given = Given(Piece(8, (2,), integers=torch.int64), ((0, ("args", 0)),))
    left = Shared(Piece(14, (3,)), ("kwargs", "board"), "key", 0, 0)
    stream = Stream(Piece(0, (8,)), (given,), (left,))
    drawn = stream.draw(2, 5, torch.Generator().manual_seed(3), torch.float32)
    numbers = given.piece.unpack(drawn)
    assert drawn.shape == (2, 5, 17)
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < 5
    assert len(numbers.unique()) > 1
    larger = stream.scaled(drawn, 30.0)
    assert torch.equal(given.piece.unpack(larger), numbers)
    assert torch.equal(stream.states_of(larger), 30 * stream.states_of(drawn))


def test_what_depends_on_outputs_of_layers_is_refused():
    one, same = entry(SMALL, 0), entry(SMALL, 0)
    require_independent("Model", one, same)
    moved = LayerCall((same.calls[1].args[0] + 1,), same.calls[1].kwargs)
    with pytest.raises(UnderivedError, match="layer 1 is given positional argument 2, which dep"):
        require_independent("Model", one, Entry(same.states, [same.calls[0], moved]))
