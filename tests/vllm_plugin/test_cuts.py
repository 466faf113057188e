"""What each of several GPUs takes of a linear: together all of it, heads of keys several times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.vllm.cuts import Cut, inputs_cut, rows_cut

N, K = 12, 256
SCHEME = IntScheme(4, 64, False)


def linear() -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by suffix, and the weight."""
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    held = PackedInt(codes, torch.randn(N, K // 64).bfloat16(), 4, 64)
    return held.tensors(), held.unpack()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_of_a_packed_linear(ranks: int):
    tensors, weight = linear()
    cuts = [rows_cut(N // ranks, K, rank, ranks) for rank in range(ranks)]
    assert {cut.shape for cut in cuts} == {(N, K)}
    parts = [SCHEME.read(cut.of(tensors, SCHEME)).unpack() for cut in cuts]
    assert [tuple(part.shape) for part in parts] == [cut.held for cut in cuts]
    assert torch.equal(torch.cat(parts), weight)
    cuts = [inputs_cut(N, K, SCHEME, rank, ranks, "x") for rank in range(ranks)]
    parts = [SCHEME.read(cut.of(tensors, SCHEME)).unpack() for cut in cuts]
    assert torch.equal(torch.cat(parts, dim=1), weight)


def test_parts_of_a_plain_linear():
    weight = torch.randn(N, K)
    rows = [
        rows_cut(N // 3, K, rank, 3).of({"weight": weight}, None)["weight"] for rank in range(3)
    ]
    assert torch.equal(torch.cat(rows), weight)
    columns = [
        inputs_cut(N, K, None, rank, 2, "x").of({"weight": weight}, None)["weight"]
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(columns, dim=1), weight)
    assert torch.equal(Cut((N, K)).of({"weight": weight}, None)["weight"], weight)


def test_more_gpus_than_heads():
    """Two heads of six rows on four GPUs: each is on two of them."""
    cuts = [rows_cut(6, K, rank, 4, copies=2) for rank in range(4)]
    assert [cut.rows for cut in cuts] == [slice(0, 6), slice(0, 6), slice(6, 12), slice(6, 12)]
    assert {cut.shape for cut in cuts} == {(12, K)}


def test_a_cut_through_a_group_is_refused():
    words = "x: inputs 256 in units of 64 does not divide among 8 GPUs; serve with another"
    with pytest.raises(ValueError, match=words):
        inputs_cut(N, K, SCHEME, 0, 8, "x")
