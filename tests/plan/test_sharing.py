"""Plans in which engines of several models share GPUs."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from quantize.errors import RecipeError, UsageError
from quantize.pictures import Bars, Lines, Table
from quantize.plan.answer import as_json
from quantize.plan.deploy import Plan
from quantize.plan.emit import emit
from quantize.plan.gpus import gpu_named
from quantize.plan.request import Request, parse_request
from quantize.plan.served import KvLayer, dense
from quantize.plan.shared import again, kv_format, streams_of
from quantize.plan.sharing import plan_of
from quantize.plan.shortage import shortages
from quantize.plan.simulate.tables import Row, profiles
from quantize.report import plan_shared as drawn

SHAPE = (24, 2048, 16, 4, 128, 5632, 32000)
PLAIN = dense("plain", *SHAPE)
SMALL = dense("small", *SHAPE, weight_bits=4.25, kv_head_bytes=2 * 68.0)
MODELS = {"plain": PLAIN, "small": SMALL}
GPU = gpu_named("l40s")


def asked(memory: str, rate: float = 4.0, gpus: int = 4, **more: str) -> Request:
    lines = "\n".join(f"  {key}: {value}" for key, value in {"memory": memory, **more}.items())
    models = "\n".join(
        f"  - {{model: org/{name}, rate: {rate}, input: 300, output: 60, ttft: 0.6, tpot: 0.06}}"
        for name in MODELS
    )
    text = f"models:\n{models}\ncluster:\n  - {{gpu: l40s, gpus: {gpus}}}\nsharing:\n{lines}\n"
    return parse_request(text, "fleet.yaml")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(asked("shares"), MODELS)


@pytest.fixture(scope="module")
def slabs() -> Plan:
    return plan_of(asked("slabs", policy="fineserve", placement="fineserve"), MODELS)


def test_two_light_models_take_one_gpu(plan: Plan, slabs: Plan):
    for found in (plan, slabs):
        assert found.feasible
        assert found.gpus == 1
        assert len(found.engines) == 2
        assert found.shared is not None
        assert found.shared.alone == 2
        assert min(found.shared.attainment) >= 0.9
        simulated = [o.simulated.attainment for o in found.chosen.values() if o.simulated]
        assert simulated == pytest.approx(found.shared.attainment)


def test_no_gpu_is_given_out_twice(plan: Plan, slabs: Plan):
    shared = plan.shared
    assert shared is not None
    engines = range(len(shared.setups))
    used = sum(shared.held(i) + shared.kv(i) for i in engines)
    assert 0.99 * shared.cluster.memory < used <= shared.cluster.memory
    assert sum(o.engine.utilization for o in plan.chosen.values()) <= 0.92
    for option in plan.chosen.values():
        spent = option.fit.memory
        parts = spent.weights + spent.activations + spent.overhead + spent.kv
        assert parts == spent.budget
    shared = slabs.shared
    assert shared is not None
    pools = {id(pool) for _, memory in shared.setups for pool in memory.pools}
    assert len(pools) == 1  # one for both
    room = shared.cluster.memory - sum(map(shared.held, engines))
    assert shared.kv(0) == shared.kv(1) <= room


def test_more_requests_take_more_gpus_and_miss_more_goals(plan: Plan):
    assert plan.shared is not None
    many = plan_of(asked("shares", rate=250.0), MODELS)
    assert many.feasible
    assert many.gpus > plan.gpus
    met = [min(again(plan.request, plan.shared, f).attainment) for f in (0.5, 1.0, 40.0, 200.0)]
    assert met == sorted(met, reverse=True)
    assert met[-1] < 0.5 < met[0]


def test_what_is_short_and_what_would_do():
    found = plan_of(asked("shares", rate=250.0, gpus=1), MODELS)
    assert not found.feasible
    lacks = shortages(found)
    assert lacks
    assert {lack.short for lack in lacks} <= {"latency", "gpus"}
    words = lacks[0].remedies[0].split()
    assert words[1:] == ["l40s", "in", "the", "place", "of", "1"]
    assert plan_of(asked("shares", rate=250.0, gpus=int(words[0])), MODELS).feasible
    less = next(r for r in lacks[0].remedies if r.startswith("rates of"))
    assert 10 <= int(less.split()[2]) <= 90


def test_lines_of_vllm_divide_the_gpu(plan: Plan, slabs: Plan):
    text = emit("vllm", plan)
    assert "start one after the other" in text
    lines = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    assert [line[0] for line in lines] == ["CUDA_VISIBLE_DEVICES=0"] * 2
    shares = [float(line[line.index("--gpu-memory-utilization") + 1]) for line in lines]
    assert 0.9 < sum(shares) <= 0.92
    with pytest.raises(UsageError, match="set memory: shares"):
        emit("compose", slabs)
    with pytest.raises(UsageError, match="one pod"):
        emit("llm-d", plan)
    other = plan.request.model_copy(
        update={"sharing": plan.request.sharing.model_copy(update={"drop": True})}  # type: ignore[union-attr]
    )
    with pytest.raises(UsageError, match="policy: fcfs"):
        emit("vllm", dataclasses.replace(plan, request=other))


def test_the_page_draws_what_lies_on_each_gpu(plan: Plan, slabs: Plan):
    for found, kind in ((plan, "free blocks of the shares"), (slabs, "free slabs")):
        assert found.shared is not None
        (bars,) = drawn.gpus(found.shared)
        assert isinstance(bars, Bars)
        assert bars.categories == ["GPU 0"]
        for column in zip(*bars.series.values(), strict=True):
            assert sum(column) == pytest.approx(GPU.memory_gib, abs=1e-6)
        assert bars.series["KV: small"][0] > 0
        assert bars.series[kind][0] > 0
        (group,) = drawn.memory(found.shared)
        (lines,) = group.pictures  # type: ignore[union-attr]
        assert isinstance(lines, Lines)
        assert set(lines.series) == set(MODELS)
    (table,) = drawn.slabs(slabs.shared)  # type: ignore[arg-type]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["plain", "small"] or len(table.rows) == 2
    assert not list(drawn.slabs(plan.shared))  # type: ignore[arg-type]


def test_json_says_who_shares(plan: Plan):
    data = as_json(plan)
    assert data["shared"]["gpus_alone"] == 2
    assert set(data["shared"]["attainment"]) == set(MODELS)
    assert data["gpus"] == 1
    for engine in data["shared"]["engines"]:
        assert 0 < engine["kv_most"] <= engine["kv"]


def test_blocks_are_the_models_bytes():
    for model in MODELS.values():
        kind = kv_format(model, 2)
        assert kind.token_bytes == pytest.approx(model.kv_bytes_per_token(2), rel=1e-3)
    state = dataclasses.replace(PLAIN, kv=(KvLayer(4, 512.0, None, 1000),))
    with pytest.raises(UsageError, match="keeps a state"):
        kv_format(state, 1)


def test_streams_last_equally_long():
    request = asked("shares")
    demands = (request.models[0].model_copy(update={"rate": 9.0}), request.models[1])
    spans = [stream.arrival[-1] for stream in streams_of(demands)]
    assert spans[0] == pytest.approx(spans[1], rel=0.15)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("memory: shares", "memory: slaps"), "line 7.*memory"),
        (("memory: shares", "memori: slabs"), "memory"),
        (("rate: 4.0", "sequences: 4"), "give it a rate or a trace"),
        (("  - {gpu: l40s, gpus: 4}", "  - {gpu: l40s}\n  - {gpu: h100}"), "all of one kind"),
        (("sharing:\n  memory: shares", "sharing: yes"), "must be a mapping"),
    ],
)
def test_mistakes_have_their_lines(change: tuple[str, str], words: str):
    models = "  - {model: org/a, rate: 4.0, ttft: 1.0}"
    text = f"models:\n{models}\ncluster:\n  - {{gpu: l40s, gpus: 4}}\n# and\nsharing:\n  memory: shares\n"
    assert change[0] in text
    with pytest.raises(RecipeError, match=words.replace("line 7", "fleet.yaml:7")):
        parse_request(text.replace(*change), "fleet.yaml")


def test_measured_times_are_of_engines_alone():
    row = Row("m", "f", 1, 100.0, 1, 100, 0.1, 0.01)
    (measured,) = profiles([row]).values()
    with pytest.raises(UsageError, match="have their GPUs alone"):
        plan_of(asked("shares"), MODELS, profile={1: measured.costs})
