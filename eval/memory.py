"""Peak memory of conversions beside what `pq estimate` says, on random models in the shapes of real ones.

    python eval/memory.py --scratch /scratch --output eval/results/memory.json [--only 7B/rtn] [--max-ram 4GB]

Each conversion is a process of its own; its peak is what the kernel counted (ru_maxrss). Shapes of few layers stand for
the whole, since the peak does not hang on how many there are; `7B/rtn` is the whole model of 13.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import keep  # the scripts beside this one
from random_model import build

import quantize
from quantize.units import parse_bytes

LAYERS = {"0.1B": 2, "1B": 1, "7B": 1}
RECIPES = ("rtn", "fireq", "sbvr")
CALIBRATION = ("--nsamples", "4", "--seqlen", "512")


def table(data: dict[str, Any]) -> str:
    """Markdown of a results file."""
    lines = ["| shape | recipe | limit | peak measured | estimated | ratio | a block | estimated |", "|---" * 8 + "|"]
    for row in data["memory"]:
        shape = f"{row['shape']}, {row['layers']} layers"
        shape += f" ({', '.join(row['changes'])})" if row["changes"] else ""
        limit = "" if row["limit"] is None else f"{row['limit'] / 1e9:.2f} GB"
        peaks = f"{row['peak'] / 1e9:.2f} GB | {row['estimate'] / 1e9:.2f} GB | {row['estimate'] / row['peak']:.2f}"
        seconds = f"{row['seconds_per_block']:.0f} s | {row['estimated_seconds_per_block']:.0f} s"
        lines.append(f"| {shape} | {row['recipe']} | {limit} | {peaks} | {seconds} |")
    return "\n".join(lines)


def measure(
    shape: str, recipe: str, layers: int | None, scratch: Path, limit: str | None, changes: list[str]
) -> dict[str, Any]:
    """Estimate and convert one shape by one recipe."""
    model = scratch / (f"{shape}x{layers}" if layers else shape)
    if not (model / "model.safetensors.index.json").exists():
        build(shape, model, layers)
    output = scratch / "out"
    shutil.rmtree(output, ignore_errors=True)
    text = () if recipe == "rtn" else CALIBRATION
    cap = () if limit is None else ("--max-ram", limit)
    common = ["--model", str(model), "--recipe", recipe, *text, *cap, "--device", "cpu", "--json"]
    common += [part for change in changes for part in ("--set", change)]
    pq = [sys.executable, "-c", "from quantize.cli import main; main()"]
    told = json.loads(subprocess.run([*pq, "estimate", *common], check=True, stdout=subprocess.PIPE).stdout)
    started = time.monotonic()
    with (scratch / "summary.json").open("w") as file:
        running = subprocess.Popen([*pq, "convert", *common, "--output", str(output)], stdout=file)
        _, status, usage = os.wait4(running.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{shape}/{recipe}: exit code {code}")
    summary = json.loads((scratch / "summary.json").read_text())
    shutil.rmtree(output)
    return {
        "shape": shape,
        "layers": summary["blocks"],
        "recipe": recipe,
        "changes": changes,
        "limit": None if limit is None else parse_bytes(limit),
        "peak": usage.ru_maxrss * 1024,
        "estimate": told["ram"],
        "parts": told["parts"],
        "split": told["split"],
        "states_on": told["states_on"],
        "batch_tokens": told["batch_tokens"],
        "seconds": round(time.monotonic() - started, 1),
        "seconds_per_block": summary["seconds_per_block"],
        "estimated_seconds_per_block": told["seconds_per_block"],
        "source_bytes": summary["source_bytes"],
    }


def main(args: argparse.Namespace) -> None:
    """Measure, and keep every row as soon as it is there; rows of the same kind are replaced."""
    results = json.loads(args.output.read_text()) if args.output.exists() else {"memory": []}
    results |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"pq": quantize.__version__, "torch": torch.__version__},
    }
    kinds = [(shape, recipe) for shape in LAYERS for recipe in RECIPES]
    wanted = [kind for kind in kinds if not args.only or "/".join(kind) in args.only]
    for shape, recipe in wanted:
        layers = None if args.whole else LAYERS[shape]
        row = measure(shape, recipe, layers, args.scratch, args.max_ram, args.set)
        key = ("shape", "recipe", "layers", "limit")
        results["memory"] = [old for old in results["memory"] if any(old[k] != row[k] for k in key)] + [row]
        keep(results, args.output)
        print({name: row[name] for name in (*key, "peak", "estimate", "seconds")}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models of up to 14 GB and outputs")
    parser.add_argument("--output", type=Path, required=True, help="results file")
    parser.add_argument("--only", action="append", help="shape/recipe, repeatable")
    parser.add_argument("--whole", action="store_true", help="all layers of the shape")
    parser.add_argument("--max-ram", help="convert under this limit")
    parser.add_argument("--set", action="append", default=[], help="as for pq convert, e.g. sweeps=1 to save time")
    main(parser.parse_args())
