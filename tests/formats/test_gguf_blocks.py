"""llama.cpp's blocks beside the package `gguf`, which has the same arithmetic in NumPy."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from quantize.formats.gguf.blocks import (
    BLOCK,
    KINDS,
    BlockScheme,
    PackedBlocks,
    export,
    nearest_q8,
)
from quantize.formats.packed_int import PackedInt

ROWS, GROUPS = 7, 3


def number(kind: str) -> Any:
    return gguf.GGMLQuantizationType(KINDS[kind].number)


def random_blocks(kind: str) -> PackedBlocks:
    low, bits = KINDS[kind].lowest, KINDS[kind].bits
    codes = torch.randint(low, low + (1 << bits), (ROWS, GROUPS * BLOCK), dtype=torch.int32)
    scale = (torch.randn(ROWS, GROUPS) * 0.1).half()
    minimum = torch.randn(ROWS, GROUPS).half() if KINDS[kind].has_minimum else None
    return PackedBlocks(kind, codes.to(torch.int8), scale, minimum)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_mean_what_the_package_makes_of_them(kind: str):
    packed = random_blocks(kind)
    (stored,) = packed.tensors().values()
    assert gguf.GGML_QUANT_SIZES[number(kind)] == (BLOCK, KINDS[kind].bytes)
    theirs = dequantize(stored.numpy(), number(kind))
    assert np.array_equal(theirs, packed.unpack().numpy())
    back = BlockScheme(kind).read(packed.tensors())
    assert torch.equal(back.codes, packed.codes)
    assert torch.equal(back.scale, packed.scale)
    assert torch.equal(back.unpack(), packed.unpack())
    assert BlockScheme.from_json(BlockScheme(kind).as_json(["Linear"])) == BlockScheme(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_package_quantizes_is_read(kind: str):
    weight = torch.randn(ROWS, GROUPS * BLOCK)
    stored = torch.from_numpy(quantize(weight.numpy(), number(kind)))
    packed = PackedBlocks.from_bytes(stored, kind)
    assert np.array_equal(dequantize(stored.numpy(), number(kind)), packed.unpack().numpy())
    assert torch.equal(packed.tensors()[KINDS[kind].suffix], stored)
    assert packed.bits_per_weight == 8 * stored.nbytes / weight.numel()


def test_the_worked_bytes():
    codes = torch.zeros(1, BLOCK, dtype=torch.int8)
    codes[0, 0], codes[0, BLOCK // 2] = -8, 7
    data = PackedBlocks("q4_0", codes, torch.ones(1, 1).half()).tensors()["weight_q4_0"]
    assert data[0, :3].tolist() == [0x00, 0x3C, 0xF0]


def test_eight_bits_are_as_near_as_the_packages():
    kind = "q8_0"
    weight = torch.randn(64, 4 * BLOCK) * torch.rand(64, 1)
    theirs = torch.from_numpy(dequantize(quantize(weight.numpy(), number(kind)), number(kind)))
    ours = nearest_q8(weight).unpack()
    assert (ours - weight).square().sum() <= (theirs - weight).square().sum() * 1.001
    assert torch.equal(nearest_q8(ours * 0).unpack(), ours * 0)


def integers(bits: int, group: int, scale: Tensor) -> PackedInt:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (len(scale), scale.shape[1] * group), dtype=torch.int32)
    return PackedInt(codes.to(torch.int8), scale.bfloat16(), bits, group)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_integers_keep_every_value(bits: int, group: int):
    scale = torch.randn(5, 2) * 0.01
    packed = integers(bits, group, scale)
    made = export(packed)
    assert (made.scales, made.rounded, made.change) == (10, 0, 0.0)
    assert made.blocks.kind == ("q4_0" if bits <= 4 else "q8_0")
    assert torch.equal(made.blocks.unpack(), packed.unpack())


def test_scales_that_float16_does_not_hold_are_counted():
    scale = torch.tensor([[0.01, 1e-6], [2.0**-30, -1.5e-5]])
    made = export(integers(4, 64, scale))
    stored = scale.bfloat16().float()
    held = stored.half().float()
    assert made.rounded == int((held != stored).sum()) >= 2
    change = ((held - stored).abs() / stored.abs()).max()
    assert made.change == pytest.approx(float(change)) == 1.0  # 2^-30 is gone


def test_what_blocks_do_not_hold():
    with pytest.raises(ValueError, match="groups of 16 inputs are no whole blocks"):
        export(integers(4, 16, torch.ones(2, 4)))
    with pytest.raises(ValueError, match="above 65504"):
        export(integers(4, 32, torch.full((2, 1), 1e6)))
    with pytest.raises(ValueError, match="48 inputs are no multiple"):
        BlockScheme("q4_0").layout(4, 48)
    with pytest.raises(ValueError, match="has no minimum"):
        PackedBlocks("q4_0", torch.zeros(1, 32, dtype=torch.int8), *[torch.ones(1, 1).half()] * 2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        PackedBlocks.from_bytes(torch.full((1, 18), 255, dtype=torch.uint8), "q4_0")
    with pytest.raises(ValueError, match="only q4_0, q4_1, q8_0 are read"):
        BlockScheme.from_json({"format": "q4_k", "targets": []})
    with pytest.raises(ValueError, match="no FP8"):
        random_blocks("q4_1").scheme(fp8_activations=True)
