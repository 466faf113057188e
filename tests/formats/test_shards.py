"""Parts of packed layers decode to parts of what the whole decodes to, and their products add up."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from quantize.formats.bitvec import BitVec, index_dtype
from quantize.formats.fp8 import reloaded
from quantize.formats.packed_int import PackedInt
from quantize.formats.scheme import AnyScheme, Packed
from quantize.formats.shards import inputs_of, kv_heads, rows_of, span
from quantize.kernels.int4.api import fold
from quantize.kernels.int4.reference import Weight
from quantize.solvers.grid import Grid

N, K = 24, 512


def ints(bits: int, group: int | None) -> PackedInt:
    half, size = 1 << (bits - 1), group or K
    codes = torch.randint(-half, half, (N, K), dtype=torch.int8)
    scale = (torch.randn(N, K // size) * 0.02).to(torch.bfloat16)
    return PackedInt(codes, scale, bits, size, channelwise=group is None)


def bit_vectors(bits: int, group: int, bias: bool, lines: int, columns: int) -> BitVec:
    groups = -(-columns // group)
    return BitVec(
        torch.randint(0, 1 << bits, (N, columns), dtype=torch.uint8),
        torch.randint(0, lines * 2, (N, groups), dtype=torch.int32),
        torch.randn(lines, bits + bias).half(),
        torch.rand(2) + 0.5,
        bits,
        group,
    )


LAYOUTS = {
    "int4": lambda: ints(4, 128),
    "int8": lambda: ints(8, 64),
    "int3": lambda: ints(3, 32),
    "int3 across words": lambda: ints(3, 16),
    "int4 rows": lambda: ints(4, None),
    "planes": lambda: bit_vectors(4, 128, False, 3, K),
    "planes with bias": lambda: bit_vectors(3, 64, True, 200, K),
    "planes, short last group": lambda: bit_vectors(2, 128, True, 5, K + 72),
}


def stored(packed: Packed) -> tuple[dict[str, Tensor], AnyScheme]:
    return packed.tensors(), packed.scheme(False)


def product(tensors: Mapping[str, Tensor], scheme: AnyScheme, x: Tensor) -> Tensor:
    return x.double() @ scheme.read(tensors).unpack().double().T


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_all_ranks_are_the_outputs(layout: str, ranks: int):
    tensors, scheme = stored(LAYOUTS[layout]())
    whole, bias = scheme.read(tensors).unpack(), torch.randn(N)
    x = torch.randn(5, whole.shape[1])
    parts = []
    for rank in range(ranks):
        rows = span(N, 1, rank, ranks)
        part = rows_of({**tensors, "bias": bias}, scheme, rows)
        parts.append(product(part, scheme, x) + part["bias"])
        assert torch.equal(scheme.read(part).unpack(), whole[rows])
    wanted = product(tensors, scheme, x) + bias
    assert torch.allclose(torch.cat(parts, dim=1), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "short" not in name])
def test_products_with_the_inputs_of_all_ranks_add_up(layout: str, ranks: int):
    tensors, scheme = stored(LAYOUTS[layout]())
    whole = scheme.read(tensors).unpack()
    x = torch.randn(5, K)
    total = torch.zeros(5, N, dtype=torch.float64)
    for rank in range(ranks):
        inputs = span(K, scheme.group_size or 1, rank, ranks, "inputs")
        part = inputs_of(tensors, scheme, inputs)
        assert {name: tuple(t.shape) for name, t in part.items()} == {
            name: shape for name, (_, shape) in scheme.layout(N, K // ranks).items()
        }
        assert torch.equal(scheme.read(part).unpack(), whole[:, inputs])
        total += product(part, scheme, x[:, inputs])
    assert torch.allclose(total, product(tensors, scheme, x), rtol=1e-12, atol=1e-12)


def test_a_last_group_that_is_not_full_stays_the_last():
    tensors, scheme = stored(LAYOUTS["planes, short last group"]())
    whole = scheme.read(tensors).unpack()
    for inputs in (slice(0, 256), slice(256, K + 72), slice(K, K + 72)):
        assert torch.equal(
            scheme.read(inputs_of(tensors, scheme, inputs)).unpack(), whole[:, inputs]
        )
    assert tensors["weight_index"].dtype == index_dtype(10)


@pytest.mark.parametrize("ranks", [2, 4])
def test_fp8_products_are_those_of_the_whole(ranks: int):
    """Where scales reload the parts' own factors give the weights of the whole; where they do not,
    a folded weight still does."""
    w = torch.randn(N, 1024) * torch.randn(1024).mul(0.7).exp() * 0.02
    for shards in ((2, 4), ()):
        grid = Grid(4, 128, product=True, fp8_scales=True, shards=shards)
        scale, factor = grid.fit_scale(w)
        packed = grid.pack(grid.round(w, scale, factor)[0], scale)
        whole, scheme, tensors = packed.kernel_weight(), packed.scheme(True), packed.tensors()
        exact = torch.equal(reloaded(packed.scale, ranks), packed.scale)
        assert exact == bool(shards)
        folded = fold(Weight(tensors["weight_packed"], tensors["weight_scale"]))
        same = True
        for rank in range(ranks):
            inputs = span(1024, 128, rank, ranks)
            own = scheme.read(inputs_of(tensors, scheme, inputs)).kernel_weight()
            # Below 2⁻³ of 448 the whole row's s8 is subnormal, and the part's may be finer.
            fine = scale[:, rank * 8 // ranks : (rank + 1) * 8 // ranks] / factor >= 2.0**-3
            fine = fine.repeat_interleave(128, dim=1)
            same &= torch.equal(own[fine], whole[:, inputs][fine])
            groups = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
            part = folded.part(groups=groups)
            assert torch.equal(part.decode(), whole[:, inputs])
            assert torch.equal(part.part(rows=slice(4, 9)).decode(), whole[4:9, inputs])
        assert same == exact


def test_routed_experts_are_cut_as_layers_or_given_whole():
    """gate and up by rows, down by inputs: what the ranks make of a token adds up to the expert."""
    hidden, size, ranks = 128, 256, 2
    grid = Grid(4, 64)

    def made(rows: int, columns: int) -> PackedInt:
        w = torch.randn(rows, columns) * 0.1
        scale, factor = grid.fit_scale(w)
        return grid.pack(grid.round(w, scale, factor)[0], scale)

    gate, up, down = made(size, hidden), made(size, hidden), made(hidden, size)
    x = torch.randn(3, hidden).double()

    def run(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inner = torch.nn.functional.silu(x @ gate.double().T) * (x @ up.double().T)
        return inner @ down.double().T

    total = torch.zeros(3, hidden, dtype=torch.float64)
    for rank in range(ranks):
        share = span(size, 64, rank, ranks, "hidden neurons")
        scheme = gate.scheme(False)
        parts = [scheme.read(rows_of(p.tensors(), scheme, share)).unpack() for p in (gate, up)]
        total += run(*parts, scheme.read(inputs_of(down.tensors(), scheme, share)).unpack())
    whole = run(gate.unpack(), up.unpack(), down.unpack())
    assert torch.allclose(total, whole, rtol=1e-11, atol=1e-11)
    owned = [list(range(8))[span(8, 1, rank, 4, "experts")] for rank in range(4)]
    assert owned == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_post_rope_scales_go_with_their_heads():
    scale = torch.rand(4, 64)
    assert torch.equal(torch.cat([scale[kv_heads(4, r, 2)] for r in range(2)]), scale)
    eight = [scale[kv_heads(4, r, 8)] for r in range(8)]
    assert torch.equal(torch.cat(eight), scale.repeat_interleave(2, dim=0))
    with pytest.raises(ValueError, match="key and value heads 6 does not divide among 4 GPUs"):
        kv_heads(6, 0, 4)
    with pytest.raises(ValueError, match="does not divide among 3"):
        kv_heads(3, 0, 4)


def test_what_cannot_be_cut_is_refused():
    tensors, scheme = stored(ints(4, 128))
    with pytest.raises(ValueError, match="inputs 64 to 256 cut through a group of 128"):
        inputs_of(tensors, scheme, slice(64, 256))
    with pytest.raises(ValueError, match="rows 20 to 30 of 24"):
        rows_of(tensors, scheme, slice(20, 30))
    with pytest.raises(ValueError, match="inputs 384 in units of 128 does not divide among 2 GPUs"):
        span(384, 128, 0, 2, "inputs")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        span(384, 1, 2, 2)
