"""Products with packed INT4 weights without a kernel: their twin, what they refuse, and what compilers make of them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from int4s import KINDS, TOLERANCE, check, check_gated, random_weight, weight_of
from interpreted import activations
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.packed_int import IntScheme
from quantize.kernels.fp8.api import GROUP_SIZES, quantize_tokens
from quantize.kernels.fp8.reference import operand_order
from quantize.kernels.int4.api import (
    bytes_moved,
    fold,
    multiply,
    multiply_codes,
    multiply_gated,
    takes,
)
from quantize.kernels.int4.reference import Weight
from quantize.serving.int_linear import IntLinear


def hopper_code(dtype: torch.dtype, M: int, folded: bool) -> str:
    """PTX of a product for an H100, made without one."""
    triton, launch = (
        pytest.importorskip("triton"),
        pytest.importorskip("quantize.kernels.int4.launch"),
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, fp8, names = (
        launch.tile_for(M, dtype),
        dtype == torch.float8_e4m3fn,
        launch.int4_kernel.arg_names,
    )
    bfloat16 = triton.language.bfloat16
    fixed: dict[str, Any] = {
        "FP8": fp8,
        "FOLDED": folded,
        "GATED": False,
        "WHOLE": False,
        "CASTS": True,
        "GS": 128,
    }
    fixed |= {"DTYPE": bfloat16, "OPERAND": bfloat16, "BN": tile.BN, "BM": tile.BM, "bias": None}
    fixed |= {"up_packed": None, "up_scale": None, "up_factor": None} | (
        {} if folded else {"factor": None}
    )
    types = {
        "x": "*fp8e4nv" if fp8 else "*bf16",
        "token_scale": "*fp32",
        "packed": "*i32",
        "factor": "*fp32",
    }
    types |= {"scale": "*fp16" if folded else "*bf16", "out": "*fp32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    aligned = [name for name in names if name in types or name in ("N", "x_stride")]
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in fixed
    }
    source = ASTSource(
        launch.int4_kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stands_in(kind: str, dtype: torch.dtype):
    packed, up = random_weight(21, 192, 64), random_weight(21, 192, 64, seed=1)
    x = activations(5, 192, dtype, "cpu")
    assert not takes(4, 64, x, True)
    check(multiply(x, weight_of(packed), **KINDS[kind]), x, packed, kind)
    check_gated(
        multiply_gated(x, weight_of(packed), weight_of(up), **KINDS[kind]), x, packed, up, kind
    )


@pytest.mark.parametrize("spread", [1e-9, 0.02, 1e5])
def test_decoded_weights_are_those_of_the_format(spread: float):
    packed = random_weight(21, 256, 64, spread)
    weight = weight_of(packed)
    assert torch.equal(weight.decode(), packed.unpack())
    assert torch.equal(fold(weight).decode(), packed.kernel_weight())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_are_normalized_as_transformers_does_it(dtype: torch.dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = activations(5, 96, dtype, "cpu")
    codes, scale = quantize_tokens(x, norm.weight.detach(), 1e-5)
    with torch.no_grad():
        assert torch.equal(codes.float() * scale[:, None], quantize_activations(norm(x)))


def test_no_rows_give_no_rows():
    weight = weight_of(random_weight(21, 128))
    for options in KINDS.values():
        assert multiply(torch.zeros(3, 0, 128), weight, **options).shape == (3, 0, 21)
        assert multiply_gated(torch.zeros(3, 0, 128), weight, weight, **options).shape == (3, 0, 21)


def test_an_order_is_one_of_each_group():
    for folded in (False, True):
        for group_size in GROUP_SIZES:
            order = operand_order(256, group_size, folded).view(-1, group_size)
            assert torch.equal(order.sort(dim=1).values.flatten(), torch.arange(256))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_piece(kind: str):
    weight, x = weight_of(random_weight(21, 128)), activations(3, 128, torch.float16, "cpu")

    def product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        y = multiply(x, Weight(packed, scale), **KINDS[kind])
        return y + multiply_gated(x, Weight(packed, scale), Weight(packed, scale), **KINDS[kind])

    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, *weight[:2]), product(x, *weight[:2]))


@pytest.mark.parametrize("fp8", [False, True])
def test_the_packed_layer_compiles_and_passes_gradients(fp8: bool):
    packed = random_weight(40, 256)
    layer, x = (
        IntLinear(256, 40, False, IntScheme(4, 128, fp8)),
        activations(3, 256, torch.float32, "cpu"),
    )
    layer.load_state_dict(packed.tensors())
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    if not fp8:
        layer(x.requires_grad_()).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, packed.unpack().sum(0).expand(3, -1))


def test_operators_are_what_they_say():
    weight, x = weight_of(random_weight(21, 128)), activations(3, 128, torch.float16, "cpu")
    folded = fold(weight)
    codes, scale = quantize_tokens(x, group_size=128)
    shapes = (
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )  # E4M3 inputs cannot be compared for test_schema
    torch.library.opcheck(torch.ops.pq.fold_int4_scales.default, (weight.scale,))
    torch.library.opcheck(
        torch.ops.pq.quantize_tokens.default, (x, None, 1e-6, 128, True), test_utils=shapes
    )
    alone, both, product = (
        (*folded, None, None, None),
        (*folded, *folded),
        torch.ops.pq.int4_multiply.default,
    )
    torch.library.opcheck(product, (codes, scale, *alone, None, torch.bfloat16), test_utils=shapes)
    torch.library.opcheck(product, (codes, scale, *both, None, torch.bfloat16), test_utils=shapes)
    torch.library.opcheck(product, (x, None, *weight, None, None, None, None, torch.float16))


def test_bytes_moved():
    assert bytes_moved(1, 4096, 4096, 128, 2, True) == 4096 * 2048 + 4096 * 32 * 2 + 4100 + 8192
    assert (
        bytes_moved(1, 4096, 4096, 128, 2, False, weights=2)
        == 2 * (4096 * 2048 + 4096 * 32 * 2) + 8192 + 8192
    )


def test_what_does_not_fit_is_refused():
    weight, x = weight_of(random_weight(8, 256)), torch.randn(2, 256)
    with pytest.raises(ValueError, match=r"activations are torch\.float64"):
        multiply(x.double(), weight, fp8_activations=False)
    with pytest.raises(
        ValueError, match=r"packed is torch\.int32 \(8, 32\), expected torch\.int32 \(8, 16\)"
    ):
        multiply(x[:, :128], weight, fp8_activations=True)
    with pytest.raises(
        ValueError, match="256 inputs in 1 groups: a group must have 32, 64 or 128 inputs"
    ):
        multiply(x, Weight(weight.packed, weight.scale[:, :1].contiguous()), fp8_activations=False)
    with pytest.raises(ValueError, match="packed must be contiguous and on cpu"):
        multiply(x, Weight(weight.packed.T.contiguous().T, weight.scale), fp8_activations=False)
    with pytest.raises(ValueError, match=r"scale is torch\.float32"):
        multiply(x, Weight(weight.packed, weight.scale.float()), fp8_activations=False)
    with pytest.raises(ValueError, match=r"bias is \(7,\) on cpu, expected \(8,\) on cpu"):
        multiply(x, weight, torch.zeros(7), fp8_activations=True)
    with pytest.raises(ValueError, match="packed is"):
        multiply_gated(x, weight, weight_of(random_weight(9, 256)), fp8_activations=True)
    with pytest.raises(ValueError, match="the weight is folded, but the variant is 'exact'"):
        multiply(x, fold(weight), fp8_activations=True, variant="exact")
    with pytest.raises(
        ValueError, match="the weight is folded for E4M3 activations, but there are none"
    ):
        multiply(x, fold(weight), fp8_activations=False)
    with pytest.raises(ValueError, match="there is no variant 'exakt'"):
        multiply(x, weight, fp8_activations=True, variant="exakt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only one of gate and up is folded"):
        multiply_gated(x, fold(weight), weight, fp8_activations=True)
    codes, scale = quantize_tokens(x, group_size=128)
    with pytest.raises(ValueError, match=r"token_scale is torch\.float32 \(1,\)"):
        multiply_codes(codes, scale[:1], weight)
    with pytest.raises(ValueError, match=r"activations are torch\.float32, expected float8_e4m3fn"):
        multiply_codes(x, scale, weight)
    with pytest.raises(ValueError, match=r"norm is torch\.float64"):
        quantize_tokens(x, torch.ones(256).double())
    with pytest.raises(ValueError, match="96 inputs are no multiple"):
        quantize_tokens(x[:, :96], group_size=64)


@pytest.mark.parametrize(
    ("dtype", "rows", "kind"), [(0, 1, "exact"), (0, 99, "folded"), (1, 1, "W4A16")]
)
def test_hopper_multiplies_weights_from_registers(dtype: int, rows: int, kind: str):
    assert "wgmma" in (
        ptx := hopper_code((torch.float8_e4m3fn, torch.bfloat16)[dtype], rows, kind == "folded")
    )
    assert "ld.local" not in ptx
    # The left operand of a wgmma is either registers in braces, as the sums are, or a description of shared memory.
    assert all(line.count("{") == 2 for line in ptx.splitlines() if "wgmma.mma_async" in line)


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import quantize.serving.int_linear, quantize.kernels.int4.api"
    subprocess.run([sys.executable, "-c", code], check=True)
