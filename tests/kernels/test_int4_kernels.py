"""Kernels for packed INT4 weights: in Triton's interpreter everywhere, on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so its tests run in a child process: this file, once more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int4s import (
    KINDS,
    OF_TERMS,
    TOLERANCE,
    check,
    check_gated,
    exact_product,
    random_weight,
    weight_of,
)
from interpreted import GPU, INTERPRETED, activations, needs_gpu, run_interpreted
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.packed_int import IntScheme, PackedInt
from quantize.kernels.fp8.api import GROUP_SIZES, Variant, quantize_tokens
from quantize.kernels.fp8.reference import operand_order, quantize_reference
from quantize.kernels.int4.api import (
    fold,
    multiply,
    multiply_codes,
    multiply_gated,
    multiply_gated_codes,
)
from quantize.kernels.int4.reference import Weight
from quantize.serving.gated_ffn import GatedFfn, place_gated_ffns
from quantize.serving.int_linear import IntLinear

DEVICES = ["cpu"] if INTERPRETED else [GPU]


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


@pytest.fixture(params=[1, 2], ids=["whole", "parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whole, and split over their inputs."""
    launch = pytest.importorskip("quantize.kernels.int4.launch")
    monkeypatch.setattr(
        launch, "_split", lambda G, *_: (1, G) if request.param == 1 else (-(-G // 2), 2)
    )


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 129])
@pytest.mark.usefixtures("parts")
def test_all_batches(M: int, kind: str, device: str):
    packed, up, dtype = (
        random_weight(37, 384),
        random_weight(37, 384, seed=1),
        (torch.bfloat16, torch.float16)[M % 2],
    )
    x, bias = activations(M, 384, dtype, device), torch.randn(37, device=device).to(dtype)
    check(multiply(x, weight_of(packed, device), bias, **KINDS[kind]), x, packed, kind, bias)
    check_gated(
        multiply_gated(x, weight_of(packed, device), weight_of(up, device), **KINDS[kind]),
        x,
        packed,
        up,
        kind,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("N", "K"), [(1, 128), (65, 384)])
def test_odd_sizes(N: int, K: int, group_size: int, kind: str, device: str):
    packed, up = random_weight(N, K, group_size), random_weight(N, K, group_size, seed=1)
    x, weights = (
        activations(5, K, torch.float16, device),
        (weight_of(packed, device), weight_of(up, device)),
    )
    check(multiply(x, weights[0], **KINDS[kind]), x, packed, kind)
    check_gated(multiply_gated(x, *weights, **KINDS[kind]), x, packed, up, kind)


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
    folded = [tensor.cpu() for tensor in fold(weight)]
    assert torch.equal(Weight(*folded).decode(), packed.kernel_weight())
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
    assert multiply_gated(straight.reshape(2, -1, 128), weight, weight, **options).shape == (
        2,
        M // 2,
        19,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["exact", "folded"])
def test_one_quantization_serves_several_products(variant: Variant, device: str):
    gate, up = (
        weight_of(random_weight(19, 256), device),
        weight_of(random_weight(19, 256, seed=1), device),
    )
    x = activations(3, 256, torch.float16, device).reshape(3, 1, 256)
    codes, scale = quantize_tokens(x, group_size=128, variant=variant)
    options: dict[str, Any] = {"variant": variant, "dtype": torch.float16}
    assert torch.equal(
        multiply_codes(codes, scale, gate, **options),
        multiply(x, gate, fp8_activations=True, variant=variant),
    )
    both = multiply_gated(x, gate, up, fp8_activations=True, variant=variant)
    assert torch.equal(multiply_gated_codes(codes, scale, gate, up, **options), both)
    if variant == "folded":
        assert torch.equal(
            multiply_gated_codes(codes, scale, fold(gate), fold(up), **options), both
        )


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
    for group_size in (size for size in GROUP_SIZES if K % size == 0):
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
    launch = pytest.importorskip("quantize.kernels.int4.launch")
    packed, up = random_weight(60, 128), random_weight(60, 128, seed=1)
    weights, rows = (weight_of(packed, device), weight_of(up, device)), 0
    for tile in launch.TILES[dtype]:
        M = tile.rows or rows + 6
        rows = M
        assert launch.tile_for(M, dtype) is tile
        for kind in ["W4A16"] if dtype != torch.float8_e4m3fn else ["exact", "folded"]:
            x = activations(M, 128, dtype if kind == "W4A16" else torch.float16, device)
            check(multiply(x, weights[0], **KINDS[kind]), x, packed, kind)
            check_gated(multiply_gated(x, *weights, **KINDS[kind]), x, packed, up, kind)


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


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 16, 64, 300])
def test_a_graph_replays_the_product(M: int, kind: str):
    packed, up = random_weight(512, 4096), random_weight(512, 4096, seed=1)
    weights, options = (weight_of(packed, "cuda"), weight_of(up, "cuda")), KINDS[kind]
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    multiply(x, weights[0], **options), multiply_gated(x, *weights, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = multiply(x, weights[0], **options), multiply_gated(x, *weights, **options)
    x.normal_()
    graph.replay()
    check(y, x, packed, kind)
    check_gated(z, x, packed, up, kind)
    assert torch.equal(y, multiply(x, weights[0], **options))
    assert torch.equal(z, multiply_gated(x, *weights, **options))


class Ffn(torch.nn.Module):
    """A gated FFN of packed linears."""

    def __init__(self, hidden: int, inner: int, fp8: bool, device: str) -> None:
        super().__init__()
        for name, (N, K) in {
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }.items():
            packed = random_weight(N, K, seed=len(name))
            linear = IntLinear(K, N, False, IntScheme(4, 128, fp8))
            linear.load_state_dict(packed.tensors())
            self.add_module(f"{name}_proj", linear.to(device))
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", [False, True])
@torch.no_grad()
def test_ffns_compute_gate_and_up_at_once(device: str, fp8: bool, monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.ModuleDict({"mlp": Ffn(128, 256, fp8, device)})
    x = activations(3, 128, torch.float32, device)
    wanted, calls = model["mlp"](x), []
    place_gated_ffns(model)
    fused = model["mlp"]
    assert isinstance(fused, GatedFfn)
    monkeypatch.setattr(
        "quantize.serving.gated_ffn.multiply_gated",
        lambda *a, **k: calls.append(1) or multiply_gated(*a, **k),
    )
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-3 * float(wanted.abs().max()))
    handle = fused.up_proj.register_forward_hook(
        lambda *_: calls.append(2)
    )  # what is hooked is called
    fused(x)
    handle.remove()
    assert calls == [1, 2]
