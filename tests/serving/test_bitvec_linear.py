"""A layer of bit vectors computes what its decoded weight does, however it goes about it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from bitvecs import exact_product, random_bitvec
from torch import Tensor

from quantize.formats.bitvec import BitVec
from quantize.kernels import by_rows
from quantize.kernels.bitvec import lookup
from quantize.serving.bitvec_linear import BitVecLinear

FEW = lookup._FEW
RELATIVE = {
    torch.float32: 2**-22,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
    torch.float64: 2**-50,
}


def layer_of(weight: BitVec, bias: bool = True) -> BitVecLinear:
    layer = BitVecLinear(weight.shape[1], weight.shape[0], bias, weight.scheme())
    generator = torch.Generator().manual_seed(1)
    given = {"bias": torch.randn(weight.shape[0], generator=generator)} if bias else {}
    layer.load_state_dict(weight.tensors() | given)
    return layer


def check(y: Tensor, x: Tensor, weight: BitVec, layer: BitVecLinear) -> None:
    expected, size = exact_product(
        x.detach(), weight, None if layer.bias is None else layer.bias.detach()
    )
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    limit = (
        RELATIVE[x.dtype] * expected.abs() + 2**-21 * size
    )  # `unpack` rounds sums of coefficients to float32
    assert bool(((y.detach().double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("N", "K", "group_size", "bias", "lines", "scales"),
    [(37, 100, 64, True, 5, 1), (50, 320, 128, False, 300, 3), (1, 7, 256, True, 256, 256)],
)
def test_both_ways_are_exact(
    bits: int, N: int, K: int, group_size: int, bias: bool, lines: int, scales: int
):
    weight = random_bitvec(N, K, bits, group_size, bias, lines, scales)
    layer = layer_of(weight, bias)
    assert torch.equal(layer.rows(0, N, torch.float32), weight.unpack())
    assert torch.equal(layer.rows(N - 1, N, torch.float16), weight.unpack()[-1:].half())
    for dtype in RELATIVE:
        x = torch.randn(3, K, generator=torch.Generator().manual_seed(2)).to(dtype)
        for way in (layer._by_lookup, layer._by_rows):
            check(way(x), x, weight, layer)


@pytest.mark.parametrize("way", ["_by_lookup", "_by_rows"])
def test_rows_are_taken_piece_by_piece(way: str, monkeypatch: pytest.MonkeyPatch):
    weight = random_bitvec(50, 96, 3, 64)
    layer, x = layer_of(weight), torch.randn(4, 96)
    monkeypatch.setitem(by_rows._ROOM, "cpu", 16 * 96)
    pieces: list[tuple[int, int]] = []
    lines = lookup.Stored._coefficients
    monkeypatch.setattr(
        lookup.Stored,
        "_coefficients",
        lambda w, *piece: (pieces.append(piece), lines(w, *piece))[1],
    )
    check(getattr(layer, way)(x), x, weight, layer)
    assert pieces == [(0, 16), (16, 32), (32, 48), (48, 50)]


def test_few_rows_are_looked_up(monkeypatch: pytest.MonkeyPatch):
    weight = random_bitvec(9, 64, 2, 64)
    layer, taken = layer_of(weight), []
    for way in ("_by_lookup", "_by_rows"):
        call: Callable[[Tensor], Tensor] = getattr(layer, way)
        monkeypatch.setattr(
            layer, way, lambda x, way=way, call=call: (taken.append(way), call(x))[1]
        )
    for shape in ((1,), (FEW,), (2, FEW // 2), (FEW + 1,), (2, 0), ()):
        x = torch.randn(*shape, 64)
        assert layer(x).shape == (*shape, 9)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.unpack().sum(dim=0).expand(2, -1))
    with torch.no_grad():
        check(layer(x), x, weight, layer)
    ways = ["_by_lookup"] * 3 + ["_by_rows"] * 2 + ["_by_lookup", "_by_rows", "_by_lookup"]
    assert taken == ways


@pytest.mark.parametrize("M", [1, FEW, FEW + 1])
def test_strides_do_not_matter(M: int):
    weight = random_bitvec(20, 100, 4, 64, True)
    layer = layer_of(weight, bias=False)
    x = torch.randn(100, M).T
    check(layer(x), x, weight, layer)


@pytest.mark.parametrize("lines", [5, 300])
@pytest.mark.parametrize("cast", ["float32", "float16", "double", "bfloat16"])
def test_a_cast_leaves_stored_tensors_alone(cast: str, lines: int):
    weight = random_bitvec(12, 70, 4, 64, lines=lines, scales=2)
    layer = layer_of(weight)
    before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    moved = getattr(
        copy.deepcopy(layer), {"float32": "float", "float16": "half"}.get(cast, cast)
    )().to("cpu")
    for name, tensor in before.items():
        assert moved.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(moved.state_dict()[name], tensor)
    assert moved.bias is not None
    assert moved.bias.dtype == getattr(torch, cast)
    assert [name for name, p in moved.named_parameters() if p.requires_grad] == ["bias"]
    x = torch.randn(2, 70).to(moved.bias.dtype)
    check(moved(x), x, weight, moved)
    for device in ("meta", "cpu"):
        moved = moved.to_empty(device=device)
        assert {
            n: (t.dtype, t.device.type) for n, t in moved.state_dict().items() if n != "bias"
        } == {n: (t.dtype, device) for n, t in before.items()}


@pytest.mark.parametrize("lines", [5, 300])
def test_a_layer_can_be_saved(lines: int):
    layer = layer_of(random_bitvec(12, 70, 4, 64, lines=lines))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    again = BitVecLinear(70, 12, True, layer.scheme)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 70)
    for other in (again, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
        assert {n: (t.dtype, t.requires_grad) for n, t in other.named_parameters()} == {
            n: (t.dtype, t.requires_grad) for n, t in layer.named_parameters()
        }
    assert layer.weight_index.dtype == (torch.uint8 if lines == 5 else torch.uint16)
    assert "in_features=70, out_features=12, bias=True, BitVecScheme(bits=4" in repr(layer)


def test_a_layer_takes_little_memory():
    layer = layer_of(random_bitvec(64, 1024), bias=False)
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert held == 64 * 1024 // 2 + 64 * 8 + 5 * 4 * 2 + 4 + 16


@pytest.mark.parametrize("M", [1, FEW + 1])
def test_the_whole_weight_is_never_decoded(M: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(by_rows._ROOM, "cpu", 1 << 15)
    layer, x = layer_of(random_bitvec(512, 1024)), torch.randn(M, 1024)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        layer(x)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 512 * 1024 * 4 // 2
