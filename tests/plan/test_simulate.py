"""The simulator against one that takes every step by itself, against Little's law, and its orders."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest

from quantize.plan.gpus import GPUS
from quantize.plan.latency import Batch, StepTime
from quantize.plan.served import KvLayer, ServedModel, dense
from quantize.plan.simulate.costs import StepCosts, model_costs
from quantize.plan.simulate.memory import Share, Slabs
from quantize.plan.simulate.requests import Requests, merged, poisson
from quantize.plan.simulate.run import Outcome, simulate
from quantize.plan.simulate.setup import EngineSetup
from quantize.plan.slabs import KvFormat, SlabPool

LLAMA = dense("8b", 32, 4096, 32, 8, 128, 14336, 128256)
H100 = next(gpu for gpu in GPUS if gpu.name == "h100-sxm")
COSTS = model_costs(LLAMA, H100, 1)
# Memory bound everywhere, so that steps taken at once cost what they cost one by one.
PLAIN = StepCosts(
    [5e-3], kv=2e-8, token=1e-7, attention=1e-12, host=2e-3, sequence=7e-5, prefill=4e-3, first=0.02
)


def drawn(rate: float, count: int, seed: int, **lengths: float) -> Requests:
    return poisson(rate, count, np.random.default_rng(seed), **lengths)


def one_by_one(
    requests: Requests, costs: StepCosts, blocks: int, budget: int, sequences: int
) -> tuple[list[float], list[float], int]:
    """vLLM's loop, a step at a time: (first token, finish, preemptions)."""
    arrival = requests.arrival.tolist()
    need, left = requests.input.tolist(), requests.output.tolist()
    count, computed = len(arrival), [0] * len(arrival)
    first, finish = [math.nan] * count, [math.nan] * count
    said: dict[int, int] = {}
    waiting: list[int] = []
    running: list[int] = []
    now, coming, preempted = 0.0, 0, 0

    def taken() -> int:
        # A prompt holds all its blocks from its admission on.
        return sum(math.ceil(max(computed[r], need[r]) / 16) for r in running)

    while coming < count or waiting or running:
        if not running and not waiting:
            now = max(now, arrival[coming])
        while coming < count and arrival[coming] <= now:
            waiting.append(coming)
            coming += 1
        tokens, prompt, scores = budget, 0, 0.0
        decoding = [r for r in running if computed[r] >= need[r]]
        thrown = False
        for r in list(decoding):
            if r not in running:
                continue
            computed[r] += 1
            while taken() > blocks:
                victim = running.pop()
                if victim in decoding:  # what it has said is part of its prompt now
                    decoding.remove(victim)
                    need[victim] += said[victim]
                    left[victim] -= said[victim]
                computed[victim] = 0
                waiting.insert(0, victim)
                preempted += 1
                thrown = True
                if victim == r:
                    break
        held = sum(computed[r] - 1 for r in decoding)
        tokens -= len(decoding)
        started = []
        prompts = [r for r in running if computed[r] < need[r]]
        for r in prompts:
            n = min(tokens, need[r] - computed[r])
            scores += n * (computed[r] + n / 2)
            computed[r] += n
            tokens, prompt = tokens - n, prompt + n
            started += [r] if computed[r] == need[r] else []
        while not thrown and waiting and tokens > 0 and len(running) < sequences:
            r = waiting[0]
            if taken() + math.ceil(need[r] / 16) > blocks:
                break
            running.append(waiting.pop(0))
            n = min(tokens, need[r])
            scores += n * n / 2
            computed[r] = n
            tokens, prompt = tokens - n, prompt + n
            started += [r] if computed[r] == need[r] else []
        now += costs.seconds(prompt, scores, len(decoding), held)
        for r in decoding:
            said[r] += 1
            if said[r] == left[r]:
                finish[r] = now
                running.remove(r)
        for r in started:
            said[r] = 1
            if math.isnan(first[r]):
                first[r] = now + costs.first
            if left[r] == 1:
                finish[r] = now
                running.remove(r)
    return first, finish, preempted


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("blocks", "sequences"), [(10_000, 256), (60, 256), (45, 5)])
def test_steps_at_once_are_steps_one_by_one(seed: int, blocks: int, sequences: int):
    full = drawn(20.0, 120, seed, input_mean=120, output_mean=60, spread=0.7)
    lengths = np.minimum(full.input, 400), np.minimum(full.output, 200)  # all fit, alone
    requests = Requests(full.arrival, *lengths, full.prefix, full.model)
    expected = one_by_one(requests, PLAIN, blocks, 256, sequences)
    setup = EngineSetup(PLAIN, batched_tokens=256, sequences=sequences)
    share = Share(blocks)
    found = simulate(requests, [(setup, share)])
    np.testing.assert_allclose(found.first, expected[0], rtol=1e-9)
    np.testing.assert_allclose(found.finish, expected[1], rtol=1e-9)
    assert found.preemptions == expected[2]
    assert (blocks == 60) <= (expected[2] > 0)  # the small memory is too small
    assert share.held() == (0, 0)
    # The same memory as slabs of one block is the same memory.
    kind = KvFormat(64, 4)
    pool = SlabPool(blocks * 4, 64)
    pool.register(kind)
    other = simulate(requests, [(setup, Slabs(pool, kind))])
    np.testing.assert_allclose(other.finish, found.finish, rtol=1e-9)
    assert pool.free_slabs == pool.slabs


def test_costs_are_those_of_the_latency_model():
    rng = np.random.default_rng()
    half = (KvLayer(8, 512.0), KvLayer(8, 512.0, window=1024))
    windowed = ServedModel(**{**LLAMA.__dict__, "kv": half * 16})
    for model in (LLAMA, windowed):
        costs, step = model_costs(model, H100, 2), StepTime(model, H100, 2)
        for _ in range(30):
            p, n = int(rng.integers(0, 9000)) * int(rng.integers(0, 2)), int(rng.integers(1, 200))
            mean, reach = float(rng.uniform(1, 5000)), float(rng.uniform(1, 5000))
            batch = Batch(p, reach if p else 0.0, n, n * mean)
            expected = step.seconds(batch)
            assert costs.seconds(p, p * reach, n, n * mean) == pytest.approx(expected, rel=1e-9)
            if not p:
                alone = costs.decode()(n, n * mean) + costs.host_seconds(0, n)
                assert alone == pytest.approx(expected, rel=1e-9)


def run(requests: Requests, blocks: int = 20_000, **setup: object) -> Outcome:
    return simulate(requests, [(EngineSetup(COSTS, **setup), Share(blocks))])  # type: ignore[arg-type]


def test_littles_law():
    """Mean requests in the system = rate · mean time in it."""
    requests = drawn(12.0, 4000, 3)
    made = simulate(requests, [(EngineSetup(COSTS), Share(20_000))], samples=True)
    inside = made.finish - requests.arrival
    times = np.concatenate([requests.arrival, made.finish])
    change = np.concatenate([np.ones(len(requests)), -np.ones(len(requests))])
    order = np.argsort(times)
    number = np.cumsum(change[order])[:-1]
    mean = float((number * np.diff(times[order])).sum() / (times.max() - times.min()))
    rate = len(requests) / (times.max() - times.min())
    assert mean == pytest.approx(rate * inside.mean(), rel=1e-9)
    # The engine's own count of what it holds, over time, is that number.
    moments = np.append(made.samples["time"], made.seconds)
    counted = made.samples["running"] + made.samples["waiting"]
    seen = float((counted * np.diff(moments)).sum() / made.seconds)
    assert seen == pytest.approx(mean, rel=0.02)


def test_more_requests_wait_longer_and_more_memory_less():
    base = drawn(1.0, 1500, 5)
    waits = [float(np.mean(run(base.at_rate(rate)).ttft)) for rate in (2, 8, 16, 24, 40)]
    assert waits == sorted(waits)
    waits = [float(np.mean(run(base.at_rate(24), n).ttft)) for n in (20_000, 2_000, 700, 300)]
    assert waits == sorted(waits)
    slower = dataclasses.replace(COSTS, weights=[2 * w for w in COSTS.weights])
    times = [
        float(np.mean(simulate(base.at_rate(16), [(EngineSetup(c), Share(20_000))]).tpot))
        for c in (COSTS, slower)
    ]
    assert times[1] > 1.2 * times[0]


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "lsf", "prism", "fineserve"])
@pytest.mark.parametrize("drop", [False, True])
def test_every_request_is_answered_or_refused(policy: str, drop: bool):
    requests = drawn(40.0, 800, 7)
    made = [run(requests, 3_000, policy=policy, ttft=1.0, drop=drop) for _ in range(2)]
    np.testing.assert_array_equal(made[0].finish, made[1].finish)  # the same again
    answered = ~np.isnan(made[0].finish)
    assert (answered ^ made[0].dropped).all()
    assert made[0].dropped.any() == drop
    assert (made[0].first[answered] > requests.arrival[answered]).all()
    one = requests.output == 1
    late = made[0].finish[answered & ~one] - made[0].first[answered & ~one]
    assert (late > -COSTS.first).all()


def test_what_orders_are_for():
    """In an overload, orders by length or by goal answer more in time than that of arrival."""
    requests = drawn(40.0, 1500, 11)
    met = {
        policy: run(requests, policy=policy, ttft=2.0, drop=policy == "fineserve").met(2.0).mean()
        for policy in ("fcfs", "sjf", "fineserve")
    }
    assert met["fcfs"] < 0.5
    assert met["fcfs"] + 0.2 < min(met["sjf"], met["fineserve"])


def test_engines_on_one_gpu_slow_each_other_down():
    requests = drawn(3.0, 300, 13)
    both = merged([requests, requests.for_model(1)])
    first, second = EngineSetup(COSTS), EngineSetup(COSTS, model=1)
    alone = simulate(requests, [(first, Share(9_000))])
    shared = simulate(both, [(first, Share(9_000)), (second, Share(9_000))])
    elsewhere = EngineSetup(COSTS, gpus=(1,), model=1)
    apart = simulate(both, [(first, Share(9_000)), (elsewhere, Share(9_000))])
    np.testing.assert_allclose(apart.finish[0::2], alone.finish, rtol=1e-9)
    assert 1.1 < shared.tpot.mean() / alone.tpot.mean() < 2.0  # the host's part is not shared
    # Work is neither lost nor made: two that stand still for each other end as one after the other.
    at_once = Requests(*(np.zeros(2, dtype=int) + v for v in (0, 64, 50, 0)), np.array([0, 1]))
    gpu = StepCosts([1e-2])
    two = simulate(at_once, [(EngineSetup(gpu), Share(99)), (EngineSetup(gpu, model=1), Share(99))])
    np.testing.assert_allclose(two.finish, [1.0, 1.0], rtol=1e-9)


def test_slabs_lend_what_others_leave():
    """Two engines of which one is idle: in slabs the other has all, in fixed halves a half."""
    requests = drawn(16.0, 400, 17)
    kind = KvFormat(32 * 1024, 64)
    total = 2 * 700 * kind.block_bytes * kind.parts
    pool = SlabPool(total // (1 << 18), 1 << 18)
    pool.register(kind)
    setups = [EngineSetup(COSTS), EngineSetup(COSTS, model=1)]
    lent = simulate(requests, [(setup, Slabs(pool, kind)) for setup in setups])
    halves = simulate(requests, [(setup, Share(700)) for setup in setups])
    assert lent.preemptions < halves.preemptions
    assert lent.ttft.mean() < halves.ttft.mean()
    assert pool.free_slabs == pool.slabs


def test_a_request_that_can_never_fit_is_refused():
    requests = Requests(
        np.zeros(2), np.array([100, 10]), np.array([80, 10]), np.zeros(2, int), np.zeros(2, int)
    )
    made = run(requests, blocks=11)  # 179 tokens take 12
    assert made.dropped.tolist() == [True, False]


def test_speed():
    """≥ 100,000 requests a second is asked for; a busy machine is given room."""
    requests = drawn(20.0, 6000, 23)
    begun = time.process_time()
    run(requests)
    assert len(requests) / (time.process_time() - begun) > 40_000
