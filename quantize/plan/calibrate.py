"""Constants of the latency model fitted to measurements of one model on one kind of GPU.

A run is the JSON that `vllm bench serve --save-result` writes. The step's time on the GPU and that of
the host are scaled, each by one factor, so that TPOT at the measured load is met best; with a single
run both by the same. What a first token waits for beside its steps follows from TTFT.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.errors import UsageError
from quantize.plan.gpus import Gpu
from quantize.plan.latency import CONSTANTS, Constants, Error, StepTime
from quantize.plan.memory import engine_for
from quantize.plan.served import ServedModel
from quantize.plan.steady import Load, Steady, steady

_FIELDS = (
    "completed",
    "duration",
    "total_input_tokens",
    "total_output_tokens",
    "mean_ttft_ms",
    "mean_tpot_ms",
)
_LEAST = 0.05
"""Of error that is stated at least: a run does not repeat itself more closely."""
_STEPS = [1.04**i for i in range(-50, 51)]
"""Factors that are tried: from a seventh to sevenfold."""
_ROUNDS = 3
"""How often one is sought for the other's value."""


@dataclass(frozen=True)
class Run:
    """One measurement. Times in seconds."""

    rate: float
    """Requests a second that were answered."""
    inputs: int
    outputs: int
    """Mean tokens of prompts and answers."""
    ttft: float
    tpot: float


def read_run(path: Path) -> Run:
    """Read the JSON of one run; UsageError for a file that lacks a figure."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as err:
        raise UsageError(f"--calibrate {path}: cannot be read as JSON ({err})") from None
    found = {}
    for key in _FIELDS:
        value = data.get(key) if isinstance(data, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(
                f"--calibrate {path}: {key} is {value!r}; give what `vllm bench serve "
                "--save-result` wrote of a run with answers"
            )
        found[key] = float(value)
    count = found["completed"]
    return Run(
        rate=count / found["duration"],
        inputs=max(1, round(found["total_input_tokens"] / count)),
        outputs=max(1, round(found["total_output_tokens"] / count)),
        ttft=found["mean_ttft_ms"] / 1e3,
        tpot=found["mean_tpot_ms"] / 1e3,
    )


def scaled(constants: Constants, gpu: float, host: float) -> Constants:
    """Constants with which the GPU's part of a step takes `gpu` times as long, the host's `host`."""
    return replace(
        constants,
        memory=constants.memory / gpu,
        compute=constants.compute / gpu,
        link=constants.link / gpu,
        layer=constants.layer * host,
        layer_tp=constants.layer_tp * host,
        layer_prefill=constants.layer_prefill * host,
        sequence=constants.sequence * host,
    )


def calibrated(
    model: ServedModel, gpu: Gpu, tp: int, runs: Sequence[Run], start: Constants = CONSTANTS
) -> tuple[Constants, dict[str, Error]]:
    """Constants that meet the runs, and how far they are from each of them.

    UsageError where no factor makes the runs possible: another model, GPU or tp was measured.
    """

    def loss(factors: tuple[float, float]) -> float:
        found = _loss(model, gpu, tp, runs, scaled(start, *factors))
        # Of factors that do as well those that are nearest to each other, and to 1.
        away = abs(math.log(factors[0])) + abs(math.log(factors[1] / factors[0]))
        return found + 1e-4 * away

    factors = min(((f, f) for f in _STEPS), key=loss)
    for _ in range(_ROUNDS if len(runs) > 1 else 0):
        factors = min(((f, factors[1]) for f in _STEPS), key=loss)
        factors = min(((factors[0], f) for f in _STEPS), key=loss)
    best = None if math.isinf(loss(factors)) else scaled(start, *factors)
    if best is None:
        raise UsageError(
            f"--calibrate: no engine of {tp} {gpu.name} answers {runs[0].rate:.3g} requests a second "
            f"of {model.name} by any factor that is tried; name the model, --gpu and --tp of the run"
        )
    waits = [
        (run.ttft - state.ttft) / model.layers + best.first
        for run in runs
        if (state := _state(model, gpu, tp, run, best)) is not None
    ]
    best = replace(best, first=max(0.0, statistics.median(waits)))
    return best, _errors(model, gpu, tp, runs, best)


def _state(model: ServedModel, gpu: Gpu, tp: int, run: Run, constants: Constants) -> Steady | None:
    load = Load(run.rate, run.inputs, run.outputs)
    return steady(StepTime(model, gpu, tp, constants), engine_for(gpu), load)


def _loss(
    model: ServedModel, gpu: Gpu, tp: int, runs: Sequence[Run], constants: Constants
) -> float:
    total = 0.0
    for run in runs:
        state = _state(model, gpu, tp, run, constants)
        if state is None:
            return math.inf
        total += abs(math.log(state.tpot / run.tpot))
    return total / len(runs)


def _errors(
    model: ServedModel, gpu: Gpu, tp: int, runs: Sequence[Run], constants: Constants
) -> dict[str, Error]:
    """Measured over said, at its extremes over the runs."""
    ratios: dict[str, list[float]] = {"tpot": [], "ttft": []}
    for run in runs:
        state = _state(model, gpu, tp, run, constants)
        assert state is not None
        ratios["tpot"].append(run.tpot / state.tpot)
        ratios["ttft"].append(run.ttft / state.ttft)
    found = {}
    for name, values in ratios.items():
        off = [abs(1 / value - 1) for value in values]
        low, high = min(1 - _LEAST, *values, 1.0), max(1 + _LEAST, *values, 1.0)
        found[name] = Error(low, high, statistics.median(off), statistics.fmean(off))
    return found
