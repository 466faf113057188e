"""Routed experts from stacked weights: in Triton's interpreter, on a GPU where there is one, and by torch alone.

The interpreter must be chosen before Triton is imported, so its tests run in a child process: this file, once more.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import GPU, INTERPRETED, needs_gpu, run_interpreted
from torch import Tensor

from quantize.kernels.device import has_kernel
from quantize.kernels.experts.api import routed_experts
from quantize.kernels.experts.reference import routed_experts_reference

DEVICES = ["cpu"] if INTERPRETED else ["cpu", GPU]

# Of the largest output: the hidden neurons and the output are rounded to the dtype. Triton's interpreter cuts bfloat16
# off, and torch rounds the gate, the up projection and each expert's output, too.
LIMITS = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-20}


def routing(M: int, N: int, k: int, generator: torch.Generator) -> Tensor:
    """Weights [M, N] with k experts a token, the last expert never visited where there are others."""
    scores = torch.randn(M, N, generator=generator)
    scores[:, -1] -= 100 if k < N else 0
    weights = torch.rand(M, N, generator=generator) + 0.1
    return weights * torch.zeros(M, N).scatter_(1, scores.topk(k, dim=1).indices, 1.0)


def experts(
    N: int, D: int, E: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """gate_up [N, 2E, D] and down [N, D, E], between NaN that belongs to neither."""

    def inside(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        around = torch.full((shape[0] + 2, *shape[1:]), float("nan"), dtype=dtype)
        around[1:-1] = value.to(dtype)
        return around[1:-1]

    return inside(N, 2 * E, D), inside(N, D, E)


def tokens(M: int, D: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of different sizes between NaN that belongs to no row."""
    x = torch.randn(M, D, generator=generator) * torch.linspace(0.5, 2, M)[:, None]
    around = torch.full((M + 2, D + 9), float("nan"), dtype=dtype)
    around[1:-1, 4 : D + 4] = x.to(dtype)
    return around[1:-1, 4 : D + 4]


def check(y: Tensor, *arguments: Tensor) -> None:
    x = arguments[0]
    expected = routed_experts_reference(*(tensor.cpu() for tensor in arguments))
    assert bool(expected.isfinite().all())
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    limit = LIMITS[x.dtype] * expected.abs().max()
    assert bool(((y.double().cpu() - expected).abs() <= limit).all())


def case(
    M: int, N: int, D: int, E: int, k: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M * 31 + N * 7 + D + E)
    x, weights = tokens(M, D, dtype, generator), routing(M, N, k, generator).to(dtype)
    gate_up, down = experts(N, D, E, dtype, generator)
    return x.to(device), weights.to(device), gate_up.to(device), down.to(device)


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "D", "E", "k"),
    [
        (1, 8, 96, 40, 3),
        (1, 1, 1, 1, 1),
        (2, 3, 33, 17, 1),
        (17, 5, 64, 130, 2),  # more neurons than a tile
        (40, 2, 200, 24, 2),  # all visit all: tiles of 64 rows, the last with few
        (70, 64, 32, 16, 6),
        (300, 2, 48, 16, 1),  # tiles of 128 rows, and no visitor of the last expert
    ],
)
def test_all_sizes(M: int, N: int, D: int, E: int, k: int, dtype: torch.dtype, device: str):
    arguments = case(M, N, D, E, k, dtype, device)
    check(routed_experts(*arguments, most=k), *arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_visit_as_many_experts_as_they_like(device: str):
    x, weights, gate_up, down = case(33, 6, 40, 24, 6, torch.float32, device)
    keep = torch.arange(33, device=device)[:, None] % 7 > torch.arange(
        6, device=device
    )  # 0 to 6 experts
    weights = weights * keep
    y = routed_experts(x, weights, gate_up, down)
    check(y, x, weights, gate_up, down)
    assert not y[::7].any()
    assert not routed_experts(x, torch.zeros_like(weights), gate_up, down).any()


@settings(max_examples=8)
@given(st.data())
def test_any_routing(data: st.DataObject):
    M, N, D, E = (data.draw(st.integers(1, largest)) for largest in (40, 9, 70, 40))
    x, weights, gate_up, down = case(M, N, D, E, N, torch.float32)
    visits = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=M, max_size=M))
    )
    signs = 1 - 2 * (torch.arange(N) % 2)
    check(
        routed_experts(x, weights * visits * signs, gate_up, down),
        x,
        weights * visits * signs,
        gate_up,
        down,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_another_dtype_and_any_strides(device: str):
    x, weights, gate_up, down = case(9, 4, 40, 24, 2, torch.float16, device)
    expected = routed_experts(x, weights, gate_up, down)
    check(
        routed_experts(x, weights.float() / 3, gate_up, down), x, weights.float() / 3, gate_up, down
    )
    crossed = x.T.contiguous().T, weights.T.contiguous().T
    assert torch.equal(routed_experts(*crossed, gate_up, down), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_what_overflows_in_an_expert_stays_there(device: str):
    x, weights, gate_up, down = case(6, 3, 40, 24, 1, torch.float16, device)
    gate_up[2] *= 3e4  # the last expert, which nobody visits
    check(routed_experts(x, weights, gate_up, down), x, weights, gate_up, down)
    weights[4, 2] = 1.0
    y = routed_experts(x, weights, gate_up, down)
    assert not bool(y[4].isfinite().all())
    assert bool(y[[0, 1, 2, 3, 5]].isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_gives_nothing(device: str):
    x, weights, gate_up, down = case(3, 4, 40, 24, 2, torch.float32, device)
    assert routed_experts(x[:0], weights[:0], gate_up, down).shape == (0, 40)
    assert torch.equal(
        routed_experts(x, weights[:, :0], gate_up[:0], down[:0]), torch.zeros_like(x)
    )


@pytest.mark.skipif(not INTERPRETED, reason="needs a kernel")
class TestKernel:
    def test_many_tokens_go_in_turns(self, monkeypatch: pytest.MonkeyPatch):
        from quantize.kernels.experts import launch as experts_launch

        arguments = case(23, 4, 40, 24, 2, torch.float32)
        whole = routed_experts(*arguments, most=2)
        monkeypatch.setattr(experts_launch, "_HELD", 5 * 2 * (24 + 40) * 4)  # five tokens
        assert torch.equal(routed_experts(*arguments, most=2), whole)

    def test_more_experts_than_promised_are_seen(self):
        x, weights, gate_up, down = case(5, 4, 40, 24, 2, torch.float32)
        weights[3] = 0.5
        y = routed_experts(x, weights, gate_up, down, most=2)
        finite = y.isfinite().all(dim=1)
        assert not bool(finite.all())
        check(y[finite], x[finite], weights[finite], gate_up, down)
        check(routed_experts(x, weights, gate_up, down, most=9), x, weights, gate_up, down)

    def test_torch_alone_computes_the_same(self, monkeypatch: pytest.MonkeyPatch):
        arguments = case(12, 4, 40, 24, 2, torch.float32)
        by_kernel = routed_experts(*arguments)
        monkeypatch.setattr("quantize.kernels.experts.api.has_kernel", lambda x: False)
        torch.testing.assert_close(routed_experts(*arguments), by_kernel)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 32, 700])
def test_a_graph_replays_other_routes(M: int):
    x, weights, gate_up, down = case(M, 8, 256, 128, 2, torch.bfloat16, "cuda")
    x = x.contiguous()
    routed_experts(x, weights, gate_up, down, most=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = routed_experts(x, weights, gate_up, down, most=4)
    weights.copy_(routing(M, 8, 4, torch.Generator().manual_seed(5)))
    x.normal_()
    graph.replay()
    check(y, x, weights, gate_up, down)
    assert torch.equal(y, routed_experts(x, weights, gate_up, down, most=4))


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
@pytest.mark.parametrize("small", [-1, 1 << 30], ids=["one by one", "all at once"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("M", [1, 3, 40])
def test_both_ways_of_torch(small: int, threads: int, M: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quantize.kernels.experts.api._SMALL", small)
    monkeypatch.setattr("quantize.kernels.experts.api._PADDED", 99)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weights, gate_up, down = case(M, 5, 60, 28, 2, torch.float32)
    check(routed_experts(x, weights, gate_up, down), x, weights, gate_up, down)
    gate_up[-1] *= 1e30  # overflows, but nobody visits it
    check(routed_experts(x, weights, gate_up, down), x, weights, gate_up, down)


@pytest.fixture
def float_inputs() -> tuple[Tensor, ...]:
    return case(7, 3, 20, 12, 2, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="the other tests need a kernel")
class TestWithoutKernel:
    def test_other_activations(self, float_inputs: tuple[Tensor, ...]):
        x, weights, gate_up, down = float_inputs
        assert not has_kernel(x)
        wide = gate_up.double().chunk(2, dim=1)
        hidden = F.gelu(torch.einsum("md,ned->mne", x.double(), wide[0]))
        hidden = hidden * torch.einsum("md,ned->mne", x.double(), wide[1])
        expected = torch.einsum("mne,nde,mn->md", hidden, down.double(), weights.double())
        torch.testing.assert_close(
            routed_experts(x, weights, gate_up, down, F.gelu).double(),
            expected,
            rtol=1e-4,
            atol=1e-5,
        )

    def test_gradients_are_those_of_the_sum(self, float_inputs: tuple[Tensor, ...]):
        ours = [tensor.clone().requires_grad_(True) for tensor in float_inputs]
        exact = [tensor.double().requires_grad_(True) for tensor in float_inputs]
        routed_experts(*ours).square().sum().backward()
        routed_experts_reference(*exact).square().sum().backward()
        visited = float_inputs[1] != 0
        for index, (found, expected) in enumerate(zip(ours, exact, strict=True)):
            assert found.grad is not None
            assert expected.grad is not None
            wanted = (
                expected.grad * visited if index == 1 else expected.grad
            )  # who does not visit learns nothing
            torch.testing.assert_close(found.grad.double(), wanted, rtol=1e-4, atol=1e-4)

    def test_what_does_not_fit_is_refused(self, float_inputs: tuple[Tensor, ...]):
        x, weights, gate_up, down = float_inputs
        with pytest.raises(ValueError, match=r"weights is \(7, 2\) on cpu, expected \(7, 3\)"):
            routed_experts(x, weights[:, :2], gate_up, down)
        with pytest.raises(
            ValueError, match=r"gate_up is \(3, 12, 20\) on cpu, expected \(3, 24, 20\)"
        ):
            routed_experts(x, weights, gate_up[:, :12], down)
        with pytest.raises(ValueError, match=r"down must be contiguous and torch\.float32 like x"):
            routed_experts(x, weights, gate_up, down.half())
        with pytest.raises(ValueError, match="gate_up must be contiguous"):
            routed_experts(x, weights, gate_up.mT.contiguous().mT, down)
        with pytest.raises(ValueError, match=r"x \(1, 7, 20\) must have 2 axes"):
            routed_experts(x[None], weights, gate_up, down)

    def test_the_package_needs_no_triton(self):
        code = "import sys; sys.modules['triton'] = None; import quantize.kernels.experts.api"
        subprocess.run([sys.executable, "-c", code], check=True)
