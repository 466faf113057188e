"""Formats of small sources against float64, written out from their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_sources import rounded
from torch import Tensor

from quantize.formats.sources.fp8 import Fp8
from quantize.formats.sources.mxfp4 import Mxfp4
from quantize.formats.sources.registry import SOURCE_FORMATS, described, source_format_in
from quantize.formats.sources.source import Stored

NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
}


class Held:
    """Tensors in memory; notes how many rows of each were read."""

    def __init__(self, **tensors: Tensor) -> None:
        self.held = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.read = 0

    @property
    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in self.held.items()}

    def tensor(self, name: str) -> Tensor:
        return self.held[name]

    def rows(self, name: str, first: int, end: int) -> Tensor:
        assert 0 <= first < end <= len(self.held[name])
        self.read += end - first
        return self.held[name][first:end]


def fp8(held: Held, block: Any = (128, 128)) -> Stored:
    size = None if block is None else list(block)
    return Fp8().stored({"quant_method": "fp8", "weight_block_size": size}, held.kinds)


def blocks_of(codes: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """codes · scale in float64, weight by weight."""
    N, K = codes.shape[-2:]
    i = torch.arange(N).div(rows, rounding_mode="floor")
    j = torch.arange(K).div(columns, rounding_mode="floor")
    return codes.double() * scale.double()[..., i[:, None], j[None, :]]


def close(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-23, atol=0)


# FP8


@pytest.mark.parametrize(("N", "K"), [(256, 384), (200, 130), (1, 1), (128, 129), (576, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_the_last_of_which_may_be_cut_off(N: int, K: int, dtype: torch.dtype):
    codes, scale = rounded(torch.randn(N, K), 128, 128)
    held = Held(x__weight=codes, x__weight_scale_inv=scale.to(dtype))
    exact = blocks_of(codes, scale.to(dtype), 128, 128)
    found = fp8(held).tensors["x.weight"]
    close(found.values(0, N, held), exact)
    for first, end in ((0, 1), (N - 1, N), (N // 3, N // 2 + 1)):  # rows that begin within a block
        close(found.values(first, end, held), exact[first:end])


def test_rows_that_are_not_asked_for_are_not_read():
    codes, scale = rounded(torch.randn(512, 128), 128, 128)
    held = Held(x__weight=codes, x__weight_scale_inv=scale)
    fp8(held).tensors["x.weight"].values(200, 210, held)
    assert held.read == 10 + 1  # and one row of scales


def test_blocks_that_are_not_square_and_scales_that_are_powers_of_two():
    codes, _ = rounded(torch.randn(96, 160), 96, 160)
    exponents = torch.randint(-8, 8, (3, 3)).float().exp2()
    held = Held(x__weight=codes, x__weight_scale_inv=exponents.to(torch.float8_e8m0fnu))
    found = fp8(held, (32, 64)).tensors["x.weight"].values(0, 96, held)
    close(found, blocks_of(codes, exponents, 32, 64))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_tensor(shape: tuple[int, ...]):
    codes, scale = rounded(torch.randn(48, 80), 48, 80)
    held = Held(
        x__weight=codes, x__weight_scale=scale.reshape(shape), x__input_scale=torch.ones(())
    )
    stored = fp8(held, None)
    assert set(stored.dropped) == {"x.input_scale"}
    close(stored.tensors["x.weight"].values(5, 9, held), codes[5:9].double() * scale.double())


@pytest.mark.parametrize("block", [(128, 128), None])
def test_experts_in_one_tensor(block: tuple[int, int] | None):
    size = block or (160, 200)
    each = [rounded(torch.randn(160, 200), *size) for _ in range(3)]
    codes, scale = (torch.stack(parts) for parts in zip(*each, strict=True))
    held = Held(e__gate_up_proj=codes, e__gate_up_proj_scale_inv=scale)
    found = fp8(held, block).tensors["e.gate_up_proj"]
    exact = blocks_of(codes, scale, *size)
    close(found.values(1, 2, held), exact[1:2])
    assert held.read == 2  # one expert and its scales
    close(found.values(0, 3, held), exact)


CODES = torch.ones(256, 256).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"x__weight": CODES}, "x.weight is FP8 but its scale is missing"),
        ({"x__weight_scale_inv": torch.ones(2, 2)}, "x.weight_scale_inv is the scale of no FP8 tensor"),
        ({"x__weight": torch.ones(2, 2), "x__weight_scale_inv": torch.ones(1, 1)}, "the scale of no FP8 tensor"),
        ({"x__weight": CODES, "x__weight_scale_inv": torch.ones(2, 3)}, r"is \[2, 3\], .* implies \[2, 2\]"),
        ({"x__weight": CODES, "x__weight_scale_inv": torch.ones(4)}, r"is \[4\], .* implies \[2, 2\]"),
        ({"x__weight": CODES, "x__weight_scale_inv": torch.ones(())}, r"is \[\], .* implies \[2, 2\]"),
        ({"x__weight": CODES, "x__weight_scale_inv": torch.ones(2, 2, dtype=torch.int8)}, "is I8, expected one of F32"),
        ({"x__weight": CODES[0], "x__weight_scale_inv": torch.ones(2)}, "expected a matrix"),
        ({"x__weight": CODES.view(torch.float8_e5m2)}, "x.weight is F8_E5M2, which fp8 has no use for"),
        ({"x__weight": CODES, "x__weight_scale_inv": torch.ones(2, 2), "y": CODES.view(torch.int8)}, "y is I8"),
        ({"x__weight": torch.ones(2, 2)}, "says fp8 but no tensor is stored so; .* remove quantization_config"),
    ],
)  # fmt: skip
def test_fp8_that_does_not_fit_config_json(tensors: dict[str, Tensor], says: str):
    with pytest.raises(ValueError, match=says):
        fp8(Held(**tensors))


@pytest.mark.parametrize(
    "size", [[128], [128, 0], [128, -1], [1.5, 2], "128", 128, [True, True], {}]
)
def test_sizes_of_blocks_that_are_none(size: Any):
    section = {"quant_method": "fp8", "weight_block_size": size}
    with pytest.raises(ValueError, match=r"weight_block_size is .*, expected null or two numbers"):
        Fp8().stored(section, Held(x__weight=CODES, x__weight_scale_inv=torch.ones(2, 2)).kinds)
    with pytest.raises(ValueError, match="fmt is 'e5m2'"):
        Fp8().stored(section | {"fmt": "e5m2"}, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_positive_number(value: float):
    scale = torch.ones(2, 2)
    scale[1, 0] = value
    held = Held(x__weight=CODES, x__weight_scale_inv=scale)
    found = fp8(held).tensors["x.weight"]
    with pytest.raises(
        ValueError, match=r"x\.weight_scale_inv holds a scale that is negative or no number"
    ):
        found.values(0, 256, held)
    assert found.values(0, 128, held).eq(1).all()  # rows of other scales


def test_a_scale_of_zero_is_that_of_zeros():
    codes, scale = CODES.clone(), torch.ones(2, 2)
    scale[0, 1] = 0
    held = Held(x__weight=codes, x__weight_scale_inv=scale)
    found = fp8(held).tensors["x.weight"]
    with pytest.raises(ValueError, match=r"x\.weight_scale_inv is zero where the codes are not"):
        found.values(0, 256, held)
    codes[:128, 128:] = 0
    assert found.values(0, 256, held).sum() == 3 * 128 * 128


def test_codes_that_are_no_numbers():
    codes = CODES.clone()
    codes.view(torch.uint8)[7, 9] = 0x7F
    held = Held(x__weight=codes, x__weight_scale_inv=torch.ones(2, 2))
    with pytest.raises(ValueError, match="holds FP8 codes that are no numbers"):
        fp8(held).tensors["x.weight"].values(0, 256, held)


# MXFP4


def mxfp4(held: Held) -> Stored:
    return Mxfp4().stored({"quant_method": "mxfp4"}, held.kinds)


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def test_mxfp4_from_its_bits():
    E, N, G = 3, 5, 2
    blocks = torch.randint(0, 256, (E, N, G, 16), dtype=torch.uint8)
    scales = torch.randint(60, 190, (E, N, G), dtype=torch.uint8)
    exact = torch.zeros(E, 32 * G, N, dtype=torch.float64)
    for e in range(E):
        for n in range(N):
            for k in range(32 * G):
                byte = int(blocks[e, n, k // 32, k % 32 // 2])
                code = byte >> 4 if k % 2 else byte & 15
                exact[e, k, n] = e2m1(code) * 2.0 ** (int(scales[e, n, k // 32]) - 127)
    held = Held(x_blocks=blocks, x_scales=scales)
    found = mxfp4(held).tensors["x"]
    assert found.shape == (E, 64, N)
    assert torch.equal(found.values(0, E, held).double(), exact)
    held.read = 0
    assert torch.equal(found.values(2, 3, held).double(), exact[2:])
    assert held.read == 2  # one expert's blocks and scales


BLOCKS = torch.zeros(2, 4, 3, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"x_blocks": BLOCKS}, "x_blocks has no scales: x_scales is missing"),
        ({"x_scales": BLOCKS[..., 0]}, "x_scales is the scale of no blocks"),
        ({"x_blocks": BLOCKS, "x_scales": BLOCKS[:, :, :2, 0]}, r"U8 \[2, 4, 2\], its blocks imply U8 \[2, 4, 3\]"),
        ({"x_blocks": BLOCKS, "x_scales": torch.ones(2, 4, 3)}, r"is F32 \[2, 4, 3\], its blocks imply U8"),
        ({"x_blocks": BLOCKS[..., :8], "x_scales": BLOCKS[..., 0]}, r"expected U8 \[E, N, K / 32, 16\]"),
        ({"x_blocks": BLOCKS.float(), "x_scales": BLOCKS[..., 0]}, "x_blocks is F32"),
        ({"x_blocks": BLOCKS, "x_scales": BLOCKS[..., 0], "x": torch.ones(1)}, "x is stored twice"),
        ({"x": torch.ones(2, 2)}, "says mxfp4 but no tensor is stored so"),
    ],
)  # fmt: skip
def test_mxfp4_that_does_not_fit(tensors: dict[str, Tensor], says: str):
    with pytest.raises(ValueError, match=says):
        mxfp4(Held(**tensors))


def test_a_scale_of_mxfp4_that_is_no_number():
    held = Held(x_blocks=BLOCKS, x_scales=BLOCKS[..., 0].clone())
    held.held["x_scales"][1, 2, 0] = 255
    with pytest.raises(ValueError, match="x_scales holds a scale that is no number"):
        mxfp4(held).tensors["x"].values(1, 2, held)


# What is recognised


def ct(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"} | weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (ct("float-quantized"), "compressed-tensors float-quantized"),
        (ct("naive-quantized"), "compressed-tensors float-quantized"),
        (ct("naive-quantized", type="int"), None),
        (ct("int-quantized", type="int"), None),
        (ct("pack-quantized", num_bits=4, type="int"), None),
        (ct("mixed-precision"), None),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, None),
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": 3}}, None),
        ({"quant_method": "gptq"}, None),
        ({"quant_method": ["fp8"]}, None),
        ({}, None),
        (None, None),
        ("fp8", None),
    ],
)  # fmt: skip
def test_which_quantization_config_is_read(section: Any, name: str | None):
    form = source_format_in(section)
    assert (form.name if form else None) == name


def test_names_of_formats_are_their_own():
    assert len({form.name for form in SOURCE_FORMATS}) == len(SOURCE_FORMATS)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "awq", "w_bit": 4}, "awq 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized"),
        ({"quant_algo": "NVFP4"}, "no quant_method NVFP4"),
        ("gptq", "gptq"),
    ],
)  # fmt: skip
def test_others_are_named(section: Any, words: str):
    assert described(section) == words
