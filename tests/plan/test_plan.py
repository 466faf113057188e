"""Plans: what they choose, what they lack, and what they write."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UsageError
from quantize.files import strict_yaml
from quantize.plan.answer import as_json
from quantize.plan.calibrate import Run, calibrated, read_run, scaled
from quantize.plan.deploy import Plan, plan_for
from quantize.plan.emit import KINDS, emit
from quantize.plan.gpus import gpu_named
from quantize.plan.latency import CONSTANTS, ERRORS, StepTime
from quantize.plan.memory import Engine
from quantize.plan.request import Demand, Nodes, Request
from quantize.plan.served import ServedModel, dense
from quantize.plan.shortage import shortages
from quantize.plan.simulate.costs import StepCosts
from quantize.plan.steady import Limits, Load, best_rate, steady

SHAPE = (32, 4096, 32, 8, 128, 14336, 128256)
LLAMA = dataclasses.replace(dense("llama-8b", *SHAPE), max_context=131072)
SMALL = dense("llama-8b-w4", *SHAPE, weight_bits=4.125, kv_head_bytes=2 * 68.0)
H100 = gpu_named("h100")
STEP = StepTime(LLAMA, H100, 1)


def planned(model: ServedModel = LLAMA, gpu: str = "h100", gpus: int = 4, **asked: Any) -> Plan:
    demand = Demand.model_validate({"model": "org/m", **asked})
    nodes = Nodes.model_validate({"gpu": gpu, "gpus": gpus})
    return plan_for(Request(models=(demand,), cluster=(nodes,)), {"m": model})


def test_running_sequences_follow_littles_law():
    draw = random.Random(random.randrange(10**9))
    for _ in range(20):
        load = Load(draw.uniform(0.1, 8), draw.randrange(50, 3000), draw.randrange(20, 500))
        found = steady(STEP, Engine(), load)
        assert found is not None
        answered_in = found.tpot * (load.outputs - 1)
        assert found.running == pytest.approx(load.rate * answered_in, rel=0.01, abs=0.02)


def test_more_requests_wait_longer_and_fewer_bytes_take_more():
    states = [steady(STEP, Engine(), Load(rate, 1000, 200)) for rate in (0.5, 2.0, 8.0, 14.0)]
    for name in ("running", "ttft", "ttft_share", "tpot", "busy"):
        values = [getattr(state, name) for state in states]
        assert values == sorted(values)
    assert steady(STEP, Engine(), Load(500.0, 1000, 200)) is None
    limits = Limits(200, ttft=0.5, tpot=0.03)
    load = Load(1.0, 1000, 200)
    plain, small = (
        best_rate(StepTime(model, H100, 1), Engine(), load, limits) for model in (LLAMA, SMALL)
    )
    assert small > plain > 1


def test_the_closed_form_is_the_simulators_mean():
    found = planned(rate=6.0, ttft=3, tpot=0.2, tp=1, spread=0.0).chosen["m"]
    assert found.simulated is not None
    assert found.state is not None
    outcome = found.simulated.outcome
    assert found.state.tpot == pytest.approx(float(outcome.tpot.mean()), rel=0.05)
    assert found.state.ttft == pytest.approx(float(outcome.ttft.mean()), rel=0.15)


def test_fewest_gpus_that_meet_the_goals():
    rate = 22.0
    plan = planned(rate=rate, ttft=1, tpot=0.05)
    chosen = plan.chosen["m"]
    assert plan.feasible
    assert plan.gpus == chosen.gpus == min(o.gpus for o in plan.options["m"] if o.works)
    assert chosen.simulated is not None
    assert chosen.simulated.attainment >= 0.9
    places = [(e.nodes, e.node, gpu) for e in plan.engines for gpu in e.gpus]
    assert len(places) == len(set(places)) == plan.gpus
    assert planned(SMALL, rate=rate, ttft=1, tpot=0.05).gpus <= plan.gpus


def test_sequences_at_once():
    plan = planned(sequences=600, context=4096)
    for option in plan.options["m"]:
        assert option.replicas == math.ceil(600 / min(option.fit.sequences, 1024))
    slow = planned(sequences=600, context=4096, tpot=0.02).options["m"]
    assert min(o.gpus for o in slow) > min(o.gpus for o in plan.options["m"])


def test_priority_is_placed_first():
    demands = tuple(
        Demand(model=f"org/{name}", rate=6.0, ttft=1.0, tpot=0.05, priority=i, tp=1)
        for i, name in enumerate(("a", "b"))
    )
    request = Request(models=demands, cluster=(Nodes(gpu="h100", gpus=1),))
    plan = plan_for(request, {"a": LLAMA, "b": LLAMA})
    assert list(plan.chosen) == ["b"]
    assert plan.missing == ("a",)


@pytest.mark.parametrize(
    ("asked", "short", "words"),
    [
        ({"gpu": "l4", "gpus": 1, "context": 60000}, "memory", "a context of"),
        ({"context": 200_000}, "context", "context 131,072 or less"),
        ({"rate": 1.0, "tpot": 0.001}, "latency", "tpot 0.0"),
        ({"rate": 1.0, "ttft": 0.001}, "latency", "ttft 0.0"),
        ({"rate": 60.0, "ttft": 1.0, "tpot": 0.05, "gpus": 1}, "gpus", "more h100-sxm"),
        ({"tp": 3}, "memory", "another tp"),
    ],
)
def test_what_is_short_and_what_would_do(asked: dict[str, Any], short: str, words: str):
    plan = planned(**asked)
    assert not plan.feasible
    (lack,) = shortages(plan)
    assert lack.short == short
    assert any(words in remedy for remedy in lack.remedies), lack


def test_remedies_do():
    """The context, the rate and the goal that are named make the plan feasible."""
    lack = shortages(planned(gpu="l4", gpus=1, context=60000))[0]
    found = next(re.search(r"context of ([\d,]+)", r) for r in lack.remedies if "context of" in r)
    assert found is not None
    longest = int(found[1].replace(",", ""))
    assert planned(gpu="l4", gpus=1, context=longest).feasible
    assert not planned(gpu="l4", gpus=1, context=longest + 20).feasible
    lack = shortages(planned(rate=1.0, tpot=0.001))[0]
    tpot = float(lack.remedies[0].removeprefix("tpot "))
    assert planned(rate=0.1, tpot=tpot).feasible


def test_json_holds_ranges():
    data = json.loads(json.dumps(as_json(planned(rate=2.0, ttft=1, tpot=0.05))))
    assert data["feasible"]
    assert data["errors"]["tpot"]["low"] == ERRORS["tpot"].low
    chosen = data["models"][0]["chosen"]
    low, mid, high = chosen["steady"]["tpot"]
    assert low < mid < high
    memory = chosen["memory"]
    assert memory["kv"] == memory["budget"] - sum(
        memory[key] for key in ("weights", "activations", "overhead")
    )


@pytest.fixture(scope="module")
def two() -> Plan:
    demands = (
        Demand(model="org/Big_Model", rate=30.0, ttft=1.0, tpot=0.03, tp=2),
        Demand(model="org/m", sequences=10, kv="fp8"),
    )
    request = Request(models=demands, cluster=(Nodes(gpu="h100", gpus=4, nodes=2),))
    plan = plan_for(request, {"Big_Model": LLAMA, "m": LLAMA})
    assert plan.feasible
    return plan


def test_vllm_lines_hold_the_plan(two: Plan):
    lines = [x for x in emit("vllm", two).splitlines() if not x.startswith("#")]
    assert len(lines) == len(two.engines)
    for line in lines:
        devices, *words = shlex.split(line)
        gpus = devices.removeprefix("CUDA_VISIBLE_DEVICES=").split(",")
        assert words[:2] == ["vllm", "serve"]
        assert words[words.index("--tensor-parallel-size") + 1] == str(len(gpus))
    assert sum("--kv-cache-dtype fp8" in line for line in lines) == 1


def test_compose_has_the_shape_of_its_specification(two: Plan):
    data = strict_yaml.load(emit("compose", two), "compose.yaml").data
    assert set(data) == {"services"}
    for name, service in data["services"].items():
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
        assert isinstance(service["image"], str)
        assert all(isinstance(word, str) for word in service["command"])
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert all(isinstance(gpu, str) for gpu in device["device_ids"])
    ports = [(s["profiles"][0], s["ports"][0]) for s in data["services"].values()]
    assert len(set(ports)) == len(ports) == len(two.engines)


def test_values_of_charts_count_gpus_and_replicas(two: Plan):
    stack = strict_yaml.load(emit("production-stack", two), "values.yaml").data
    specs = stack["servingEngineSpec"]["modelSpec"]
    assert sum(spec["replicaCount"] * spec["requestGPU"] for spec in specs) == two.gpus
    assert specs[0]["vllmConfig"]["tensorParallelSize"] == specs[0]["requestGPU"] == 2
    documents = emit("llm-d", two).split("---\n")
    assert len(documents) == 2
    for text in documents:
        values = strict_yaml.load(text, "values.yaml").data
        assert values["modelArtifacts"]["uri"].startswith("hf://org/")
        assert values["decode"]["parallelism"]["tensor"] in (1, 2)


def test_what_vllm_does_not_load_is_not_written():
    native = dataclasses.replace(LLAMA, notes=("format pq: vLLM reads it with pq's plugin alone",))
    with pytest.raises(UsageError, match="plugin alone; convert to compressed-tensors"):
        emit("vllm", planned(native))
    w4a8 = dataclasses.replace(SMALL, compute="fp8")
    assert emit("vllm", planned(w4a8))
    with pytest.raises(UsageError, match="on H100 and H200 alone, not on l40s"):
        emit("vllm", planned(w4a8, gpu="l40s"))
    with pytest.raises(UsageError, match="choose one of vllm"):
        emit("helm", planned())
    with pytest.raises(UsageError, match="cannot be served"):
        emit("vllm", planned(context=200_000))


def test_calibration_finds_what_was_changed():
    """Runs made by the model with other constants are met again, TPOT of an unseen load too."""
    draw = random.Random(random.randrange(10**9))
    # Slower ones come near what they can bear at the third load, where times explode.
    truth = scaled(CONSTANTS, draw.uniform(0.8, 1.3), draw.uniform(0.5, 1.6))
    step = StepTime(LLAMA, H100, 1, truth)

    def run(rate: float, inputs: int, outputs: int) -> Run:
        state = steady(step, Engine(), Load(rate, inputs, outputs))
        assert state is not None
        return Run(rate, inputs, outputs, state.ttft, state.tpot)

    seen = [run(0.2, 100, 500), run(4.0, 1500, 300), run(8.0, 200, 800)]
    constants, errors = calibrated(LLAMA, H100, 1, seen)
    unseen = run(3.0, 700, 400)
    state = steady(StepTime(LLAMA, H100, 1, constants), Engine(), Load(3.0, 700, 400))
    assert state is not None
    assert state.tpot == pytest.approx(unseen.tpot, rel=0.06)
    assert state.ttft == pytest.approx(unseen.ttft, rel=0.15)
    assert errors["tpot"].mean < 0.05


def test_a_run_is_read_from_what_vllm_writes(tmp_path: Path):
    data = {
        "completed": 100,
        "duration": 50.0,
        "total_input_tokens": 102400,
        "total_output_tokens": 12800,
        "mean_ttft_ms": 80.5,
        "mean_tpot_ms": 9.5,
        "request_rate": "inf",
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read_run(path) == Run(2.0, 1024, 128, 0.0805, 0.0095)
    path.write_text(json.dumps(data | {"completed": 0}), encoding="utf-8")
    with pytest.raises(UsageError, match="completed is 0"):
        read_run(path)
    path.write_text("not json", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        read_run(path)


@pytest.mark.slow
def test_vllms_own_parser_takes_the_lines(two: Plan):
    engine = (
        Path(os.environ.get("PQ_VLLM", Path(__file__).parents[2] / ".venv-vllm")) / "bin" / "python"
    )
    if not engine.exists():
        pytest.skip("no environment of vLLM; make test-vllm makes one, PQ_VLLM names another")
    code = (
        "import sys, json\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    found = parser.parse_args(words)\n"
        "    print(found.tensor_parallel_size, found.max_model_len, found.kv_cache_dtype)\n"
    )
    lines = [shlex.split(x)[3:] for x in emit("vllm", two).splitlines() if not x.startswith("#")]
    for kind in KINDS[1:]:
        emit(kind, two)
    done = subprocess.run(
        [str(engine), "-c", code, json.dumps(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([x for x in done.stdout.splitlines() if x and x[0].isdigit()]) == len(lines)


def test_measured_steps_take_the_place_of_the_roofline():
    """A profile of which one step takes 20 ms, whatever it holds, and its prompts 1 ms a token."""
    costs = StepCosts(weights=(0.0,), decoding=(0.0, 0.02), token=1e-3)
    demand = Demand(model="org/m", rate=0.5, input=100, output=50, ttft=1.0, tpot=0.1, spread=0.0)
    nodes = Nodes(gpu="h100", gpus=4)
    request = Request(models=(demand,), cluster=(nodes,))
    plan = plan_for(request, {"m": LLAMA}, profile={2: costs})
    chosen = plan.chosen["m"]
    assert chosen.tp == 2
    assert {o.tp: o.refused for o in plan.options["m"]}[1] == "the profile has no rows of tp 1"
    assert chosen.alone == pytest.approx(0.02)
    assert chosen.first == pytest.approx(0.1)
    assert chosen.simulated is not None
    assert 0.02 <= chosen.simulated.tpot[0] < 0.03
