"""Groups where the one asked for does not divide the inputs: the rule, and that stock
compressed-tensors reads what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import ARCHITECTURES
from torch import nn

from quantize.block.block import Block
from quantize.formats.compressed_tensors import quantization_config
from quantize.formats.grouping import ADAPTED, adaptation, adapted_lines, fitting_group
from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.formats.registry import schemes_in
from quantize.methods.rtn import Rtn
from quantize.serving.int_linear import IntLinear


@pytest.mark.parametrize(
    ("asked", "inputs", "group"),
    [
        (128, [576], 64),
        (128, [640], 128),
        (128, [172], None),
        (128, [100], None),
        (128, [960], 64),
        (128, [96], 32),
        (64, [640], 64),
        (96, [576], 96),
        (96, [640], 64),
        (256, [640], 128),
        (512, [768], 128),
        (48, [128], 32),
        (16, [100], None),
        (128, [576, 1536], 64),
        (128, [128, 96], 32),
        (128, [64, 100], None),
    ],
)
def test_the_largest_group_that_divides(asked: int, inputs: list[int], group: int | None):
    assert fitting_group(asked, inputs) == group


ARCH = replace(
    ARCHITECTURES["llama"], roles={"o": "o"}, calibration_order=(("o",),), edges=(), residual={}
)


def encoded(K: int, bits: int, asked: int, seed: int) -> PackedInt:
    """A weight [6, K] as rtn packs it, alone in a block."""
    module = nn.Module()
    module.o = nn.Linear(K, 6, bias=False).requires_grad_(False)
    module.o.weight.data = torch.randn(6, K, generator=torch.Generator().manual_seed(seed))
    block = Block(
        0,
        ARCH,
        None,
        module,
        {},
        None,
        [],
        None,
        torch.device("cpu"),
        0,  # type: ignore[arg-type]
    )
    Rtn(bits=bits, group_size=asked).apply(block)
    found = block.packed["o"]
    assert isinstance(found, PackedInt)
    assert (ADAPTED in block.report["o"]) == (found.group_size != asked or found.channelwise)
    return found


@settings(max_examples=60)
@given(
    st.integers(16, 1100),
    st.sampled_from([4, 8]),
    st.sampled_from([128, 64, 96, 256]),
    st.integers(0, 99),
)
@example(100, 4, 128, 0)
@example(172, 4, 128, 0)
@example(576, 8, 128, 0)
@example(1099, 8, 128, 0)
@example(17, 4, 128, 0)
def test_every_number_of_inputs_reads_back_in_stock_compressed_tensors(
    K: int, bits: int, asked: int, seed: int
):
    packed = encoded(K, bits, asked, seed)
    scheme = packed.scheme(False)
    assert scheme == IntScheme(bits, fitting_group(asked, [K]), False)
    section = json.loads(json.dumps(quantization_config({"a": scheme}, [])))
    assert schemes_in(section, ["a"]) == {"a": scheme}
    tensors = packed.tensors()
    assert {s: (t.dtype, tuple(t.shape)) for s, t in tensors.items()} == scheme.layout(6, K)
    theirs = PackedQuantizationCompressor.decompress(
        dict(tensors), QuantizationScheme.model_validate(section["config_groups"]["group_0"])
    )["weight"]
    # What their dequantization gives is in the scales' own dtype.
    assert torch.equal(theirs.float(), packed.unpack().to(torch.bfloat16).float())
    back = scheme.read(tensors)
    assert back.scheme(False) == scheme
    assert torch.equal(back.unpack(), packed.unpack())
    stored = tensors["weight_packed"].nbytes + tensors["weight_scale"].nbytes
    assert packed.bits_per_weight == pytest.approx(stored * 8 / (6 * K), rel=1e-12)
    assert scheme.stored_bits(6, K) == packed.bits_per_weight
    layer = IntLinear(K, 6, False, scheme)
    layer.load_state_dict(tensors)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(seed))
    wanted = x.double() @ packed.unpack().double().T
    assert float((layer(x).double() - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_whole_rows_are_one_group_and_no_other():
    codes = torch.zeros(2, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="64 inputs in groups of 32 are not channel-wise"):
        PackedInt(codes, torch.ones(2, 2, dtype=torch.bfloat16), 4, 32, channelwise=True)
    section = quantization_config({"a": IntScheme(4, None, False)}, [])
    weights = section["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    for change in ({"group_size": 64}, {"strategy": "group"}):
        wrong = json.loads(json.dumps(section))
        wrong["config_groups"]["group_0"]["weights"] |= change
        with pytest.raises(ValueError, match="strategy"):
            schemes_in(wrong, ["a"])


def test_changes_are_told_together():
    layers = {f"q{i}": {ADAPTED: adaptation((64, 576), 128, 64, lost_fp8=False)} for i in range(3)}
    layers |= {
        "a": {ADAPTED: adaptation((64, 172), 128, None, lost_fp8=False)},
        "b": {ADAPTED: adaptation((192, 576), 128, 64, lost_fp8=True)},
        "c": {ADAPTED: adaptation((256, 256), 128, 128, lost_fp8=True)},
        "d": {ADAPTED: adaptation((256, 256), 128, 64, lost_fp8=False)},
        "e": {ADAPTED: adaptation((64, 192), 128, 32, lost_fp8=False)},
        "f": {"weight_error": 0.1},
        "odd": {ADAPTED: "?"},
        "older": {ADAPTED: {"group_size": 3}},
    }
    assert adaptation((128, 128), 128, 128, lost_fp8=False) is None
    assert adapted_lines(layers) == [
        "3 linears: group 64 instead of 128 (576 inputs)",
        "1 linear: one group a row instead of group 128 (172 inputs)",
        "1 linear: group 64 instead of 128, 16-bit activations instead of FP8 (576 inputs, 192 outputs)",
        "1 linear: 16-bit activations instead of FP8 (as the linears packed with it)",
        "1 linear: group 64 instead of 128 (as the linears packed with it)",
        "1 linear: group 32 instead of 128 (as the linears packed with it)",
    ]
