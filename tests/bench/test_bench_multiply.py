"""The benchmark's logic, on the CPU and tiny shapes; its figures mean something on an idle machine alone."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU
from torch import Tensor

from quantize.bench import multiply as bench_multiply
from quantize.bench.multiply import (
    LLAMA_3_8B,
    LLAMA_3_8B_BLOCK,
    Timing,
    bench_token,
    copy_rate,
)
from quantize.bench.multiply import (
    bench_multiply as bench,
)
from quantize.errors import QualityError
from quantize.formats.bitvec import BitVecScheme
from quantize.serving.bitvec_linear import BitVecLinear

SCHEME = BitVecScheme(bits=3, group_size=64, bias=True, lines=7, scales=2)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_multiply, "_COPIED_ELSEWHERE", 1 << 16)


def test_every_shape_meets_every_batch():
    timings = bench([(8, 64), (16, 96)], (1, 3), SCHEME, CPU, rounds=3, cache_bytes=0)
    assert [(t.N, t.K, t.M, t.bits) for t in timings] == [
        (8, 64, 1, 3),
        (8, 64, 3, 3),
        (16, 96, 1, 3),
        (16, 96, 3, 3),
    ]
    for timing in timings:
        assert 0 < timing.fastest <= timing.seconds <= timing.slowest
        assert timing.plain_seconds > 0
        assert timing.bandwidth > 0


def test_figures_follow_from_times(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def rounds_of(given: list[object], device: torch.device, rounds: int) -> list[float]:
        calls.append(len(given))
        return [2.0 * len(given), 1.0 * len(given), 6.0 * len(given)]

    monkeypatch.setattr(bench_multiply, "_round_seconds", rounds_of)
    monkeypatch.setattr(bench_multiply, "copy_rate", lambda device, rounds: 100.0)
    held = int(SCHEME.stored_bits(8, 64) * 8 * 64 / 8) + 16
    (timing,) = bench([(8, 64)], [2], SCHEME, CPU, cache_bytes=3 * held)
    stored = held - 16
    assert timing == Timing(
        8, 64, 2, 3, 2.0, 1.0, 6.0, 2.0, (stored + 2 * (8 + 64) * 4) / 2.0 / 100
    )
    assert timing.speedup == 1
    assert calls == [3, 1]  # copies of the weight that fill the cache; one plain weight does


def test_a_model_is_the_sum_of_its_linears():
    token = bench_token([(8, 64), (16, 96)], 3, 2, SCHEME, CPU, rounds=2)
    assert (token.M, token.bits, token.linears) == (2, 3, 6)
    assert token.speedup == token.plain_seconds / token.seconds > 0
    weights = 32 * sum(N * K for N, K in LLAMA_3_8B_BLOCK)
    assert weights == 6_979_321_856  # what Llama-3-8B has, embeddings and norms aside
    assert set(LLAMA_3_8B_BLOCK) == set(LLAMA_3_8B)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    forward = BitVecLinear.forward

    def wrong(layer: BitVecLinear, x: Tensor) -> Tensor:
        y = forward(layer, x)
        y[-1, 0] += 0.01 * y.abs().max()
        return y

    monkeypatch.setattr(BitVecLinear, "forward", wrong)
    with pytest.raises(
        QualityError, match=r"bitvec product 8 × 64, 2 rows: off by 1.0e-02 of the largest output"
    ):
        bench([(8, 64)], [2], SCHEME, CPU, rounds=1, cache_bytes=0)
    with pytest.raises(QualityError, match="not timed"):
        bench_token([(8, 64)], 1, 2, SCHEME, CPU, rounds=1)
    monkeypatch.setattr(BitVecLinear, "forward", lambda layer, x: forward(layer, x) * float("nan"))
    with pytest.raises(QualityError, match="off by nan"):
        bench([(8, 64)], [2], SCHEME, CPU, rounds=1, cache_bytes=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rounds_are_replayed_on_a_gpu():
    device = torch.device("cuda")
    assert copy_rate(device, 3) > 1e10
    timings = bench(
        [(1024, 4096)], (1, 16, 40), BitVecScheme(4, 128, False, 256, 1), device, rounds=3
    )
    assert all(0 < t.bandwidth < 2 for t in timings)
    assert (
        bench_token(
            [(1024, 4096)], 2, 1, BitVecScheme(4, 128, False, 256, 1), device, rounds=3
        ).seconds
        > 0
    )
