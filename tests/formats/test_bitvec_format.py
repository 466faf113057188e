"""The `bitvec` layout: planes, what is stored, what it says of itself, and config.json."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitvecs import random_bitvec
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from quantize.formats.bitvec import (
    MAX_LINES,
    BitVec,
    BitVecScheme,
    coefficients,
    index_dtype,
    levels,
    pack_planes,
    plane_words,
    unpack_planes,
)
from quantize.formats.compressed_tensors import quantization_config
from quantize.formats.native import native_config, packed_linears
from quantize.formats.packed_int import IntScheme
from quantize.formats.registry import schemes_in
from quantize.serving.register import PqConfig

BITS = st.integers(2, 8)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 300))
WEIGHTS = st.builds(
    lambda size, *rest: random_bitvec(*size, *rest),
    SIZES,
    BITS,
    st.sampled_from([64, 128, 256]),
    st.booleans(),
    st.integers(1, 70),
    st.sampled_from([1, 2, 8]),
)


def random_codes(bits: int, N: int, K: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (N, K), generator=torch.Generator().manual_seed(seed))


def written_out(weight: BitVec) -> Tensor:
    """Σ_k c_k·b_k + bias of every weight in float64, summand by summand."""
    Z = len(weight.scales)
    line = weight.index.long().repeat_interleave(weight.group_size, dim=1)[:, : weight.shape[1]]
    chosen = (
        weight.lines.double()[line // Z] * weight.scales.double()[line % Z][..., None]
    )  # [N, K, C]
    on = torch.stack([weight.codes.long() >> k & 1 for k in range(weight.bits)], dim=-1)
    if chosen.shape[-1] > weight.bits:
        on = torch.cat([on, torch.ones_like(on[..., :1])], dim=-1)
    return (chosen * on).sum(dim=-1)


# Planes


@given(BITS, SIZES, st.integers(0, 2**31), st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_codes_survive_packing(bits: int, size: tuple[int, int], seed: int, dtype: torch.dtype):
    N, K = size
    codes = random_codes(bits, N, K, seed)
    planes = pack_planes(codes.to(dtype), bits)
    assert (planes.dtype, tuple(planes.shape)) == (torch.int32, (N, plane_words(K, bits)))
    back = unpack_planes(planes, bits, K)
    assert back.dtype == torch.uint8
    assert torch.equal(back.long(), codes)


@given(BITS, SIZES, st.integers(0, 2**31))
def test_every_bit_lies_where_the_docstring_says(bits: int, size: tuple[int, int], seed: int):
    N, K = size
    codes = random_codes(bits, N, K, seed).tolist()
    for n, row in enumerate(pack_planes(torch.tensor(codes), bits).tolist()):
        expected = [0] * plane_words(K, bits)
        for i, code in enumerate(codes[n]):
            for k in range(bits):
                expected[bits * (i // 32) + k] |= (
                    code >> k & 1
                ) << i % 32  # nothing beyond the last input
        assert [word & 0xFFFFFFFF for word in row] == expected


def test_the_worked_bits_of_the_docstring():
    assert pack_planes(torch.tensor([[1, 2, 3, 8]]), 4).tolist() == [[5, 6, 0, 8]]
    last_of_32 = torch.zeros(1, 33, dtype=torch.uint8)
    last_of_32[0, 31:] = torch.tensor([4, 1])
    assert pack_planes(last_of_32, 4).tolist() == [[0, 0, -(1 << 31), 0, 1, 0, 0, 0]]


def test_packing_works_piece_by_piece():
    codes = random_codes(3, 70, 5000)  # more than is packed at once, and no whole number of pieces
    assert torch.equal(unpack_planes(pack_planes(codes, 3), 3, 5000).long(), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_out_of_range_are_refused(bits: int):
    for code in (-1, 1 << bits):
        with pytest.raises(ValueError, match=rf"{bits}-bit range \[0, {(1 << bits) - 1}\]"):
            pack_planes(torch.tensor([[0, code]]), bits)


# Stored tensors


@given(WEIGHTS)
@example(random_bitvec(3, 200, lines=256))
@example(random_bitvec(3, 200, lines=257))
@example(random_bitvec(2, 70, bits=8, group_size=64, bias=True, lines=MAX_LINES // 16, scales=16))
def test_tensors_read_back_and_weigh_what_they_claim(weight: BitVec):
    tensors, scheme = weight.tensors(), weight.scheme()
    found = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}
    assert found == scheme.layout(*weight.shape)
    assert tensors["weight_index"].dtype == index_dtype(scheme.lines * scheme.scales)
    for back in (BitVec.from_tensors(tensors, scheme), scheme.read(tensors)):
        assert isinstance(back, BitVec)
        for field in dataclasses.fields(BitVec):
            ours, theirs = getattr(weight, field.name), getattr(back, field.name)
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, (
                field.name
            )
    stored = sum(t.nbytes for suffix, t in tensors.items() if suffix != "weight_shape")
    assert (
        weight.bits_per_weight
        == scheme.stored_bits(*weight.shape)
        == 8 * stored / weight.codes.numel()
    )


def test_an_index_takes_as_few_bytes_as_it_can():
    assert [index_dtype(n).itemsize for n in (1, 256, 257, MAX_LINES)] == [1, 1, 2, 2]
    weight = random_bitvec(2, 70, lines=MAX_LINES)
    assert (
        int(weight.tensors()["weight_index"].to(torch.int32).max()) == MAX_LINES - 1
    )  # no sign is lost


@given(WEIGHTS)
def test_unpack_is_the_sum_of_bit_vectors(weight: BitVec):
    value, exact = weight.unpack(), written_out(weight)
    assert (value.dtype, value.shape) == (torch.float32, weight.shape)
    summands = weight.lines.float().abs().sum(dim=1).max() * weight.scales.max()
    assert float((value.double() - exact).abs().max()) <= 2.0**-22 * weight.bits * float(summands)
    assert torch.equal(weight.kernel_weight(), value)


def misfit(suffix: str, change: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    tensors = random_bitvec(4, 200, lines=7).tensors()
    old = tensors.pop(suffix)
    return tensors if change is None else tensors | {suffix: change(old)}


@pytest.mark.parametrize(
    ("suffix", "change", "says"),
    [
        ("weight_planes", None, "weight_planes is missing"),
        ("weight_index", None, "weight_index is missing"),
        ("weight_lines", None, "weight_lines is missing"),
        ("weight_scales", None, "weight_scales is missing"),
        ("weight_shape", None, "weight_shape is missing"),
        ("weight_planes", lambda t: t.long(), "weight_planes is torch.int64"),
        (
            "weight_planes",
            lambda t: t[:, 4:],
            "weight_planes is torch.int32 (4, 24), expected torch.int32 (4, 28)",
        ),
        (
            "weight_index",
            lambda t: t.to(torch.int32),
            "weight_index is torch.int32 (4, 2), expected torch.uint8",
        ),
        ("weight_index", lambda t: t[:, :1], "weight_index is torch.uint8 (4, 1)"),
        ("weight_index", lambda t: t + 7, "is outside a codebook of 7 lines"),
        ("weight_lines", lambda t: t.float(), "weight_lines is torch.float32"),
        ("weight_lines", lambda t: t[1:], "weight_lines is torch.float16 (6, 4)"),
        ("weight_lines", lambda t: t[:, 1:], "weight_lines is torch.float16 (7, 3)"),
        ("weight_scales", lambda t: t.half(), "weight_scales is torch.float16"),
        ("weight_scales", lambda t: t[:0], "weight_scales is torch.float32 (0,)"),
        ("weight_shape", lambda t: t.int(), "weight_shape is torch.int32"),
        ("weight_shape", lambda t: t[0], "weight_shape is torch.int64 ()"),
        ("weight_shape", lambda t: t.repeat(2), "weight_shape is torch.int64 (4,)"),
        ("weight_shape", lambda t: t.flip(0), "weight_planes is torch.int32 (4, 28), expected"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    suffix: str, change: Callable[[Tensor], Tensor] | None, says: str
):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        BitVec.from_tensors(misfit(suffix, change), BitVecScheme(4, 128, False, 7, 1))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codes": torch.zeros(4, 200)}, "codes must be uint8"),
        ({"index": torch.zeros(4, 2, dtype=torch.uint8)}, "index int32"),
        (
            {"index": torch.zeros(4, 1, dtype=torch.int32)},
            r"index is \(4, 1\) for a weight \(4, 200\)",
        ),
        (
            {"index": torch.full((4, 2), 7, dtype=torch.int32)},
            "index 7 is outside a codebook of 7 lines",
        ),
        ({"index": torch.full((4, 2), -1, dtype=torch.int32)}, "outside a codebook"),
        ({"lines": torch.zeros(7, 4)}, "lines must be float16"),
        ({"lines": torch.zeros(7, 6).half()}, "lines have 6 coefficients, expected 4 or 5"),
        ({"scales": torch.ones(1).half()}, "scales float32"),
        ({"group_size": 64}, "in groups of 64"),
    ],
)
def test_a_weight_checks_what_it_holds(changes: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(random_bitvec(4, 200, lines=7), **changes)


# What a weight says of its codes


@pytest.mark.parametrize("bias", [False, True])
def test_lines_that_count_evenly_have_their_step_as_unit(bias: bool):
    line = torch.tensor([[1.0, 2, 4, 8, -8][: 4 + bias]]).half()
    scales = torch.tensor([0.5, 0.125])
    codes, index = (
        torch.zeros(2, 256, dtype=torch.uint8),
        torch.tensor([[0, 1], [1, 1]], dtype=torch.int32),
    )
    weight = BitVec(codes, index, line, scales, 4, 128)
    assert weight.unit().tolist() == [[0.5, 0.125], [0.125, 0.125]]
    first = -8.0 if bias else 0.0
    assert weight.points().tolist() == [first + i for i in range(16)]


@given(WEIGHTS)
def test_unit_and_points_describe_the_levels(weight: BitVec):
    table = levels(coefficients(weight.lines, weight.scales), weight.bits)
    chosen = table[weight.index.long().flatten()].double().sort(dim=1).values
    steps = (chosen[:, -1] - chosen[:, 0]) / ((1 << weight.bits) - 1)
    assert torch.allclose(weight.unit().double().flatten(), steps, rtol=1e-5)
    points = weight.points()
    assert points.shape == (1 << weight.bits,)
    assert (points.diff() >= 0).all()
    expected = (chosen / steps.clamp_min(1e-30)[:, None]).mean(dim=0)
    assert torch.allclose(
        points.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


def test_a_group_of_zeros_has_no_unit():
    weight = dataclasses.replace(random_bitvec(2, 128), scales=torch.zeros(1))
    assert not weight.unit().any()
    assert not weight.points().any()


def test_there_are_no_fp8_activations():
    with pytest.raises(ValueError, match="16-bit activations only"):
        random_bitvec(2, 64).scheme(True)
    assert not BitVecScheme(4, 128, True, 8, 1).fp8_activations


# config.json

SCHEMES = st.builds(
    BitVecScheme,
    BITS,
    st.sampled_from([64, 128, 256]),
    st.booleans(),
    st.integers(1, 256),
    st.integers(1, 256),
)


@given(SCHEMES)
def test_a_scheme_reads_back(scheme: BitVecScheme):
    group = json.loads(json.dumps(scheme.as_json(["a", "b"])))
    assert group["targets"] == ["a", "b"]
    assert BitVecScheme.from_json(group) == scheme


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_bits": 1}, "1 bit planes, expected 2 … 8"),
        ({"num_bits": 9}, "9 bit planes, expected 2 … 8"),
        ({"num_bits": True}, "sizes must be whole numbers"),
        ({"num_bits": 4.0}, "sizes must be whole numbers"),
        ({"num_bits": "4"}, "sizes must be whole numbers"),
        ({"group_size": 100}, "group size 100, expected one of 64, 128, 256"),
        ({"group_size": None}, "sizes must be whole numbers"),
        ({"bias": 1}, "bias true or false"),
        ({"bias": None}, "bias true or false"),
        ({"lines": 0}, "0 × 2 lines, expected 1 … 65536"),
        ({"lines": True}, "sizes must be whole numbers"),
        ({"lines": 32769}, "32769 × 2 lines"),
        ({"scales": 0}, "8 × 0 lines"),
        ({"scales": -1}, "8 × -1 lines"),
        ({"type": "int"}, "format bitvec have"),
        ({"symmetric": True}, "format bitvec have"),
    ],
)
def test_schemes_that_are_not_understood_are_refused(changes: dict[str, Any], says: str):
    config = native_config({"a": BitVecScheme(4, 128, True, 8, 2)}, [], None)
    config["config_groups"]["group_0"]["weights"] |= changes
    for read in (
        lambda c: BitVecScheme.from_json(c["config_groups"]["group_0"]),
        lambda c: packed_linears(c, ["a"]),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            read(config)
        assert says in str(caught.value)


@pytest.mark.parametrize("key", ["num_bits", "type", "group_size", "bias", "lines", "scales"])
def test_no_field_may_be_missing(key: str):
    group = BitVecScheme(4, 128, True, 8, 2).as_json(["a"])
    del group["weights"][key]
    with pytest.raises(ValueError, match="format bitvec have"):
        BitVecScheme.from_json(group)


def test_fp8_activations_are_refused():
    group = BitVecScheme(4, 128, True, 8, 2).as_json(["a"])
    group["input_activations"] = IntScheme(4, 128, True).as_json(["a"])["input_activations"]
    with pytest.raises(ValueError, match="format bitvec have"):
        BitVecScheme.from_json(group)


def test_integers_and_bit_vectors_share_a_config():
    schemes = {
        "x.q": IntScheme(4, 128, False),
        "x.k": BitVecScheme(4, 128, True, 256, 1),
        "x.v": BitVecScheme(4, 128, True, 32, 8),
        "x.o": BitVecScheme(4, 128, True, 256, 1),
    }
    config = json.loads(json.dumps(native_config(schemes, ["x.up", "lm_head"], None)))
    assert len(config["config_groups"]) == 3
    linears = [*schemes, "x.up", "lm_head"]
    assert schemes_in(config, linears) == packed_linears(config, linears) == schemes
    assert PqConfig(**config).to_dict() == config


def test_compressed_tensors_holds_no_bit_vectors():
    config = quantization_config({"a": IntScheme(4, 128, False)}, [])
    wrong = copy.deepcopy(config) | {
        "config_groups": {"group_0": BitVecScheme(4, 128, True, 8, 1).as_json(["Linear"])}
    }
    assert schemes_in(config, ["a"])
    with pytest.raises((ValueError, KeyError)):
        schemes_in(wrong, ["a"])
