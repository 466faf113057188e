"""Kernels for packed INT4 weights: in Triton's interpreter everywhere, on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so its tests run in a child process: this file, once more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.packed_int import IntScheme, PackedInt, pack_codes
from quantize.int_linear import IntLinear
from quantize.kernels import int4
from quantize.kernels.int4 import (
    Variant,
    bytes_moved,
    fold,
    gated,
    gated_codes,
    multiply,
    multiply_codes,
    quantize_tokens,
)
from quantize.kernels.int4_reference import (
    Weight,
    operand_order,
    quantize_reference,
)
from quantize.linear import PackedLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = ["cpu"] if INTERPRETED else [GPU]
KINDS: dict[str, dict[str, Any]] = {
    "W4A16": {"fp8_activations": False},
    "exact": {"fp8_activations": True, "variant": "exact"},
    "folded": {"fp8_activations": True, "variant": "folded"},
}

# Units of rounding of a result; Triton's interpreter cuts bfloat16 off.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}
# Of the sum of a result's terms' sizes: float32 sums, and on Hopper those of E4M3 products, which keep 13 bits or so.
OF_TERMS = {"cpu": 2**-18, "cuda": 2**-18, "cuda E4M3": 2**-10}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written stays NaN."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        if out.is_floating_point() and out.device.type != "meta":
            out.view(torch.uint8).fill_(0xFF)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


def random_weight(N: int, K: int, group_size: int = 128, spread: float = 0.02, seed: int = 0) -> PackedInt:
    """Codes of all sizes; scales that differ by up to 2⁸ within a row."""
    generator = torch.Generator().manual_seed(N + K + group_size + seed)
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=generator)
    scale = torch.exp2(-8 * torch.rand(N, K // group_size, generator=generator)) * spread
    return PackedInt(codes, scale.to(torch.bfloat16), 4, group_size)


def weight_of(packed: PackedInt, device: str = "cpu") -> Weight:
    return Weight(pack_codes(packed.codes, 4).to(device), packed.scale.to(device))


def activations(M: int, K: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of different sizes, with outliers, between NaN that belongs to no row."""
    generator = torch.Generator().manual_seed(M + K)
    x = torch.randn(M, K, generator=generator) * torch.logspace(-2, 1, M)[:, None]
    x[:, ::17] *= 20
    around = torch.full((M + 2, K + 70), float("nan"), dtype=dtype, device=device)
    around[1:-1, 3 : K + 3] = x.to(dtype)
    return around[1:-1, 3 : K + 3]


def exact_product(x: Tensor, packed: PackedInt, kind: str) -> tuple[Tensor, Tensor]:
    """x̂ Ŵᵀ in float64, and the sum of its terms' absolute values, which bounds what rounding can do."""
    x = (x.cpu() if kind == "W4A16" else quantize_activations(x.cpu())).double()
    values = (packed.kernel_weight() if kind == "folded" else packed.unpack()).double()
    return x @ values.T, x.abs() @ values.abs().T


def check(y: Tensor, x: Tensor, packed: PackedInt, kind: str, bias: Tensor | None = None) -> None:
    expected, size = exact_product(x, packed, kind)
    if bias is not None:
        expected, size = expected + bias.double().cpu(), size + bias.double().abs().cpu()
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    of_terms = OF_TERMS[f"{y.device.type} E4M3" if y.is_cuda and kind != "W4A16" else y.device.type]
    limit = TOLERANCE[x.dtype] * expected.abs() + of_terms * size + 1e-6
    assert bool(((y.double().cpu() - expected).abs() <= limit).all())


def check_gated(y: Tensor, x: Tensor, gate: PackedInt, up: PackedInt, kind: str) -> None:
    (gates, gate_size), (ups, up_size) = (exact_product(x, packed, kind) for packed in (gate, up))
    expected = F.silu(gates) * ups
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    of_terms = OF_TERMS[f"{y.device.type} E4M3" if y.is_cuda and kind != "W4A16" else y.device.type]
    size = 1.1 * gate_size * ups.abs() + F.silu(gates).abs() * up_size  # the slope of SiLU is 1.1 at most
    limit = (TOLERANCE[x.dtype] + 2**-18) * expected.abs() + of_terms * size + 1e-6
    assert bool(((y.double().cpu() - expected).abs() <= limit).all())


def hopper_code(dtype: torch.dtype, M: int, folded: bool) -> str:
    """PTX of a product for an H100, made without one."""
    triton, launch = pytest.importorskip("triton"), pytest.importorskip("quantize.kernels.int4_launch")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile, fp8, names = launch.tile_for(M, dtype), dtype == torch.float8_e4m3fn, launch.int4_kernel.arg_names
    bfloat16 = triton.language.bfloat16
    fixed: dict[str, Any] = {"FP8": fp8, "FOLDED": folded, "GATED": False, "WHOLE": False, "CASTS": True, "GS": 128}
    fixed |= {"DTYPE": bfloat16, "OPERAND": bfloat16, "BN": tile.BN, "BM": tile.BM, "bias": None}
    fixed |= {"up_packed": None, "up_scale": None, "up_factor": None} | ({} if folded else {"factor": None})
    types = {"x": "*fp8e4nv" if fp8 else "*bf16", "token_scale": "*fp32", "packed": "*i32", "factor": "*fp32"}
    types |= {"scale": "*fp16" if folded else "*bf16", "out": "*fp32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    aligned = [name for name in names if name in types or name in ("N", "x_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in fixed}
    source = ASTSource(launch.int4_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


@pytest.fixture(params=[1, 2], ids=["whole", "parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whole, and split over their inputs."""
    launch = pytest.importorskip("quantize.kernels.int4_launch")
    monkeypatch.setattr(launch, "_split", lambda G, *_: (1, G) if request.param == 1 else (-(-G // 2), 2))


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stdout:  # as by Triton 3.6 with NumPy 2.4
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 129])
@pytest.mark.usefixtures("parts")
def test_all_batches(M: int, kind: str, device: str):
    packed, up, dtype = random_weight(37, 256), random_weight(37, 256, seed=1), (torch.bfloat16, torch.float16)[M % 2]
    x, bias = activations(M, 256, dtype, device), torch.randn(37, device=device).to(dtype)
    check(multiply(x, weight_of(packed, device), bias, **KINDS[kind]), x, packed, kind, bias)
    check_gated(gated(x, weight_of(packed, device), weight_of(up, device), **KINDS[kind]), x, packed, up, kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
@pytest.mark.parametrize(("N", "K"), [(1, 128), (65, 384)])
def test_odd_sizes(N: int, K: int, group_size: int, kind: str, device: str):
    packed, up = random_weight(N, K, group_size), random_weight(N, K, group_size, seed=1)
    x, weights = activations(5, K, torch.float16, device), (weight_of(packed, device), weight_of(up, device))
    check(multiply(x, weights[0], **KINDS[kind]), x, packed, kind)
    check_gated(gated(x, *weights, **KINDS[kind]), x, packed, up, kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_32_alone(kind: str, device: str):
    packed, x = random_weight(9, 32, 32), activations(3, 32, torch.float16, device)
    check(multiply(x, weight_of(packed, device), **KINDS[kind]), x, packed, kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [3, 70])
def test_float32(M: int, kind: str, device: str):
    packed, x = random_weight(50, 256, 64), activations(M, 256, torch.float32, device)
    bias = torch.randn(50, device=device).half()
    check(multiply(x, weight_of(packed, device), bias, **KINDS[kind]), x, packed, kind, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [-60, -17, 10, 60])
def test_scales_of_any_size(power: int, kind: str, device: str):
    packed = random_weight(9, 256, spread=2.0**power)
    packed.scale[3] = 0
    packed.scale[4, 1] = 0
    weight = weight_of(packed, device)
    x = activations(4, 256, torch.float32, device)
    expected, size = exact_product(x, packed, kind)
    y = multiply(x, weight, **KINDS[kind]).double().cpu()
    of_terms = OF_TERMS["cuda E4M3" if device == "cuda" and kind != "W4A16" else device]
    assert bool(((y - expected).abs() <= 2**-21 * expected.abs() + of_terms * size).all())
    assert not y[:, 3].any()


@pytest.mark.parametrize("device", DEVICES)
def test_negative_scales_beside_16_bit_activations(device: str):
    packed = random_weight(9, 256)
    packed.scale.mul_(torch.tensor([1, -1])[:, None].repeat(5, 2)[:9])
    x = activations(4, 256, torch.bfloat16, device)
    check(multiply(x, weight_of(packed, device), fp8_activations=False), x, packed, "W4A16")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [4, 20])
def test_any_strides_and_axes(M: int, kind: str, device: str):
    weight, options = weight_of(random_weight(19, 128), device), KINDS[kind]
    straight = activations(M, 128, torch.float16, device)
    expected = multiply(straight, weight, **options)
    assert torch.equal(multiply(straight.T.contiguous().T, weight, **options), expected)
    cubed = multiply(straight.reshape(2, -1, 128), weight, **options)
    assert torch.equal(cubed, expected.view(2, -1, 19))
    assert multiply(straight[0], weight, **options).shape == (19,)
    assert gated(straight.reshape(2, -1, 128), weight, weight, **options).shape == (2, M // 2, 19)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["exact", "folded"])
def test_one_quantization_serves_several_products(variant: Variant, device: str):
    gate, up = weight_of(random_weight(19, 256), device), weight_of(random_weight(19, 256, seed=1), device)
    x = activations(3, 256, torch.float16, device).reshape(3, 1, 256)
    codes, scale = quantize_tokens(x, group_size=128, variant=variant)
    options: dict[str, Any] = {"variant": variant, "dtype": torch.float16}
    assert torch.equal(
        multiply_codes(codes, scale, gate, **options), multiply(x, gate, fp8_activations=True, variant=variant)
    )
    both = gated(x, gate, up, fp8_activations=True, variant=variant)
    assert torch.equal(gated_codes(codes, scale, gate, up, **options), both)
    if variant == "folded":
        assert torch.equal(gated_codes(codes, scale, fold(gate), fold(up), **options), both)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [32, 96, 1056, 4224])
def test_quantized_tokens(K: int, dtype: torch.dtype, device: str):
    x = activations(5, K, dtype, device)
    x[1] *= 1e-7
    x[2] = 0
    x[3] = torch.linspace(-448, 448, K)  # the E4M3 borders themselves
    codes, scale = quantize_tokens(x)
    assert torch.equal(codes.cpu().float() * scale.cpu()[:, None], quantize_activations(x.cpu()))
    for group_size in (size for size in int4.GROUP_SIZES if K % size == 0):
        for variant in ("exact", "folded"):
            placed, same = quantize_tokens(x, group_size=group_size, variant=variant)
            order = operand_order(K, group_size, variant == "folded")
            assert torch.equal(placed.cpu().float(), codes.cpu().float()[:, order])
            assert torch.equal(same, scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [32, 160, 1056, 4224])
def test_normalized_tokens(K: int, dtype: torch.dtype, device: str):
    x, norm = activations(5, K, dtype, device), torch.randn(K, device=device).to(dtype)
    x[2] = 0
    codes, scale = quantize_tokens(x, norm, 1e-5)
    expected, expected_scale = quantize_reference(x.cpu(), norm.cpu(), 1e-5)
    # Sums of squares in another order may move a value to the other side of a border, which is an eighth away.
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=2 * torch.finfo(dtype).eps, atol=0)
    difference = (codes.cpu().float() - expected.float()).abs()
    assert bool((difference <= expected.float().abs() / 7 + 2**-9).all())
    assert float((difference > 0).float().mean()) < 0.01
    placed, _ = quantize_tokens(x, norm, 1e-5, group_size=32)
    assert torch.equal(placed.cpu().float(), codes.cpu().float()[:, operand_order(K, 32, True)])


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_stays_in_its_row(device: str):
    weight, x = weight_of(random_weight(9, 128), device), activations(3, 128, torch.float16, device)
    x[1, 5] = float("nan")
    y = multiply(x, weight, fp8_activations=False)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())
    codes, _ = quantize_tokens(x)
    assert codes.float().isnan().nonzero().tolist() == [[1, 5]]
    x[1, 5] = float("inf")
    codes, _ = quantize_tokens(x)
    assert codes.float().isnan().nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float8_e4m3fn], ids=str)
def test_every_tile(dtype: torch.dtype, device: str):
    launch = pytest.importorskip("quantize.kernels.int4_launch")
    packed, up = random_weight(60, 128), random_weight(60, 128, seed=1)
    weights, rows = (weight_of(packed, device), weight_of(up, device)), 0
    for tile in launch.TILES[dtype]:
        M = tile.rows or rows + 6
        rows = M
        assert launch.tile_for(M, dtype) is tile
        for kind in ["W4A16"] if dtype != torch.float8_e4m3fn else ["exact", "folded"]:
            x = activations(M, 128, dtype if kind == "W4A16" else torch.float16, device)
            check(multiply(x, weights[0], **KINDS[kind]), x, packed, kind)
            check_gated(gated(x, *weights, **KINDS[kind]), x, packed, up, kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_packed_layer_uses_the_kernel(fp8: bool, device: str, monkeypatch: pytest.MonkeyPatch):
    packed, scheme = random_weight(40, 256), IntScheme(4, 128, fp8)
    layer, bias = IntLinear(256, 40, True, scheme), torch.randn(40)
    layer.load_state_dict(packed.tensors() | {"bias": bias})
    layer = layer.to(device)
    monkeypatch.setattr(layer, "rows", None)
    kind, x = "folded" if fp8 else "W4A16", activations(3, 256, torch.float16, device)
    with torch.no_grad():
        check(layer(x), x, packed, kind, bias)
        layer.weight_scale.mul_(2)
        doubled = PackedInt(packed.codes, packed.scale * 2, 4, 128)
        check(layer(x), x, doubled, kind, bias)
        layer.load_state_dict(packed.tensors() | {"bias": bias})
        check(layer(x), x, packed, kind, bias)
    monkeypatch.undo()
    x = activations(3, 256, torch.float32, device).requires_grad_()
    layer(x).sum().backward()
    weight = PackedLinear(packed, None, fp8, torch.float32, "kernel").weight
    if not fp8:
        assert x.grad is not None
        torch.testing.assert_close(x.grad.cpu(), weight.sum(0).expand(3, -1))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 16, 64, 300])
def test_a_graph_replays_the_product(M: int, kind: str):
    packed, up = random_weight(512, 4096), random_weight(512, 4096, seed=1)
    weights, options = (weight_of(packed, "cuda"), weight_of(up, "cuda")), KINDS[kind]
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    multiply(x, weights[0], **options), gated(x, *weights, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = multiply(x, weights[0], **options), gated(x, *weights, **options)
    x.normal_()
    graph.replay()
    check(y, x, packed, kind)
    check_gated(z, x, packed, up, kind)
    assert torch.equal(y, multiply(x, weights[0], **options))
    assert torch.equal(z, gated(x, *weights, **options))


@pytest.mark.skipif(INTERPRETED, reason="the other tests need a kernel")
class TestWithoutKernel:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_reference_stands_in(self, kind: str, dtype: torch.dtype):
        packed, up, x = (
            random_weight(21, 192, 64),
            random_weight(21, 192, 64, seed=1),
            activations(5, 192, dtype, "cpu"),
        )
        assert not int4.takes(4, 64, x, True)
        check(multiply(x, weight_of(packed), **KINDS[kind]), x, packed, kind)
        check_gated(gated(x, weight_of(packed), weight_of(up), **KINDS[kind]), x, packed, up, kind)

    @pytest.mark.parametrize("spread", [1e-9, 0.02, 1e5])
    def test_decoded_weights_are_those_of_the_format(self, spread: float):
        packed = random_weight(21, 256, 64, spread)
        weight = weight_of(packed)
        assert torch.equal(weight.decode(), packed.unpack())
        assert torch.equal(fold(weight).decode(), packed.kernel_weight())

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_tokens_are_normalized_as_transformers_does_it(self, dtype: torch.dtype):
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
        torch.nn.init.normal_(norm.weight)
        x = activations(5, 96, dtype, "cpu")
        codes, scale = quantize_tokens(x, norm.weight.detach(), 1e-5)
        with torch.no_grad():
            assert torch.equal(codes.float() * scale[:, None], quantize_activations(norm(x)))

    def test_no_rows_give_no_rows(self):
        weight = weight_of(random_weight(21, 128))
        for options in KINDS.values():
            assert multiply(torch.zeros(3, 0, 128), weight, **options).shape == (3, 0, 21)
            assert gated(torch.zeros(3, 0, 128), weight, weight, **options).shape == (3, 0, 21)

    def test_an_order_is_one_of_each_group(self):
        for folded in (False, True):
            for group_size in int4.GROUP_SIZES:
                order = operand_order(256, group_size, folded).view(-1, group_size)
                assert torch.equal(order.sort(dim=1).values.flatten(), torch.arange(256))

    @pytest.mark.parametrize("kind", KINDS)
    def test_compiles_in_one_piece(self, kind: str):
        weight, x = weight_of(random_weight(21, 128)), activations(3, 128, torch.float16, "cpu")

        def product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
            y = multiply(x, Weight(packed, scale), **KINDS[kind])
            return y + gated(x, Weight(packed, scale), Weight(packed, scale), **KINDS[kind])

        compiled = torch.compile(product, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, *weight[:2]), product(x, *weight[:2]))

    def test_operators_are_what_they_say(self):
        weight, x = weight_of(random_weight(21, 128)), activations(3, 128, torch.float16, "cpu")
        folded = fold(weight)
        codes, scale = quantize_tokens(x, group_size=128)
        shapes = ("test_faketensor", "test_aot_dispatch_dynamic")  # E4M3 inputs cannot be compared for test_schema
        torch.library.opcheck(torch.ops.pq.fold_int4_scales.default, (weight.scale,))
        torch.library.opcheck(torch.ops.pq.quantize_tokens.default, (x, None, 1e-6, 128, True), test_utils=shapes)
        alone, both, product = (*folded, None, None, None), (*folded, *folded), torch.ops.pq.int4_multiply.default
        torch.library.opcheck(product, (codes, scale, *alone, None, torch.bfloat16), test_utils=shapes)
        torch.library.opcheck(product, (codes, scale, *both, None, torch.bfloat16), test_utils=shapes)
        torch.library.opcheck(product, (x, None, *weight, None, None, None, None, torch.float16))

    def test_bytes_moved(self):
        assert bytes_moved(1, 4096, 4096, 128, 2, True) == 4096 * 2048 + 4096 * 32 * 2 + 4100 + 8192
        assert bytes_moved(1, 4096, 4096, 128, 2, False, weights=2) == 2 * (4096 * 2048 + 4096 * 32 * 2) + 8192 + 8192

    def test_what_does_not_fit_is_refused(self):
        weight, x = weight_of(random_weight(8, 256)), torch.randn(2, 256)
        with pytest.raises(ValueError, match=r"activations are torch\.float64"):
            multiply(x.double(), weight, fp8_activations=False)
        with pytest.raises(ValueError, match=r"packed is torch\.int32 \(8, 32\), expected torch\.int32 \(8, 16\)"):
            multiply(x[:, :128], weight, fp8_activations=True)
        with pytest.raises(ValueError, match="256 inputs in 1 groups: a group must have 32, 64 or 128 inputs"):
            multiply(x, Weight(weight.packed, weight.scale[:, :1].contiguous()), fp8_activations=False)
        with pytest.raises(ValueError, match="packed must be contiguous and on cpu"):
            multiply(x, Weight(weight.packed.T.contiguous().T, weight.scale), fp8_activations=False)
        with pytest.raises(ValueError, match=r"scale is torch\.float32"):
            multiply(x, Weight(weight.packed, weight.scale.float()), fp8_activations=False)
        with pytest.raises(ValueError, match=r"bias is \(7,\) on cpu, expected \(8,\) on cpu"):
            multiply(x, weight, torch.zeros(7), fp8_activations=True)
        with pytest.raises(ValueError, match="packed is"):
            gated(x, weight, weight_of(random_weight(9, 256)), fp8_activations=True)
        with pytest.raises(ValueError, match="the weight is folded, but the variant is 'exact'"):
            multiply(x, fold(weight), fp8_activations=True, variant="exact")
        with pytest.raises(ValueError, match="the weight is folded for E4M3 activations, but there are none"):
            multiply(x, fold(weight), fp8_activations=False)
        with pytest.raises(ValueError, match="only one of gate and up is folded"):
            gated(x, fold(weight), weight, fp8_activations=True)
        codes, scale = quantize_tokens(x, group_size=128)
        with pytest.raises(ValueError, match=r"token_scale is torch\.float32 \(1,\)"):
            multiply_codes(codes, scale[:1], weight)
        with pytest.raises(ValueError, match=r"activations are torch\.float32, expected float8_e4m3fn"):
            multiply_codes(x, scale, weight)
        with pytest.raises(ValueError, match=r"norm is torch\.float64"):
            quantize_tokens(x, torch.ones(256).double())
        with pytest.raises(ValueError, match="96 inputs are no multiple"):
            quantize_tokens(x[:, :96], group_size=64)

    @pytest.mark.parametrize(("dtype", "rows", "kind"), [(0, 1, "exact"), (0, 99, "folded"), (1, 1, "W4A16")])
    def test_hopper_multiplies_weights_from_registers(self, dtype: int, rows: int, kind: str):
        assert "wgmma" in (ptx := hopper_code((torch.float8_e4m3fn, torch.bfloat16)[dtype], rows, kind == "folded"))
        assert "ld.local" not in ptx
        # The left operand of a wgmma is either registers in braces, as the sums are, or a description of shared memory.
        assert all(line.count("{") == 2 for line in ptx.splitlines() if "wgmma.mma_async" in line)

    def test_the_package_needs_no_triton(self):
        code = "import sys; sys.modules['triton'] = None; import quantize.int_linear, quantize.kernels.int4"
        subprocess.run([sys.executable, "-c", code], check=True)
