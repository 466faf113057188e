"""Fit the constants of `quantize.plan.latency` to measured TTFT and TPOT of vLLM, and print what they err.

    python eval/latency_fit.py ../shared/traces/aiconfigurator_measured_dense.csv --output eval/results/latency.json

Each row of the table is a closed loop: a fixed number of clients, each of which sends its next
request when its last is answered. It is replayed here, step by step, with vLLM's rule: running
requests first, then prompts in order of arrival, in chunks of what is left of the token budget.

Half of vLLM's rows, drawn by seed, are fitted to by random search; the other half is measured on.
Beside it, each GPU's rows are predicted by constants fitted on the two others, and the rows of two
other engines by all of vLLM's.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import heapq
import itertools
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.plan.gpus import gpu_named
from quantize.plan.latency import Constants, StepTime, first_token_seconds
from quantize.plan.served import ServedModel, dense

SHAPES = {
    "meta-llama/Llama-3.1-70B": (80, 8192, 64, 8, 128, 28672, 128256),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 4096, 32, 8, 128, 14336, 128256),
    "nvidia/Llama-3.1-8B-Instruct-FP8": (32, 4096, 32, 8, 128, 14336, 128256),
    "Qwen/Qwen3-32B": (64, 5120, 64, 8, 128, 25600, 151936),
    "nvidia/Qwen3-32B-NVFP4": (64, 5120, 64, 8, 128, 25600, 151936),
}
# bits a weight, bytes of a key's or value's channel, what is multiplied in; InferenceX and NVIDIA
# keep keys and values in FP8 with weights of 8 and 4 bits
PRECISIONS = {"": (16.0, 2, "bf16"), "fp8": (8.0, 1, "fp8"), "fp4": (4.5, 1, "fp4")}
BUDGET = 8192  # vLLM's max_num_batched_tokens on these GPUs but B200, where rows do not tell either
LENGTHS = {"InferenceX": 0.8}  # its random lengths: uniform from this share of the stated ones
SEARCH = {  # where constants are drawn from
    "memory": (0.55, 0.97),
    "compute": (0.35, 0.95),
    "layer": (0.0, 120e-6),
    "layer_tp": (0.0, 60e-6),
    "layer_prefill": (0.0, 400e-6),
    "sequence": (0.0, 100e-6),
    "first": (0.0, 1.2e-3),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; times in seconds."""

    model: str
    gpu: str
    backend: str
    precision: str
    tp: int
    inputs: int
    outputs: int
    clients: int
    ttft: float
    tpot: float
    source: str

    @property
    def load(self) -> tuple[Any, ...]:
        """All but tp: rows that differ in it alone are ranked."""
        return (self.model, self.gpu, self.precision, self.inputs, self.outputs, self.clients)

    def served(self) -> ServedModel:
        """The model in its format."""
        bits, width, compute = PRECISIONS[self.precision]
        shape = SHAPES[self.model]
        return dense(
            self.model,
            *shape,
            weight_bits=bits,
            kv_head_bytes=2.0 * shape[4] * width,
            compute=compute,
        )


def read(path: Path) -> list[Row]:
    """Rows of GPUs and models that are known, that fit their memory without preemption."""
    rows, seen = [], set()
    with path.open(encoding="utf-8") as file:
        for r in csv.DictReader(file):
            if r["system"] == "gb200" or not r["concurrency"] or r["model"] not in SHAPES:
                continue
            row = Row(
                r["model"],
                r["system"].replace("_", "-"),
                r["backend"],
                r["precision"],
                *(int(r[key]) for key in ("tp", "isl", "osl", "concurrency")),
                float(r["ttft_ms"]) / 1e3,
                float(r["tpot_ms"]) / 1e3,
                r["source"],
            )
            model, gpu = row.served(), gpu_named(row.gpu)
            held = row.clients * model.kv_bytes(row.inputs + row.outputs, row.tp)
            key = (row.backend, row.source, row.tp, *row.load)
            if model.weights(row.tp) + held < 0.9 * gpu.memory_bytes - 4e9 and key not in seen:
                seen.add(key)
                rows.append(row)
    return rows


class Loop:
    """A closed loop on one engine; what does not depend on constants is worked out once."""

    def __init__(self, row: Row, waves: int = 10) -> None:
        self.row, self.model, self.gpu = row, row.served(), gpu_named(row.gpu)
        share = next((s for name, s in LENGTHS.items() if row.source.startswith(name)), 1.0)
        draw = random.Random(0)
        count = max(waves * row.clients, 24)
        self.lengths = [
            (
                max(1, int(row.inputs * draw.uniform(share, 1))),
                max(2, int(row.outputs * draw.uniform(share, 1))),
            )
            for _ in range(count)
        ]

    def run(self, constants: Constants) -> tuple[float, float]:
        """(mean TTFT, mean TPOT) in seconds."""
        step = StepTime(self.model, self.gpu, self.row.tp, constants)
        m, tp = self.model, self.row.tp
        read_ = m.read_bytes(tp, 1) / step.bandwidth
        kv = m.kv_bytes_per_token(tp) / step.bandwidth
        matrix = 2.0 * m.parameters_per_token / step.rate
        head = 2.0 * m.head_parameters / step.rate
        score = m.attention_flops(1.0) / step.attention_rate
        host, link, each = step.host, step.link_token, constants.sequence
        prefill_host = m.layers * constants.layer_prefill
        first = first_token_seconds(m, constants)
        now, running, held, steps = 0.0, 0, 0.0, 0
        upcoming = iter(self.lengths)
        waiting: list[list[float]] = []  # arrived, prompt, output, computed
        ends: list[tuple[int, int, float, float, float]] = []  # step, id, began, prompt, output
        ids = itertools.count()
        ttft, tpot = [], []

        def arrive() -> None:
            if (lengths := next(upcoming, None)) is not None:
                waiting.append([now, *lengths, 0.0])

        for _ in range(self.row.clients):
            arrive()
        while waiting or running:
            if waiting:
                left, tokens, scores, started = BUDGET - running, 0.0, 0.0, 0
                for request in waiting:
                    if left <= 0:
                        break
                    n = min(left, request[1] - request[3])
                    scores += n * (request[3] + n / 2)
                    request[3] += n
                    left, tokens = left - n, tokens + n
                    started += request[3] >= request[1]
                moved = read_ + kv * held
                compute = matrix * (tokens + running) + head * running + score * (scores + held)
                now += max(moved, compute) + link * (tokens + running) + host + each * running
                now += prefill_host
                steps += 1
                held += running
                for arrived, prompt, output, _ in waiting[:started]:
                    ttft.append(now - arrived + first)
                    heapq.heappush(ends, (steps + int(output) - 1, next(ids), now, prompt, output))
                    running += 1
                    held += prompt
                del waiting[:started]
            else:
                k = ends[0][0] - steps
                context = held + running * (k - 1) / 2  # in the mean over k steps
                moved = read_ + kv * context
                compute = (matrix + head) * running + score * context
                now += k * (max(moved, compute) + link * running + host + each * running)
                steps += k
                held += running * k
            while ends and ends[0][0] <= steps:
                _, _, began, prompt, output = heapq.heappop(ends)
                running -= 1
                held -= prompt + output - 1
                tpot.append((now - began) / (output - 1))
                arrive()
        return statistics.fmean(ttft), statistics.fmean(tpot)


def ratios(loops: Sequence[Loop], constants: Constants) -> tuple[list[float], list[float]]:
    """Predicted over measured: TTFT, TPOT."""
    predicted = [loop.run(constants) for loop in loops]
    return (
        [p[0] / loop.row.ttft for p, loop in zip(predicted, loops, strict=True)],
        [p[1] / loop.row.tpot for p, loop in zip(predicted, loops, strict=True)],
    )


def loss(loops: Sequence[Loop], constants: Constants) -> float:
    """Median and mean of |log ratio|; of TTFT half, which the queue spreads anyway."""
    total = 0.0
    for weight, found in zip((0.5, 1.0), ratios(loops, constants), strict=True):
        logs = [abs(math.log(ratio)) for ratio in found]
        total += weight * (statistics.median(logs) + 0.5 * statistics.fmean(logs))
    return total


def fit(loops: Sequence[Loop], seed: int, draws: int) -> Constants:
    """Random search: a third drawn anywhere, then steps around the best that grow smaller."""
    draw = random.Random(seed)
    best, least = Constants(0.9, 0.6, 50e-6, 10e-6, 100e-6, 50e-6, 0.5e-3), math.inf
    for i in range(draws):
        values = dataclasses.asdict(best)
        spread = 0.35 * (1 - i / draws) + 0.02
        for name, (low, high) in SEARCH.items():
            if 3 * i < draws:
                values[name] = draw.uniform(low, high)
            elif draw.random() < 0.5:
                moved = values[name] + draw.gauss(0, spread) * (high - low) / 2
                values[name] = min(high, max(low, moved))
        constants = Constants(**values)
        if (found := loss(loops, constants)) < least:
            best, least = constants, found
    return best


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def errors(found: Sequence[float]) -> dict[str, float]:
    """found: predicted over measured."""
    off = [abs(ratio - 1) for ratio in found]
    return {
        "rows": len(found),
        "median": round(statistics.median(off), 4),
        "mean": round(statistics.fmean(off), 4),
        "bias": round(statistics.median(found) - 1, 4),
        "low": round(1 / quantile(found, 0.9), 4),
        "high": round(1 / quantile(found, 0.1), 4),
    }


def table(loops: Sequence[Loop], constants: Constants) -> dict[str, dict[str, float]]:
    """Errors of TTFT and TPOT."""
    ttft, tpot = ratios(loops, constants)
    return {"ttft": errors(ttft), "tpot": errors(tpot)}


def order(loops: Sequence[Loop], constants: Constants) -> dict[str, list[int]]:
    """How often the faster of two tp is told for the same load: [right, pairs]."""
    predicted = {loop.row: loop.run(constants) for loop in loops}
    right = {"ttft": 0, "tpot": 0}
    pairs = 0
    for one, other in itertools.combinations(predicted, 2):
        if one.load == other.load and one.source == other.source and one.tp != other.tp:
            pairs += 1
            for i, name in enumerate(right):
                a, b = predicted[one][i], predicted[other][i]
                right[name] += (a < b) == (getattr(one, name) < getattr(other, name))
    return {name: [count, pairs] for name, count in right.items()}


def main() -> None:
    """Run as a script."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("table", type=Path)
    arguments.add_argument("--output", type=Path)
    arguments.add_argument("--draws", type=int, default=1500)
    arguments.add_argument("--seed", type=int, default=1)
    args = arguments.parse_args()
    rows = read(args.table)
    ours = [Loop(row) for row in rows if row.backend == "vllm"]
    random.Random(args.seed).shuffle(ours)
    train, test = ours[: len(ours) // 2], ours[len(ours) // 2 :]
    constants = fit(train, args.seed, args.draws)
    print({k: float(f"{v:.3g}") for k, v in dataclasses.asdict(constants).items()}, flush=True)
    constants = Constants(
        **{k: float(f"{v:.3g}") for k, v in dataclasses.asdict(constants).items()}
    )
    results: dict[str, Any] = {
        "source": f"{args.table.name}, seed {args.seed}, {args.draws} draws",
        "constants": dataclasses.asdict(constants),
        "fitted on": table(train, constants),
        "held out": table(test, constants),
        "order of two tp, held out": order(test, constants),
        "held out by GPU": {},
        "fitted without the GPU": {},
        "other engines": {},
    }
    for gpu in sorted({loop.row.gpu for loop in ours}):
        mine = [loop for loop in test if loop.row.gpu == gpu]
        results["held out by GPU"][gpu] = table(mine, constants)
        others = [loop for loop in ours if loop.row.gpu != gpu]
        alone = fit(others[:120], args.seed, args.draws // 2)
        untouched = [loop for loop in ours if loop.row.gpu == gpu]
        results["fitted without the GPU"][gpu] = table(untouched, alone)
    for backend in ("sglang", "trtllm"):
        foreign = [Loop(row) for row in rows if row.backend == backend]
        results["other engines"][backend] = table(foreign, constants)
    no_host = dataclasses.replace(
        constants, layer=0.0, layer_tp=0.0, layer_prefill=0.0, sequence=0.0, first=0.0
    )
    results["held out, without the host's time"] = table(test, no_host)
    text = json.dumps(results, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
