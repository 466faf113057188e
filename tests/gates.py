"""Gate files and figures that the tests of the accuracy gate share."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantize.gate.run
from quantize.evaluation import Evaluation
from quantize.gate.checks import judge
from quantize.gate.file import load_gate
from quantize.gate.run import GateResult

Maker = Callable[..., Path]
GOOD = "fireq:\n  kld_mean: {value: 0.02, tolerance: 30%}\n  perplexity: {recovery: 0.95}"


def evaluation(**changes: Any) -> Evaluation:
    values = {f.name: None for f in dataclasses.fields(Evaluation)}
    values |= {
        "model": "out",
        "baseline": "parent",
        "protocol": "strided-256",
        "data": "text",
        "numerics": "kernel",
    }
    values |= {"tokens": 100, "perplexity": 10.5, "baseline_perplexity": 10.0, "kld_mean": 0.02}
    values |= {
        "top1_agreement": 0.9,
        "bits_per_weight": 4.125,
        "delta_nll": -0.01,
        "worst": [],
        "by_position": {},
    }
    return Evaluation(**(values | changes))  # type: ignore[arg-type]


def stub_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Let the gate convert and measure nothing: stub(kld_mean=0.03) → the list of what is asked for."""

    def stub(error: Exception | None = None, **figures: Any) -> list[Any]:
        asked: list[Any] = []

        def convert(request: Any, progress: Any) -> None:
            asked.append(request)
            shutil.copytree(request.model, request.output)

        def evaluate(model: Path, baseline: Path, **settings: Any) -> Evaluation:
            asked.append((model, baseline, settings))
            if error:
                raise error
            return evaluation(**figures)

        monkeypatch.setattr(quantize.gate.run, "convert", convert)
        monkeypatch.setattr(quantize.gate.run, "evaluate", evaluate)
        return asked

    return stub


def write_gate(path: Path, model: Path, entries: str, *top: str) -> Path:
    """Write a gate file: write_gate(path, folder, "fireq: {...}", "tasks: [...]")."""
    lines = [f"model: {json.dumps(str(model))}", *top, "recipes:"]
    path.write_text(
        "\n".join([*lines, *("  " + line for line in entries.splitlines())]) + "\n",
        encoding="utf-8",
    )
    return path


def result_of(path: Path, protocol: str = "strided-256", **figures: Any) -> GateResult:
    """A run in which every recipe had these figures."""
    checks = [(entry.name, check) for entry in load_gate(path).entries for check in entry.checks]
    figures = dataclasses.asdict(evaluation(**figures))
    verdicts = [judge(n, c, quantize.gate.run.figure_of(figures, c.metric)) for n, c in checks]
    return GateResult(str(path), tuple(verdicts), 1.0, {}, {}, protocol)
