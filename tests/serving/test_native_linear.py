"""A packed layer computes what a decoded one does, in a fraction of its memory."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from natives import W4A8, W4A16
from torch import Tensor

from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.model.linear import PackedLinear
from quantize.serving.int_linear import IntLinear


def layer_pair(
    scheme: IntScheme, N: int = 48, K: int = 256, bias: bool = True
) -> tuple[IntLinear, PackedLinear]:
    """The same random layer decoded (PackedLinear) and packed."""
    generator = torch.Generator().manual_seed(N + K + scheme.bits)
    half = 1 << (scheme.bits - 1)
    codes = torch.randint(-half, half, (N, K), dtype=torch.int8, generator=generator)
    scale = (torch.rand(N, K // scheme.group_size, generator=generator) + 0.01).to(torch.bfloat16)
    packed = PackedInt(codes, scale, scheme.bits, scheme.group_size)
    offset = torch.randn(N, generator=generator) if bias else None
    layer = IntLinear(K, N, bias, scheme)
    layer.load_state_dict(packed.tensors() | ({} if offset is None else {"bias": offset}))
    return layer, PackedLinear(packed, offset, scheme.fp8_activations, torch.float32, "kernel")


@pytest.mark.parametrize(
    "scheme", [W4A8, W4A16, *(IntScheme(bits, 32, False) for bits in (2, 3, 5, 8))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_computes_what_a_decoded_one_does(scheme: IntScheme, dtype: torch.dtype):
    layer, decoded = layer_pair(scheme)
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(layer(x), decoded.to(dtype)(x))
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("scheme", [W4A8, IntScheme(3, 32, False)], ids=str)
def test_rows_are_decoded_piece_by_piece(scheme: IntScheme, monkeypatch: pytest.MonkeyPatch):
    layer, decoded = layer_pair(scheme, N=50)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    pieces: list[tuple[int, ...]] = []
    whole = layer.rows

    def rows(*args: Any) -> Tensor:
        pieces.append(tuple((piece := whole(*args)).shape))
        return piece

    monkeypatch.setattr(layer, "rows", rows)
    monkeypatch.setitem(sys.modules["quantize.kernels.by_rows"]._ROOM, "cpu", 16 * 256)
    torch.testing.assert_close(layer(x), decoded(x), rtol=1e-5, atol=1e-5)
    assert pieces == [(16, 256)] * 3 + [(2, 256)]


@pytest.mark.parametrize("cast", ["float32", "float16", "double", "bfloat16"])
def test_a_cast_leaves_packed_tensors_alone(cast: str):
    layer, _ = layer_pair(W4A8)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    moved = copy.deepcopy(layer).to(getattr(torch, cast)).to("cpu")
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        assert moved.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(moved.state_dict()[name], before[name])
    assert moved.bias is not None
    assert moved.bias.dtype == getattr(torch, cast)
    assert [name for name, p in moved.named_parameters() if p.requires_grad] == ["bias"]
    for device in ("meta", "cpu"):
        moved = moved.to_empty(device=device)
        assert {
            n: (t.dtype, t.device.type) for n, t in moved.state_dict().items() if n != "bias"
        } == {n: (t.dtype, device) for n, t in before.items() if n != "bias"}


def test_a_packed_layer_takes_little_memory():
    layer, _ = layer_pair(W4A8, N=64, K=1024, bias=False)
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert held == 64 * 1024 // 2 + 64 * 8 * 2 + 16
    with pytest.raises(ValueError, match="100 inputs are no multiple of the group 64"):
        IntLinear(100, 8, False, W4A16)
