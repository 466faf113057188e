"""What our own measurements say that a recipe loses: rows of the files in `eval/results`.

Nothing here builds a stage.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.files.resources import data_dir

MODELS = ("yardstick", "yardstick-outliers")
"""What was measured, as results files call it."""
ABOUT = "a Llama of 6.8 million parameters and of the same with outlier channels"
"""The same in words."""
Key = tuple[str, tuple[str, ...]]
"""A shipped recipe and settings of its stages, as `--set` takes them."""
ROWS: Mapping[Key, tuple[str, Mapping[str, Any]]] = {
    ("rtn", ()): ("yardstick-4bit", {"recipe": "rtn", "activations": "none"}),
    ("rtn", ("activations=fp8",)): ("yardstick-4bit", {"recipe": "rtn", "activations": "fp8"}),
    ("awq", ()): ("yardstick-4bit", {"recipe": "awq", "activations": "none"}),
    ("awq", ("activations=fp8",)): ("yardstick-4bit", {"recipe": "awq", "activations": "fp8"}),
    ("awq", ("bits=3",)): ("sbvr", {"method": "3-bit AWQ g128"}),
    ("awq", ("bits=2",)): ("sbvr", {"method": "2-bit AWQ g128"}),
    ("gptq", ()): ("yardstick-4bit", {"recipe": "gptq", "activations": "none"}),
    ("gptq", ("activations=fp8",)): ("yardstick-4bit", {"recipe": "gptq", "activations": "fp8"}),
    ("gptq", ("bits=3",)): ("sbvr", {"method": "3-bit GPTQ g128"}),
    ("gptq", ("bits=2",)): ("sbvr", {"method": "2-bit GPTQ g128"}),
    ("fireq-linear", ()): ("yardstick-4bit", {"recipe": "fireq-linear", "activations": "fp8"}),
    ("fireq-linear", ("activations=none",)): (
        "yardstick-4bit",
        {"recipe": "fireq-linear", "activations": "none"},
    ),
    ("fireq-paper-linear", ()): (
        "yardstick-4bit",
        {"recipe": "fireq-paper-linear", "activations": "fp8"},
    ),
    ("fireq", ()): ("fireq-ablation", {"part": "linear and KV4"}),
    ("fireq-kv", ()): ("fireq-ablation", {"recipe": "fireq-kv", "changes": []}),
    ("fireq-paper", ()): ("fireq-ablation", {"recipe": "fireq-paper", "changes": []}),
    ("sbvr", ()): ("sbvr", {"method": "4-bit SBVR"}),
    ("sbvr-3bit", ()): ("sbvr", {"method": "3-bit SBVR"}),
    ("sbvr-2bit", ()): ("sbvr", {"method": "2-bit SBVR"}),
    ("gguf-q4_0", ()): ("gguf", {"file": "pq gguf-q4_0"}),
    ("gguf-q4_1", ()): ("gguf", {"file": "pq gguf-q4_1"}),
    ("ladimo", ()): ("ladimo", {"conversion": "LaDiMo, 20%"}),
    ("ladimo-fireq", ()): ("ladimo", {"conversion": "LaDiMo + FireQ W4A8"}),
    ("ladimo-sbvr", ()): ("ladimo", {"conversion": "LaDiMo + SBVR W4A16"}),
}
"""Where the figures of a recipe stand: a results file, and what finds its rows there."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a recipe on one model."""

    model: str
    kld: float
    """KL(parent ‖ quantized), nats a token."""
    top1: float
    """Share of tokens whose most likely successor is the parent's."""
    file: str
    """Of the repository."""


def measured(recipe: str, settings: tuple[str, ...] = ()) -> dict[str, Measured]:
    """By model, in the order of `MODELS`; empty for what was not measured."""
    found = ROWS.get((recipe, tuple(sorted(settings))))
    if found is None:
        return {}
    stem, key = found
    rows = {row["model"]: row for row in _rows(stem) if key.items() <= row.items()}
    return {model: _measured(model, rows[model], stem) for model in MODELS if model in rows}


def _measured(model: str, row: Mapping[str, Any], stem: str) -> Measured:
    # Of a row with both kinds of figures that count which the kernel makes.
    figures = row.get("figures") or {"stock": row}
    best = figures.get("kernel", figures["stock"])
    return Measured(
        model,
        float(best["kld_mean"]),
        float(best["top1_agreement"]),
        f"eval/results/{stem}.json",
    )


@functools.cache
def _rows(stem: str) -> list[dict[str, Any]]:
    """Rows of a results file; none where the installation lacks it."""
    try:
        path = data_dir("eval") / "results" / f"{stem}.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        return []
    return rows
