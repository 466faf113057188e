"""Memory of an engine against start-up messages of vLLM, and blocks against a count by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
from hollow import llama

from quantize.plan.checkpoint import served_model
from quantize.plan.gpus import gpu_named
from quantize.plan.memory import Engine, blocks_of, engine_for, fit, memory_of, short_of
from quantize.plan.served import KvLayer, dense

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "eval" / "reference-model"
H100 = gpu_named("h100")


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory):
    return served_model(llama(tmp_path_factory.mktemp("llama"))[0])


def test_llama_3_8b_leaves_what_vllm_says(llama_8b):
    """A public message of a start on an H100 (79.14 GiB × 0.90, 256 sequences, no graphs counted):
    14.99 GiB of weights, 1.19 at the peak, 0.12 beside torch, 54.93 for the cache; another of
    another release 53.29."""
    engine = Engine(utilization=0.90, batched_tokens=8192, max_sequences=256)
    memory = memory_of(llama_8b, H100, 1, engine)
    assert memory.activations / 2**30 == pytest.approx(1.19, rel=0.15)
    assert 53.29 * 0.98 <= memory.kv / 2**30 <= 54.93 * 1.02


def test_defaults_are_those_of_vllm_serve():
    limits = {
        name: (
            engine_for(gpu_named(name)).batched_tokens,
            engine_for(gpu_named(name)).max_sequences,
        )
        for name in ("b200", "h100", "a100", "4090")
    }
    assert limits == {
        "b200": (16384, 1024),
        "h100": (8192, 1024),
        "a100": (2048, 256),
        "4090": (2048, 256),
    }


def test_blocks_are_counted_as_sequences_take_them():
    """Against a sum over layers: each kind of window has blocks of its own, all of one size."""
    draw = random.Random(random.randrange(10**9))
    for _ in range(30):
        full, repeat = draw.randrange(1, 6), draw.randrange(0, 4)
        window, width = draw.randrange(20, 900), 64.0 * draw.randrange(1, 9)
        model = dataclasses.replace(
            dense("m", 1, 64, 2, 1, 32, 64, 100),
            kv=(KvLayer(1, width),) * full + (KvLayer(1, width, window),) * (full * repeat),
        )
        available, context = draw.randrange(10**6, 10**8), draw.randrange(1, 3000)
        cut = blocks_of(model, 1, available)
        assert cut.count == available // (width * 16 * full)
        own = math.ceil(context / 16)
        sliding = own if context <= window else min(own, math.ceil((window - 1) / 16) + 1)
        assert cut.of(context) == own + repeat * sliding
        assert cut.sequences(context) == cut.count // (own + repeat * sliding)


def test_fewer_bytes_leave_room_for_no_fewer_sequences(tmp_path: Path):
    found = []
    for name, group, kv in (("a", None, "bf16"), ("b", 128, "bf16"), ("c", 128, "int4")):
        model = served_model(llama(tmp_path / name, int4_group=group)[0], kv)
        found.append(fit(model, H100, 1, engine_for(H100), 4096).sequences)
    assert found == sorted(found)
    assert found[2] > 3 * found[0]


def test_what_does_not_fit_is_short_by_its_bytes(llama_8b):
    gpu = gpu_named("rtx-4090")
    found = fit(llama_8b, gpu, 1, engine_for(gpu), 131072)
    assert found.sequences == 0
    needed = llama_8b.kv_bytes(131072)
    assert short_of(llama_8b, found, 1) == math.ceil(needed - found.memory.kv) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("length", "kv"), [(1000, "bf16"), (512, "fp8")])
def test_tokens_are_those_that_vllm_says_when_it_starts(length: int, kv: str):
    engine = Path(os.environ.get("PQ_VLLM", ROOT / ".venv-vllm")) / "bin" / "python"
    if not engine.exists():
        pytest.skip("no environment of vLLM; make test-vllm makes one, PQ_VLLM names another")
    sys.path.insert(0, str(ROOT / "eval"))
    try:
        from vllm_kv import compare
    finally:
        sys.path.pop(0)
    row = compare(engine, REFERENCE, length, 50_000_000, kv)
    assert abs(row["error"]) < 0.02, json.dumps(row)
