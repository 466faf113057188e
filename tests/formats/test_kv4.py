"""INT4 keys and values: the numbers they read back as, and the bytes they take."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.formats.kv4 import KvCodes, KvScheme, dequantize, fake_quantize, quantize

SCHEMES = [
    KvScheme(g, symmetric, dtype)
    for g in (128, 16)
    for symmetric in (True, False)
    for dtype in ("bfloat16", "e4m3")
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
schemes = st.sampled_from(SCHEMES)
seeds = st.integers(0, 2**31)


def some(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    """Normal numbers with a few channels far larger than the rest, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    channel = 1 + 9 * (torch.rand(shape[-1], generator=generator) < 0.1)
    return torch.randn(shape, generator=generator) * channel * size


def spread(x: Tensor, codes: KvCodes, scheme: KvScheme) -> tuple[Tensor, Tensor]:
    """Scale of every channel and the scale it would have unrounded, float64 [..., d]."""
    group = scheme.group(x.shape[-1])
    groups = x.double().unflatten(-1, (-1, group))
    if scheme.symmetric:
        ideal = groups.abs().amax(-1) / 7
    else:
        ideal = (groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)) / 15
    return codes.scale.double().repeat_interleave(group, -1), ideal.repeat_interleave(group, -1)


def test_worked_bits():
    scheme = KvScheme()
    codes = quantize(torch.tensor([0.5, -3.5, 7.0, -0.4]), scheme)
    assert codes.packed.tolist() == [0x48, 0x8F]
    assert codes.scale.dtype == torch.bfloat16
    assert codes.scale.tolist() == [1.0]
    assert codes.records().tolist() == [0x48, 0x8F, 0x80, 0x3F]
    assert dequantize(codes, scheme, torch.float32).tolist() == [0.0, -4.0, 7.0, 0.0]
    uneven = quantize(
        torch.tensor([-5.0, 10.0, 0.0, 2.4]), KvScheme(symmetric=False, scale_dtype="e4m3")
    )
    assert uneven.packed.tolist() == [0xF0, 0x75]
    assert uneven.zero is not None
    assert uneven.zero.tolist() == [5]
    assert uneven.records().tolist() == [0xF0, 0x75, 0x38, 5]


@given(schemes, seeds, st.sampled_from(FLOATS))
def test_fake_quantize_is_quantize_and_dequantize_bit_for_bit(
    scheme: KvScheme, seed: int, dtype: torch.dtype
):
    x = some(seed, 2, 3, 32).to(dtype)
    fake, real = fake_quantize(x, scheme), dequantize(quantize(x, scheme), scheme, torch.float32)
    assert fake.dtype == torch.float32
    assert torch.equal(fake.view(torch.int32), real.view(torch.int32))  # −0 would differ


@given(schemes, seeds, st.integers(-100, 100))
def test_error_is_at_most_half_a_step_plus_what_the_scale_rounds_away(
    scheme: KvScheme, seed: int, exponent: int
):
    x = some(seed, 4, 32, size=2.0**exponent)
    codes = quantize(x, scheme)
    stored, ideal = spread(x, codes, scheme)
    error = (dequantize(codes, scheme, torch.float32).double() - x.double()).abs()
    steps = 7 if scheme.symmetric else 15
    assert (error <= (stored / 2 + steps * (stored - ideal).abs()) * (1 + 1e-5)).all()
    if scheme.scale_dtype == "bfloat16":
        assert (error <= ideal * 0.5 * 1.2).all()


@given(schemes, seeds)
def test_a_float64_reference_finds_the_same_codes(scheme: KvScheme, seed: int):
    # A quotient of two bfloat16 numbers is never so near a tie that float32 takes it for one.
    x = some(seed, 3, 32).to(torch.bfloat16)
    codes = quantize(x, scheme)
    stored, ideal = spread(x, codes, scheme)
    zero: Tensor | float = (
        8.0
        if codes.zero is None
        else codes.zero.double().repeat_interleave(32 // codes.zero.shape[-1], -1)
    )
    nibbles = (torch.round(x.double() / stored) + zero).clamp(0, 15)
    expected = nibbles[..., 0::2] + 16 * nibbles[..., 1::2]
    assert codes.packed.tolist() == expected.tolist()
    assert dequantize(codes, scheme, torch.float32).double().equal((nibbles - zero) * stored)
    assert (stored - ideal).abs().div(ideal).max() <= (
        2**-8 if scheme.scale_dtype == "bfloat16" else 2**-4
    )


@given(seeds, st.sampled_from([128, 16]), st.integers(-110, 100))
def test_rounding_again_changes_nothing(seed: int, group: int, exponent: int):
    scheme = KvScheme(group)
    once = fake_quantize(some(seed, 4, 32, size=2.0**exponent), scheme)
    assert torch.equal(fake_quantize(once, scheme), once)


@given(schemes, st.lists(st.integers(0, 255), min_size=16, max_size=16))
def test_every_byte_reads_back(scheme: KvScheme, packed: list[int]):
    groups = 32 // scheme.group(32)
    real = quantize(some(0, 32), scheme)
    codes = dataclasses.replace(real, packed=torch.tensor(packed, dtype=torch.uint8))
    again = KvCodes.from_records(codes.records(), scheme, 32)
    assert torch.equal(again.packed, codes.packed)
    assert torch.equal(again.scale.view(torch.uint8), codes.scale.view(torch.uint8))
    assert again.scale.shape == (groups,)
    assert scheme.symmetric == (again.zero is None)
    if again.zero is not None and codes.zero is not None:
        assert torch.equal(again.zero, codes.zero)
    zero = 8 if codes.zero is None else codes.zero.repeat_interleave(32 // groups)
    nibbles = torch.tensor([n for byte in packed for n in (byte & 15, byte >> 4)])
    values = (nibbles - zero) * codes.scale.float().repeat_interleave(32 // groups)
    assert torch.equal(dequantize(again, scheme, torch.float32), values)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_bytes_are_those_announced(scheme: KvScheme, head_dim: int):
    scheme = dataclasses.replace(scheme, group_size=min(scheme.group_size, 64))
    records = quantize(some(0, 2, 3, head_dim), scheme).records()
    assert records.shape == (2, 3, scheme.record_bytes(head_dim))
    assert scheme.bits_per_value(head_dim) == 8 * records.shape[-1] / head_dim


def test_bits_per_value_count_scales_and_zero_points():
    assert KvScheme().bits_per_value(64) == 4.25
    assert KvScheme(32, False, "e4m3").bits_per_value(64) == 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme: KvScheme):
    x = torch.zeros(2, 32)
    x[1, 20] = 3.0
    values = fake_quantize(x, scheme)
    assert torch.equal(values[0], torch.zeros(32))
    assert torch.equal(values[1] != 0, x[1] != 0)
    assert torch.equal(dequantize(quantize(-x, scheme), scheme, torch.float32)[0], torch.zeros(32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_of_one_sign_keep_their_size(scheme: KvScheme):
    x = 5 + torch.rand(4, 32, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        assert (fake_quantize(sign * x, scheme) / (sign * x) - 1).abs().max() < 0.15


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30, 1e38])
def test_tiny_and_huge_numbers_stay_finite(scheme: KvScheme, size: float):
    values = fake_quantize(some(0, 4, 32).clamp(-2, 2) * size, scheme)
    assert values.isfinite().all()
    assert values.abs().max() <= 2.3 * size + 1e-38  # half a step beyond the range at most


def test_e4m3_scales_have_a_floor_and_a_ceiling():
    scheme = KvScheme(scale_dtype="e4m3")
    x = torch.tensor([[7e-5, -7e-5], [2.0**-9, -(2.0**-8)], [1e5, -1e5], [448.0 * 7, 448.0]])
    codes = quantize(x, scheme)
    assert codes.scale.dtype == torch.float8_e4m3fn
    assert codes.scale.float().flatten().tolist() == [2.0**-9, 2.0**-9, 448.0, 448.0]
    expected = [[0.0, 0.0], [2.0**-9, -(2.0**-8)], [448.0 * 7, -448.0 * 8], [448.0 * 7, 448.0]]
    assert dequantize(codes, scheme, torch.float32).tolist() == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_group_alone(scheme: KvScheme, bad: float):
    x = some(0, 2, 32)
    clean = fake_quantize(x, scheme)
    x[1, 20] = bad
    hit = torch.zeros(2, 32, dtype=torch.bool)
    group = scheme.group(32)
    hit[1, 20 // group * group : (20 // group + 1) * group] = True
    codes = quantize(x, scheme)
    for values in (fake_quantize(x, scheme), dequantize(codes, scheme, torch.float32)):
        assert torch.equal(values.isnan(), hit)
        assert torch.equal(values[~hit], clean[~hit])
    again = KvCodes.from_records(codes.records(), scheme, 32)
    assert torch.equal(dequantize(again, scheme, torch.float32).isnan(), hit)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layout_in_memory_does_not_matter(scheme: KvScheme):
    base = some(0, 2, 5, 3, 64)
    for x in (
        base.transpose(1, 2),
        base[..., ::2],
        base.permute(3, 0, 1, 2),
        base[:, :0],
        base[:1].expand(4, 5, 3, 64),
    ):
        if x.shape[-1] % 2:
            x = x[..., :2]
        dense = x.contiguous()
        before = dense.clone()
        assert torch.equal(fake_quantize(x, scheme), fake_quantize(dense, scheme))
        codes, expected = quantize(x, scheme), quantize(dense, scheme)
        assert torch.equal(codes.records(), expected.records())
        assert codes.packed.shape == (*x.shape[:-1], x.shape[-1] // 2)
        assert torch.equal(x, before)  # inputs are left alone
        # records read back from a view of larger memory, as a cache hands them out
        wide = torch.cat([expected.records(), expected.records()], dim=-2).transpose(0, -2)
        there = KvCodes.from_records(wide, scheme, x.shape[-1])
        assert torch.equal(
            dequantize(there, scheme, torch.float32).transpose(0, -2)[..., : x.shape[-2], :],
            fake_quantize(x, scheme),
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    x = some(3, 4, 64).to(dtype)
    for scheme in SCHEMES:
        assert torch.equal(fake_quantize(x, scheme), fake_quantize(x.float(), scheme))
        codes = quantize(x, scheme)
        half = dequantize(codes, scheme, dtype)
        assert half.dtype == dtype
        assert torch.equal(half, dequantize(codes, scheme, torch.float32).to(dtype))


def test_heads_that_cannot_be_stored_are_refused():
    for head_dim, words in (
        (63, "head_dim 63 is odd"),
        (0, "head_dim 0"),
        (192, "192 is no multiple of group_size 128"),
    ):
        with pytest.raises(ValueError, match=words):
            KvScheme().group(head_dim)
    with pytest.raises(ValueError, match="odd"):
        quantize(torch.ones(2, 63), KvScheme())
    with pytest.raises(ValueError, match="odd"):
        fake_quantize(torch.ones(2, 63), KvScheme())
    with pytest.raises(ValueError, match=r"not torch\.int32"):
        quantize(torch.ones(2, 64, dtype=torch.int32), KvScheme())
    with pytest.raises(ValueError, match=r"expected uint8 \[\.\.\., 34\] for head_dim 64"):
        KvCodes.from_records(torch.zeros(2, 33, dtype=torch.uint8), KvScheme(), 64)
    assert KvScheme().group(96) == 96
    assert KvScheme().group(256) == 128


@pytest.mark.parametrize("scheme", SCHEMES)
def test_json_reads_back(scheme: KvScheme):
    assert KvScheme.from_json(scheme.as_json()) == scheme


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 8}, "8 bits are not supported"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 0}, "group_size 0 is not positive"),
        ({"group_size": "128"}, "expected int"),
        ({"symmetric": 1}, "expected bool"),
        ({"scale_dtype": "float16"}, "none of bfloat16, e4m3"),
        ({"rotation": None}, "too many: rotation"),
    ],
)
def test_json_that_is_not_ours_is_refused(change: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        KvScheme.from_json(KvScheme().as_json() | change)
    with pytest.raises(ValueError, match="missing or too many: bits"):
        KvScheme.from_json({k: v for k, v in KvScheme().as_json().items() if k != "bits"})
