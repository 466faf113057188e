"""Kernels for `bitvec` weights: in Triton's interpreter everywhere, on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so its tests run in a child process: this file, once more.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bitvecs import exact_product, multiply_arguments, random_bitvec
from interpreted import GPU, INTERPRETED, activations, needs_gpu, run_interpreted
from torch import Tensor

from quantize.formats.bitvec import BitVec
from quantize.kernels.bitvec.api import multiply
from quantize.kernels.bitvec.reference import multiply_reference
from quantize.kernels.device import has_kernel

DEVICES = ["cpu"] if INTERPRETED else [GPU]

# Units of rounding of a result, and of the sum of its terms' sizes. Triton's interpreter cuts bfloat16 off; where x has
# more than 16 rows of 16 bits, weights are rounded to x's dtype, too.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.bfloat16: (2**-7, 2**-7),
    torch.float16: (2**-10, 2**-10),
    torch.float32: (2**-21, 2**-21),
}
FEW_ROWS = 2**-18  # of the terms' sizes, up to 16 rows: only float32 sums are rounded


@pytest.fixture(autouse=True)
def kernel_at_hand(request: pytest.FixtureRequest) -> None:
    device = (
        request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    )
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def check(y: Tensor, x: Tensor, weight: BitVec, bias: Tensor | None = None) -> None:
    expected, size = exact_product(x, weight, bias)
    relative, of_terms = TOLERANCE[x.dtype]
    if len(x) <= 16 and x.dtype != torch.float32:
        of_terms = FEW_ROWS
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    assert bool(
        (
            (y.double().cpu() - expected).abs()
            <= relative * expected.abs() + of_terms * size + 1e-6
        ).all()
    )


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_bits(bits: int, device: str):
    for M, dtype, constant in (
        (3, torch.float16, True),
        (3, torch.bfloat16, False),
        (17, torch.float16, True),
    ):
        weight = random_bitvec(21, 100, bits, 64, constant, lines=7, scales=2)
        x = activations(M, 100, dtype, device)
        check(multiply(x, *multiply_arguments(weight, device), bits=bits, group_size=64), x, weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 7, 8, 16, 17, 33])
def test_all_batches(M: int, dtype: torch.dtype, device: str):
    weight = random_bitvec(67, 320, 4, 128, bias=M % 2 == 1, lines=9)
    x, bias = activations(M, 320, dtype, device), torch.randn(67, device=device).to(dtype)
    y = multiply(x, *multiply_arguments(weight, device), bias, bits=4, group_size=128)
    check(y, x, weight, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [2, 18])
@pytest.mark.parametrize(
    ("N", "K", "bits", "group_size", "lines", "scales"),
    [
        (1, 7, 4, 64, 3, 1),  # less than a word
        (5, 33, 3, 64, 300, 1),  # a 16-bit index
        (3, 256, 4, 256, 16, 250),
        (129, 65, 2, 64, 1, 1),
        (9, 600, 5, 256, 2, 130),
        (2, 64, 4, 64, 256, 256),  # an index with its highest bit set
    ],
)
def test_odd_sizes(
    N: int, K: int, bits: int, group_size: int, lines: int, scales: int, M: int, device: str
):
    weight = random_bitvec(N, K, bits, group_size, True, lines, scales)
    x = activations(M, K, torch.float16, device)
    check(
        multiply(x, *multiply_arguments(weight, device), bits=bits, group_size=group_size),
        x,
        weight,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [4, 20])
def test_any_strides_and_axes(M: int, device: str):
    weight = random_bitvec(19, 96, 3, 64)
    arguments = multiply_arguments(weight, device)
    straight = activations(M, 96, torch.float16, device)
    expected = multiply(straight, *arguments, bits=3, group_size=64)
    crossed = straight.T.contiguous().T
    assert torch.equal(multiply(crossed, *arguments, bits=3, group_size=64), expected)
    cubed = multiply(straight.reshape(2, -1, 96), *arguments, bits=3, group_size=64)
    assert torch.equal(cubed, expected.view(2, -1, 19))
    assert multiply(straight[0], *arguments, bits=3, group_size=64).shape == (19,)


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_activations(device: str):
    weight = random_bitvec(8, 128, 4)
    arguments = multiply_arguments(weight, device)
    for power in (-110, -30, 60, 118):
        x = (
            torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
            .to(torch.bfloat16)
            .to(device)
            * 2.0**power
        )
        y = multiply(x, *arguments, bits=4, group_size=128)
        expected, size = exact_product(x, weight)
        assert bool(
            ((y.double().cpu() - expected).abs() <= 2**-7 * expected.abs() + 2**-16 * size).all()
        ), power
    zero = multiply(
        torch.zeros(2, 128, dtype=torch.bfloat16, device=device), *arguments, bits=4, group_size=128
    )
    assert not zero.any()
    x = torch.ones(2, 128, dtype=torch.bfloat16, device=device)
    x[1, 5] = float("nan")
    y = multiply(x, *arguments, bits=4, group_size=128)
    assert bool(y[1].isnan().all())
    assert bool(y[0].isfinite().all())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 16, 64, 300])
def test_a_graph_replays_the_product(M: int):
    weight = random_bitvec(512, 4096, 4)
    arguments = multiply_arguments(weight, "cuda")
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    first = multiply(x, *arguments, bits=4, group_size=128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x, *arguments, bits=4, group_size=128)
    graph.replay()
    assert torch.equal(y, first)
    check(y, x, weight)


@pytest.mark.skipif(INTERPRETED, reason="the other tests need a kernel")
class TestWithoutKernel:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_the_reference_stands_in(self, dtype: torch.dtype):
        weight = random_bitvec(21, 100, 3, 64, True, lines=300)
        x = activations(5, 100, dtype, "cpu")
        assert not has_kernel(x)
        y = multiply(x, *multiply_arguments(weight), bits=3, group_size=64)
        check(y, x, weight)
        assert torch.equal(
            y, multiply_reference(x, *multiply_arguments(weight), bits=3, group_size=64)
        )

    def test_no_rows_give_no_rows(self):
        weight = random_bitvec(21, 100)
        y = multiply(torch.zeros(3, 0, 100), *multiply_arguments(weight), bits=4, group_size=128)
        assert y.shape == (3, 0, 21)

    def test_what_does_not_fit_is_refused(self):
        planes, index, lines, scales = multiply_arguments(random_bitvec(8, 128))
        x, sizes = torch.randn(2, 128), {"bits": 4, "group_size": 128}
        with pytest.raises(
            ValueError, match=r"planes is torch.int32 \(8, 16\), expected torch.int32 \(8, 12\)"
        ):
            multiply(torch.randn(2, 96), planes, index, lines, scales, **sizes)
        with pytest.raises(ValueError, match=r"index is torch\.int32"):
            multiply(x, planes, index.int(), lines, scales, **sizes)
        with pytest.raises(ValueError, match="planes must be a contiguous tensor of 2 axes on cpu"):
            multiply(x, planes.T.contiguous().T, index, lines, scales, **sizes)
        with pytest.raises(ValueError, match="scales must be a contiguous tensor of 1 axes on cpu"):
            multiply(x, planes, index, lines, scales[:, None], **sizes)
        with pytest.raises(ValueError, match=r"activations are torch.float64"):
            multiply(x.double(), planes, index, lines, scales, **sizes)
        with pytest.raises(ValueError, match=r"bias is \(7,\) on cpu, expected \(8,\) on cpu"):
            multiply(x, planes, index, lines, scales, torch.zeros(7), **sizes)
        with pytest.raises(ValueError, match="9 bit planes"):
            multiply(x, planes, index, lines, scales, bits=9, group_size=128)

    def test_the_package_needs_no_triton(self):
        modules = "quantize.serving.bitvec_linear, quantize.kernels.bitvec.api"
        code = f"import sys; sys.modules['triton'] = None; import {modules}"
        subprocess.run([sys.executable, "-c", code], check=True)
