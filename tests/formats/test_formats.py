from __future__ import annotations

import bisect
import itertools
import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.formats.compressed_tensors import quantization_config
from quantize.formats.fp8 import E4M3_MAX, e4m3, quantize_activations
from quantize.formats.packed_int import (
    IntScheme,
    PackedInt,
    pack_codes,
    unpack_codes,
    words_per_row,
)
from quantize.formats.registry import schemes_in
from quantize.solvers.grid import Grid

SHAPES = st.tuples(st.integers(2, 8), st.integers(1, 4), st.integers(1, 131), st.integers(0, 2**31))


def random_codes(bits: int, N: int, K: int, seed: int = 0) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(
        -half, half, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )


def random_packed(bits: int = 4, N: int = 3, K: int = 64, group_size: int = 32) -> PackedInt:
    scale = (torch.rand(N, K // group_size, generator=torch.Generator().manual_seed(1)) + 0.1).to(
        torch.bfloat16
    )
    return PackedInt(random_codes(bits, N, K), scale, bits, group_size)


# Packed words


@settings(deadline=None)
@given(SHAPES)
def test_codes_survive_packing_and_match_compressed_tensors(drawn: tuple[int, int, int, int]):
    bits, N, K, seed = drawn
    codes = random_codes(bits, N, K, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (N, words_per_row(K, bits))
    assert torch.equal(unpack_codes(packed, bits, K), codes)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((N, K))), codes)


def test_the_worked_bits_of_the_docstring():
    row = torch.tensor([[-8, 7, 0, 1]])
    assert int(pack_codes(row, 4)[0, 0]) == 0x98F0
    # 3 bits: 0b111 at every place, the 11th code crosses into the second word.
    words = pack_codes(torch.full((1, 11), 3), 3)[0].tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0xFFFFFFFF, 1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_out_of_range_are_refused(bits: int):
    half = 1 << (bits - 1)
    for code in (-half - 1, half):
        with pytest.raises(ValueError, match=rf"{bits}-bit range \[{-half}, {half - 1}\]"):
            pack_codes(torch.tensor([[0, code]]), bits)
    assert pack_codes(torch.tensor([[-half, half - 1]]), bits).shape == (1, 1)


def test_packed_int_checks_what_it_holds():
    codes, scale = random_codes(4, 3, 64), torch.ones(3, 2, dtype=torch.bfloat16)
    PackedInt(codes, scale, 4, 32)
    with pytest.raises(ValueError, match="no multiple of the group 48"):
        PackedInt(codes, scale, 4, 48)
    with pytest.raises(ValueError, match="bfloat16"):
        PackedInt(codes, scale.double(), 4, 32)
    with pytest.raises(ValueError, match="int8"):
        PackedInt(codes.int(), scale, 4, 32)
    with pytest.raises(ValueError, match=r"scale is \(3, 1\), expected \(3, 2\)"):
        PackedInt(codes, scale[:, :1], 4, 32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_tensors_read_back_and_weigh_what_they_claim(bits: int):
    packed = random_packed(bits, N=4, K=128, group_size=32)
    tensors = packed.tensors()
    back = PackedInt.from_tensors(tensors, bits, 32)
    assert torch.equal(back.codes, packed.codes)
    assert torch.equal(back.scale, packed.scale)
    stored = tensors["weight_packed"].nbytes + tensors["weight_scale"].nbytes
    assert packed.bits_per_weight == stored * 8 / packed.codes.numel()


def test_tensors_that_disagree_are_refused():
    tensors = random_packed().tensors()
    with pytest.raises(ValueError, match="weight_packed"):
        PackedInt.from_tensors(tensors, 3, 32)
    with pytest.raises(ValueError, match="weight_packed"):
        PackedInt.from_tensors(tensors | {"weight_packed": tensors["weight_packed"].long()}, 4, 32)
    with pytest.raises(ValueError, match="scale is"):
        PackedInt.from_tensors(tensors, 4, 16)


def test_unpack_is_code_times_its_groups_scale():
    packed = random_packed(N=2, K=64, group_size=16)
    for n in range(2):
        for k in range(64):
            expected = float(packed.codes[n, k]) * float(packed.scale[n, k // 16])
            assert float(packed.unpack()[n, k]) == expected


# E4M3


def decode_e4m3(code: int) -> float:
    """OCP E4M3FN by hand: 4 exponent bits of bias 7, 3 mantissa bits, no infinity."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


VALUES = [
    decode_e4m3(code) for code in range(0x7F)
]  # the non-negative ones, in order; index = code


def nearest_even(x: float) -> float:
    above = bisect.bisect_left(VALUES, min(abs(x), E4M3_MAX))
    if VALUES[above] == abs(x) or above == 0:
        code = above
    else:
        down, up = abs(x) - VALUES[above - 1], VALUES[above] - abs(x)
        code = (
            above
            if up < down or (up == down and above % 2 == 0) or abs(x) > E4M3_MAX
            else above - 1
        )
    return math.copysign(VALUES[code], x)


def test_e4m3_decodes_like_the_standard():
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert all(
        math.isnan(decode_e4m3(c)) or float(decoded[c]) == decode_e4m3(c) for c in range(256)
    )
    assert int(decoded.isnan().sum()) == 2
    assert decode_e4m3(0x7E) == E4M3_MAX


def test_e4m3_rounds_to_nearest_even_everywhere():
    middles = [(a + b) / 2 for a, b in itertools.pairwise(VALUES)]
    points = torch.tensor([*VALUES, *middles, 449.0, 464.0, 480.0, 1e30], dtype=torch.float32)
    points = torch.cat(
        [points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(1e38))]
    )
    points = torch.cat([points, -points])
    expected = torch.tensor([nearest_even(float(p)) for p in points], dtype=torch.float32)
    assert torch.equal(e4m3(points), expected)


def test_activations_zero_huge_and_tiny_tokens():
    x = torch.zeros(3, 16)
    x[1, :3] = torch.tensor([1e30, -1e30, 1e20])
    x[2, 0] = 1e-12
    out = quantize_activations(x)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.equal(out[0], torch.zeros(16))
    assert torch.allclose(out[1, :2], x[1, :2], rtol=1e-6)
    assert float(out[2].abs().max()) <= 2 * 1e-12


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(-20, 20))
def test_activation_error_is_within_half_an_e4m3_step(seed: int, exponent: float):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    out = quantize_activations(x).double()
    scale = (x.abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp_min(1 / (E4M3_MAX * 512)).double()
    error = (out - x.double()).abs()
    normal = x.double().abs() >= 2.0**-6 * scale
    slack = 1 + 1e-5  # the division and the product are rounded to float32 too
    assert (
        error <= torch.where(normal, x.double().abs() * 2.0**-4, scale * 2.0**-10) * slack
    ).all()


# The law that a serving engine relies on: it sees bfloat16 scales only and derives its own FP8 scales from them.


@pytest.mark.parametrize("fit", ["absmax", "mse"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_reloaded_scales_give_the_weight_that_was_fitted(fit: str, spread: float):
    generator = torch.Generator().manual_seed(3)
    rows = 10.0 ** (spread * torch.randn(48, 1, generator=generator))
    groups = 10.0 ** (spread / 2 * torch.randn(48, 4, 1, generator=generator)).expand(
        48, 4, 128
    ).flatten(1)
    w = torch.randn(48, 512, generator=generator) * rows * groups * 0.02
    w[5, 128:256] = 0
    w[6] = 0
    grid = Grid(4, 128, product=True, fp8_scales=True)
    scale, factor = grid.fit_scale(w) if fit == "mse" else grid.absmax_scale(w)
    codes, values = grid.round(w, scale, factor)
    packed = grid.pack(codes, scale)
    assert torch.equal(packed.scale.float(), scale)
    assert torch.equal(grid.value(codes, grid.expand(scale), factor), values)
    assert torch.equal(packed.kernel_weight(), values)


def test_kernel_weights_stay_near_the_stock_weights():
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(32, 256, generator=generator) * 0.05
    grid = Grid(4, 128, product=True, fp8_scales=True)
    scale, factor = grid.absmax_scale(w)
    packed = grid.pack(grid.round(w, scale, factor)[0], scale)
    stock = packed.unpack()
    assert float((packed.kernel_weight() - stock).norm() / stock.norm()) < 2.0**-4


# config.json


def test_schemes_read_back_from_the_config():
    linears = [
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")
    ]
    everywhere = dict.fromkeys(linears, IntScheme(4, 128, True))
    config = quantization_config(everywhere, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert schemes_in(config, [*linears, "lm_head"]) == everywhere

    mixed = {
        linears[0]: IntScheme(4, 128, True),
        linears[1]: IntScheme(3, 64, False),
        linears[2]: IntScheme(4, 128, True),
    }
    config = quantization_config(mixed, ["lm_head", linears[3]])
    assert schemes_in(config, [*linears, "lm_head"]) == mixed
    assert all(group["format"] == "pack-quantized" for group in config["config_groups"].values())


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [("weights", {"type": "float"}, "only symmetric int groups"), ("weights", {"symmetric": False}, "symmetric"),
     ("input_activations", {"strategy": "tensor"}, "per-token FP8"), ("weights", {"strategy": "channel"}, "channel")],
)  # fmt: skip
def test_schemes_that_pq_does_not_write_are_refused(
    field: str, change: dict[str, object], says: str
):
    config = quantization_config({"a": IntScheme(4, 128, True)}, [])
    config["config_groups"]["group_0"][field] |= change
    with pytest.raises(ValueError, match=says):
        schemes_in(config, ["a"])
