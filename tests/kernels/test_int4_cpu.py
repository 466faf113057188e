"""Torch's own INT4 operator gives what decoded weights do, wherever it is preferred to them."""

from __future__ import annotations

import pytest
import torch

from quantize.formats.packed_int import PackedInt, pack_codes
from quantize.kernels.int4.cpu import can_repack, multiply_repacked, prefers_repacked, repack


@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 64, 32), (96, 256, 64), (48, 384, 128)])
@pytest.mark.parametrize("M", [1, 5, 33])
def test_it_multiplies_what_is_stored(N: int, K: int, group_size: int, M: int):
    if not can_repack(N, group_size, torch.bfloat16):
        pytest.skip("this processor has no vectors that the operator was written for")
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    scale = (torch.randn(N, K // group_size) * 0.1).bfloat16()  # signs as well
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N)
    weight = repack(pack_codes(codes, 4), scale, K)
    exact = x.double() @ PackedInt(codes, scale, 4, group_size).unpack().double().T
    # y is rounded, and once more with the bias
    room = exact.abs() * 2.0**-8 + 1e-3
    assert ((multiply_repacked(x, *weight).double() - exact).abs() <= room).all()
    y = multiply_repacked(x.view(1, M, K), *weight, bias)
    assert y.shape == (1, M, N)
    exact = exact + bias.double()
    room = room + (exact.abs() + bias.double().abs()) * 2.0**-8
    assert ((y[0].double() - exact).abs() <= room).all()


def test_it_is_left_to_what_it_is_good_at():
    assert not can_repack(20, 128, torch.bfloat16)
    assert not can_repack(32, 48, torch.bfloat16)
    assert not can_repack(32, 128, torch.float32)
    assert prefers_repacked(torch.zeros(2, 32, 8, dtype=torch.bfloat16))
    for x in (torch.zeros(3, 8), torch.zeros(65, 8).bfloat16(), torch.zeros(0, 8).bfloat16()):
        assert not prefers_repacked(x)
