"""The roofline against sums by hand, and what must grow with what."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest

from quantize.errors import UsageError
from quantize.plan.gpus import GPUS, gpu_named
from quantize.plan.latency import CONSTANTS, ERRORS, Batch, step_seconds
from quantize.plan.served import KvLayer, WeightPart, dense

ROOT = Path(__file__).parents[2]
LLAMA = dense("llama-8b", 32, 4096, 32, 8, 128, 14336, 128256)
H100 = gpu_named("h100")


def test_sizes_are_those_of_the_model():
    assert LLAMA.weights() / 2 == pytest.approx(8.03e9, rel=1e-3)
    assert LLAMA.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2
    assert LLAMA.kv_bytes(100, tp=16) == LLAMA.kv_bytes(100, tp=8)  # heads are repeated
    assert LLAMA.parameters_per_token == pytest.approx(6.98e9, rel=1e-3)


def test_a_shard_holds_whole_units():
    part = WeightPart("q, k, v", 600, units=6)
    assert [part.shard(tp) for tp in (1, 2, 4, 8)] == [600, 300, 200, 100]
    assert WeightPart("norms", 600).shard(4) == 600


def test_windows_keep_no_more_than_they_see():
    layer = KvLayer(4, 512.0, window=1024)
    assert layer.bytes(1000, 2) == 1000 * 2 * 512
    assert layer.bytes(5000, 2) == 1024 * 2 * 512


def test_experts_that_a_step_reads():
    """Against a draw: each of n tokens visits k distinct of E experts."""
    E, k, n = 64, 6, 20
    part = WeightPart("experts", 64, E, E, k)
    draw = random.Random(random.randrange(10**9))
    trials = [len({e for _ in range(n) for e in draw.sample(range(E), k)}) for _ in range(400)]
    assert part.hit(n) * E == pytest.approx(sum(trials) / len(trials), rel=0.02)


def test_a_step_of_decoding_is_its_bytes_and_the_host():
    batch = Batch(decode_sequences=8, decode_context_total=8 * 1000)
    read = LLAMA.weights() - 2 * 4096 * 128256 + 8 * LLAMA.kv_bytes(1000)
    host = 32 * CONSTANTS.layer + 8 * CONSTANTS.sequence
    assert step_seconds(LLAMA, H100, 1, batch) == pytest.approx(
        read / (3.35e12 * CONSTANTS.memory) + host
    )


def test_a_step_with_a_prompt_is_its_operations():
    batch = Batch(prefill_tokens=8000, prefill_context=4000)
    flops = 2 * LLAMA.parameters_per_token * 8000 + 4 * 32 * 32 * 128 * 8000 * 4000
    host = 32 * (CONSTANTS.layer + CONSTANTS.layer_prefill)
    assert step_seconds(LLAMA, H100, 1, batch) == pytest.approx(
        flops / (989e12 * CONSTANTS.compute) + host
    )


@pytest.mark.parametrize("field", ["prefill_tokens", "decode_sequences", "decode_context_total"])
def test_more_work_takes_no_less_time(field: str):
    draw = random.Random(random.randrange(10**9))
    for _ in range(50):
        batch = Batch(
            draw.randrange(1, 4000), draw.uniform(1, 9000), draw.randrange(1, 300), 1000.0
        )
        more = dataclasses.replace(batch, **{field: getattr(batch, field) * 3})
        for gpu in GPUS:
            first = step_seconds(LLAMA, gpu, 2, batch)
            if field == "decode_sequences":
                more = dataclasses.replace(more, decode_context_total=3000.0)
            assert step_seconds(LLAMA, gpu, 2, more) >= first > 0


def test_fewer_bits_take_no_more_time():
    times = []
    for bits in (16, 8, 4):
        model = dense("m", 32, 4096, 32, 8, 128, 14336, 128256, weight_bits=bits)
        times.append(step_seconds(model, H100, 1, Batch(decode_sequences=1)))
    assert times == sorted(times, reverse=True)


def test_gpus_go_by_many_names_and_the_nearest_is_named():
    assert gpu_named("NVIDIA H100 SXM").name == "h100-sxm"
    assert gpu_named("GeForce RTX_4090").name == gpu_named("4090").name == "rtx-4090"
    with pytest.raises(UsageError, match=r"nearest: .*h200"):
        gpu_named("h210")


def test_what_a_gpu_lacks_is_computed_wider():
    a100 = gpu_named("a100")
    assert (a100.tflops("fp8"), a100.multiplies("fp8")) == (312, False)
    assert (H100.tflops("fp4"), H100.multiplies("fp4")) == (1978, False)


def test_constants_and_errors_are_those_of_the_fit():
    found = json.loads((ROOT / "eval" / "results" / "latency.json").read_text(encoding="utf-8"))
    assert dataclasses.asdict(CONSTANTS) == pytest.approx(found["constants"])
    for name, error in ERRORS.items():
        row = found["held out"][name]
        for field, value in dataclasses.asdict(error).items():
            assert value == pytest.approx(row[field], abs=5e-4), (name, field)


@pytest.mark.shared
def test_the_fit_errs_as_its_results_say(shared_dir: Path):
    """On every fifth row of vLLM's, by the closed loop of the script: half of them it never saw."""
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        import latency_fit as script
    finally:
        sys.path.pop(0)
    rows = script.read(shared_dir / "traces" / "aiconfigurator_measured_dense.csv")
    loops = [script.Loop(row) for row in rows if row.backend == "vllm"][::5]
    found = script.table(loops, CONSTANTS)
    assert found["tpot"]["median"] < 0.07
    assert found["tpot"]["mean"] < 0.15
    assert found["ttft"]["median"] < 0.33
    right, pairs = script.order(
        [script.Loop(row) for row in rows if row.backend == "vllm"][:60], CONSTANTS
    )["tpot"]
    assert right > 0.95 * pairs > 20
