"""FineServe's claim in simulation: SLO attainment and tokens/s over request rates beside its baselines.

    python eval/fineserve.py --traces DIR [--output eval/results/fineserve.json] [--only NAME …]

DIR holds fineserve_apex_cost.csv (FineServe's own latency tables) and the Azure traces. Engines take
the times of those tables, KV memory is handed out block by block, and nothing is measured here: what
comes out is what the published tables and rules imply. docs/plan-fineserve.md is written from the
result by docs/plan_fineserve.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantize.plan.demand import Demand, Shard
from quantize.plan.placement import Cluster, Placement, best, fineserve, prism
from quantize.plan.served import dense
from quantize.plan.simulate.placed import Pools, Serving, engines
from quantize.plan.simulate.requests import Requests, merged, poisson, requests
from quantize.plan.simulate.run import Outcome, simulate
from quantize.plan.simulate.tables import Profile, profiles, read_rows, with_stretch
from quantize.plan.slabs import (
    KvFormat,
    fixed_pools,
    paper_pools,
    precision_pools,
    smallest_slab,
    static_pools,
)

SCALE, LONG, BUFFER = 40, 903, 0.004
"""The goal: 40 · TTFT of 903 tokens, the 95th percentile of LMSYS-Chat's prompts, and 4 ms."""
LENGTHS = {"input_mean": 300.0, "output_mean": 220.0, "spread": 1.1}
"""ShareGPT-like: log-normal, about 1,000 tokens at the 95th percentile of prompts."""
GIB = 2**30
ENGINE = 2 * GIB
"""Of each engine on each of its GPUs: CUDA context, graphs, activations."""
MEMORY = int(0.92 * 80 * GIB)
SEQUENCES, BATCHED = 256, 4096
"""FineServe's max_num_batched_tokens."""

SHAPES = {
    # layers, hidden, heads, kv heads, head size, intermediate, vocabulary
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256),
    "qwen-3-32b": (64, 5120, 64, 8, 128, 25600, 151936),
    "llama-3.1-70b": (80, 8192, 64, 8, 128, 28672, 128256),
}
BITS = {"org": 16.0, "fp8_kv8": 8.0, "awq": 4.25, "qoq": 4.25}
KV_BLOCK = {"org": (256, 16), "awq": (256, 16), "fp8_kv8": (128, 16), "qoq": (68, 64)}
"""Bytes of a head's keys of one token, tokens of a block; OmniServe adds 4 bytes of scales."""


@dataclass(frozen=True)
class Setting:
    """Models that share a cluster."""

    name: str
    gpus: int
    models: tuple[tuple[str, str, float], ...]
    """(model, format, share of the requests)."""
    memory: int = MEMORY


EIGHT = "llama-3.1-8b"
SETTINGS = (
    Setting(
        "1 GPU, 4 models",
        1,
        ((EIGHT, "org", 1.0), (EIGHT, "fp8_kv8", 1.0), (EIGHT, "awq", 1.0), (EIGHT, "qoq", 1.0)),
    ),
    Setting(
        "8 GPUs, 9 models",
        8,
        (
            (EIGHT, "org", 4.0),
            (EIGHT, "fp8_kv8", 4.0),
            (EIGHT, "awq", 4.0),
            (EIGHT, "qoq", 4.0),
            ("qwen-3-32b", "org", 2.0),
            ("qwen-3-32b", "fp8_kv8", 2.0),
            ("llama-3.1-70b", "org", 1.0),
            ("llama-3.1-70b", "fp8_kv8", 1.0),
            ("llama-3.1-70b", "awq", 1.0),
        ),
    ),
)


@dataclass(frozen=True)
class System:
    """A placement, an order of requests and a way to share memory."""

    name: str
    place: Any
    policy: str
    drop: bool
    pools: Pools | None


paper = partial(paper_pools, batched_tokens=BATCHED)
SYSTEMS = (
    System("FineServe", fineserve, "fineserve", True, paper),
    System("Prism", prism, "prism", True, fixed_pools),
    System("static partition", prism, "fcfs", False, None),
    System("fcfs", fineserve, "fcfs", False, paper),
    System("sjf", fineserve, "sjf", False, paper),
    System("lsf", fineserve, "lsf", False, paper),
    # What drives the difference: one part of FineServe exchanged at a time.
    System("fcfs that drops", fineserve, "fcfs", True, paper),
    System("sjf that drops", fineserve, "sjf", True, paper),
    System("FineServe, never drops", fineserve, "fineserve", False, paper),
    System("FineServe, static memory", fineserve, "fineserve", True, None),
    System("FineServe, Prism's placement", prism, "fineserve", True, paper),
    System("FineServe, best placement", best, "fineserve", True, fixed_pools),
)
BASELINES = ("Prism", "static partition", "fcfs", "sjf", "lsf")


def shape(model: str, kind: str, tp: int) -> KvFormat:
    """A block of one layer's keys on one of `tp` GPUs."""
    layers, kv_heads = SHAPES[model][0], SHAPES[model][3]
    size, tokens = KV_BLOCK[kind]
    return KvFormat(size * tokens * kv_heads // tp, 2 * layers, tokens)


def demands(table: dict[tuple[str, str, int], Profile], setting: Setting) -> list[Demand]:
    """Models with the goals FineServe gives them; rates are shares of 1 request/s."""
    total, found = sum(part for _, _, part in setting.models), []
    for model, kind, part in setting.models:
        sizes = dense(model, *SHAPES[model], weight_bits=BITS[kind])
        shards = {
            tp: Shard(tp, sizes.weights(tp) + ENGINE, shape(model, kind, tp), own.costs)
            for (name, form, tp), own in table.items()
            if (name, form) == (model, kind) and tp <= setting.gpus
        }
        base = min(shards)
        goal = SCALE * LONG * table[model, kind, base].token_seconds + BUFFER
        name = f"{model} {kind}"
        lengths = LENGTHS["input_mean"], LENGTHS["output_mean"]
        found.append(Demand(name, shards, part / total, goal, *lengths))
    return found


def place(system: System, models: list[Demand], rate: float, cluster: Cluster) -> Placement:
    """For this rate, or the highest below it for which all models have a place."""
    scale = 1.0
    while True:
        asked = [replace(model, rate=model.rate * rate * scale) for model in models]
        made: Placement = system.place(asked, cluster)
        if not made.unplaced or scale < 0.01:
            return made
        scale *= 0.85


def workload(
    name: str, setting: Setting, rate: float, count: int, seed: int, traces: Path
) -> Requests:
    """Requests for all models: Poisson with ShareGPT-like lengths, or a trace dealt out to them."""
    shares = np.array([part for _, _, part in setting.models])
    shares = shares / shares.sum()
    rng = np.random.default_rng(seed)
    if name == "sharegpt":
        parts = [
            poisson(rate * share, max(20, round(count * share)), rng, **LENGTHS).for_model(i)
            for i, share in enumerate(shares)
        ]
        return merged(parts)
    trace = requests(name, folder=traces).first(count).at_rate(rate)
    return replace(trace, model=rng.choice(len(shares), size=len(trace), p=shares))


def row(made: Outcome, goals: np.ndarray) -> dict[str, Any]:
    """Figures of one run."""
    met = made.met(goals[made.requests.model])
    window = max(float(made.requests.arrival[-1]), 1e-9)
    output = made.requests.output
    with np.errstate(invalid="ignore"):
        inside = made.finish <= window
    return {
        "attainment": round(float(met.mean()), 4),
        "tokens_per_second": round(float(output[inside].sum() / window), 1),
        "goodput": round(float(output[inside & met].sum() / window), 1),
        "dropped": round(float(made.dropped.mean()), 4),
        "preemptions": made.preemptions,
        "ttft_median": round(float(np.nanmedian(made.ttft)), 4),
        "tpot_mean": round(float(np.nanmean(made.tpot)), 5),
    }


def sweep(
    table: dict[tuple[str, str, int], Profile],
    setting: Setting,
    load: str,
    rates: Sequence[float],
    traces: Path,
    systems: Sequence[System] = SYSTEMS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """All systems at all rates."""
    models = demands(table, setting)
    goals = np.array([model.ttft for model in models])
    cluster = Cluster(setting.gpus, setting.memory)
    names = [model.name for model in models]
    seconds = {
        model.name: table[m, kind, min(model.shards)].token_seconds
        for model, (m, kind, _) in zip(models, setting.models, strict=True)
    }
    rows = []
    for rate in rates:
        count = round(rate * SECONDS[setting.name])
        asked = workload(load, setting, rate, count, seed, traces)
        for system in systems:
            placement = place(system, models, rate, cluster)
            how = Serving(system.policy, system.drop, system.pools, BATCHED, SEQUENCES, 0, seconds)
            made = simulate(asked, engines(placement, cluster, names, how))
            found = row(made, goals)
            found |= {"replicas": len(placement.replicas), "unplaced": len(placement.unplaced)}
            rows.append(
                {"setting": setting.name, "load": load, "system": system.name, "rate": rate} | found
            )
    return rows


def naive(kind: KvFormat, int4: bool) -> KvFormat:
    """INT4 blocks of 16 tokens like all others, with 8 bytes of scales a token: 8.25 KiB a layer."""
    return KvFormat(8448, kind.parts, 16) if int4 else kind


def fragmentation(table: dict[tuple[str, str, int], Profile], traces: Path) -> list[dict[str, Any]]:
    """The four models of one GPU, memory short, Azure's conversations: what each way to share
    memory leaves unused, and what that costs."""
    setting = SETTINGS[0]
    models = demands(table, setting)
    kinds = [kind for _, kind, _ in setting.models]
    goals = np.array([model.ttft for model in models])
    ways: list[tuple[str, Pools | None, bool]] = [
        ("static partition", static_pools, False),
        ("a pool for each precision", precision_pools, False),
        ("FineServe, INT4 in blocks of 64 tokens", paper, False),
        ("FineServe, INT4 in blocks of 16 tokens", paper, True),
        ("fixed 2 MiB slabs", fixed_pools, True),
        ("fixed slabs of the smallest size", None, True),
    ]
    rows = []
    for name, pools, small in ways:
        used = [
            replace(
                model,
                shards={
                    1: replace(
                        model.shards[1], kind=naive(model.shards[1].kind, small and kind == "qoq")
                    )
                },
            )
            for model, kind in zip(models, kinds, strict=True)
        ]
        sizes = [model.shards[1].kind for model in used]
        slab = smallest_slab(sizes)
        way = pools or partial(fixed_pools, slab_bytes=slab)
        for rate in (8.0, 16.0):
            weights = sum(model.shards[1].weights for model in used)
            # Room for KV of 6 GiB, a quarter of what the four take at their peak.
            cluster = Cluster(1, weights + 6 * GIB)
            asked = workload("azure-conv", setting, rate, 2000, 1, traces)
            placement = fineserve([replace(m, rate=0.05) for m in used], cluster)
            how = Serving("fcfs", False, way, BATCHED, SEQUENCES)
            found: dict[str, Any] = {"way": name, "rate": rate}
            try:
                run = engines(placement, cluster, [m.name for m in used], how)
                made = simulate(asked, run, samples=True)
            except Exception as error:  # a size that cannot work is a row as well
                rows.append(found | {"error": str(error)})
                continue
            time_, held, live = (made.samples[field] for field in ("time", "used", "live"))
            gaps = np.diff(np.append(time_, made.seconds))
            slabs = {id(p): p for _, memory in run for p in memory.pools}.values()
            found |= row(made, goals) | {
                "slab_kib": sorted({round(p.slab_bytes / 1024, 2) for p in slabs}),
                "group_mib": round(
                    max(p.slab_bytes * s.parts for p, s in zip(slabs, sizes, strict=False)) / 2**20,
                    1,
                ),
                "waste": round(1 - float((live * gaps).sum() / (held * gaps).sum()), 4),
            }
            rows.append(found)
    return rows


RATES = {
    "1 GPU, 4 models": (60, 90, 120, 160, 220),
    "8 GPUs, 9 models": (160, 280, 400),
}
TRACE_SCALE = {"sharegpt": 1.0, "azure-conv": 0.4, "azure-code": 0.4}
"""Their prompts are longer, so they come slower."""
SECONDS = {"1 GPU, 4 models": 30.0, "8 GPUs, 9 models": 12.0}
"""In which requests come."""


PARTS = ("1 GPU", "8 GPUs", "time-sliced", "fragmentation")


def main() -> None:
    """Run the parts asked for and put them into the results file, beside those that it has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("eval/results/fineserve.json"))
    parser.add_argument("--only", action="append", choices=PARTS, default=[])
    given = parser.parse_args()
    table = profiles(read_rows(given.traces / "fineserve_apex_cost.csv"))
    # OmniServe was profiled on whole GPUs alone, as Llama-3-8B, which has the same shape.
    qoq = table.pop(("llama-3-8b", "qoq", 1))
    table[EIGHT, "qoq", 1] = with_stretch(qoq, table[EIGHT, "org", 1])
    alone = {  # as if engines on one GPU took turns, none gaining from the host's time of another
        key: replace(own, costs=replace(own.costs, stretch=((), ()))) for key, own in table.items()
    }
    one, eight = SETTINGS
    for part in given.only or PARTS:
        begun = time.process_time()
        rows: list[dict[str, Any]] = []
        for load, scale in TRACE_SCALE.items():
            if part in ("1 GPU", "8 GPUs"):
                setting = one if part == "1 GPU" else eight
                # Parts are exchanged where it is cheap; elsewhere the systems of the claim run.
                some = SYSTEMS if load == "sharegpt" and setting is one else SYSTEMS[:6]
                rates = [rate * scale for rate in RATES[setting.name]]
                for rate in rates:
                    rows += sweep(table, setting, load, [rate], given.traces, some)
                    _store(given.output, part, rows, table)
                print(part, load, f"{time.process_time() - begun:.0f} s", flush=True)
        if part == "time-sliced":
            rows = sweep(alone, one, "sharegpt", RATES[one.name], given.traces, SYSTEMS[:6])
        if part == "fragmentation":
            rows = fragmentation(table, given.traces)
        _store(given.output, part, rows, table)


def _store(
    path: Path, part: str, rows: list[dict[str, Any]], table: dict[tuple[str, str, int], Profile]
) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    found["fits"] = {" ".join(map(str, k)): round(v.error, 4) for k, v in table.items()}
    found[part] = rows
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
