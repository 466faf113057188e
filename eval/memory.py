"""Peak memory of conversions beside what `pq estimate` says, on random models in the shapes of real ones.

    python eval/memory.py --scratch /scratch --output eval/results/memory.json [--only 7B/rtn] [--max-ram 4GB]

Each conversion is a process of its own; its peak is what the kernel counted (ru_maxrss). Shapes of few layers stand for
the whole, since the peak does not depend on how many there are; `7B/rtn` is the whole model of
13.5 GB.
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
from random_model import SHAPES, build

import quantize

LAYERS = {"0.1B": 2, "1B": 1, "7B": 1}
RECIPES = ("rtn", "fireq", "sbvr")
PQ = (sys.executable, "-c", "from quantize.cli import run; run()")
CALIBRATION = ("--nsamples", "4", "--seqlen", "512")


def table(data: dict[str, Any]) -> str:
    """Markdown of a results file."""
    lines = [
        "| shape | recipe | limit | peak measured | estimated | ratio | a block |",
        "|---" * 7 + "|",
    ]
    for row in data["memory"]:
        shape = f"{row['shape']}, {row['layers']} layer{'s' * (row['layers'] > 1)}"
        shape += f" ({', '.join(row['changes'])})" if row["changes"] else ""
        limit = row["limit"] or ""
        peaks = f"{row['peak'] / 1e9:.2f} GB | {row['estimate'] / 1e9:.2f} GB | {row['estimate'] / row['peak']:.2f}"
        seconds = f"{row['seconds_per_block']:.0f} s"
        lines.append(f"| {shape} | {row['recipe']} | {limit} | {peaks} | {seconds} |")
    return "\n".join(lines)


def arguments(
    shape: str, recipe: str, layers: int, scratch: Path, limit: str | None, changes: list[str]
) -> list[str]:
    """What `pq estimate` and `pq convert` are called with; the model is made where it is missing."""
    model = scratch / (shape if layers == SHAPES[shape][2] else f"{shape}x{layers}")
    if not (model / "model.safetensors.index.json").exists():
        build(shape, model, layers)
    text = () if recipe == "rtn" else CALIBRATION
    cap = () if limit is None else ("--max-ram", limit)
    changed = [part for change in changes for part in ("--set", change)]
    return [
        "--model",
        str(model),
        "--recipe",
        recipe,
        *text,
        *cap,
        *changed,
        "--device",
        "cpu",
        "--json",
    ]


def estimate(common: list[str]) -> dict[str, Any]:
    """What `pq estimate` says."""
    out = subprocess.run(
        [*PQ, "estimate", *common, "--no-time"], check=True, stdout=subprocess.PIPE
    ).stdout
    told = json.loads(out)
    kept = {name: told[name] for name in ("parts", "split", "states_on", "batch_tokens")}
    return {"estimate": told["ram"], **kept}


def convert(common: list[str], scratch: Path) -> dict[str, Any]:
    """What a conversion takes."""
    output, told = scratch / "out", scratch / "summary.json"
    shutil.rmtree(output, ignore_errors=True)
    started = time.monotonic()
    with told.open("w") as file:
        running = subprocess.Popen([*PQ, "convert", *common, "--output", str(output)], stdout=file)
        _, status, usage = os.wait4(running.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"exit code {code}: pq convert {' '.join(common)}")
    summary = json.loads(told.read_text())
    shutil.rmtree(output)
    kept = {name: summary[name] for name in ("seconds_per_block", "source_bytes")}
    return {"peak": usage.ru_maxrss * 1024, "seconds": round(time.monotonic() - started, 1), **kept}


def main(args: argparse.Namespace) -> None:
    """Measure, and keep every row as soon as it is there; rows of the same kind are replaced."""
    results = json.loads(args.output.read_text()) if args.output.exists() else {"memory": []}
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    if not args.again:
        results["machine"] = (
            f"{platform.machine()}, {os.cpu_count()} cores beside other work, {threads}"
        )
        results["versions"] = {"pq": quantize.__version__, "torch": torch.__version__}
    kinds = [(shape, recipe) for shape in LAYERS for recipe in RECIPES]
    wanted = [kind for kind in kinds if not args.only or "/".join(kind) in args.only]
    rows = [
        {
            "shape": shape,
            "layers": SHAPES[shape][2] if args.whole else LAYERS[shape],
            "recipe": recipe,
            "changes": args.set,
            "limit": args.max_ram,
        }
        for shape, recipe in wanted
    ]
    for row in results["memory"].copy() if args.again else rows:
        key = {name: row[name] for name in ("shape", "layers", "recipe", "changes", "limit")}
        common = arguments(scratch=args.scratch, **key)
        row |= estimate(common)
        if not args.again:
            row |= convert(common, args.scratch)
        results["memory"] = [
            old for old in results["memory"] if any(old[k] != key[k] for k in key)
        ] + [row]
        results["memory"].sort(
            key=lambda one: (list(SHAPES).index(one["shape"]), RECIPES.index(one["recipe"]))
        )
        keep(results, args.output)
        print(key | {name: row[name] for name in ("peak", "estimate", "seconds")}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder for models of up to 14 GB and outputs"
    )
    parser.add_argument("--output", type=Path, required=True, help="results file")
    parser.add_argument("--only", action="append", help="shape/recipe, repeatable")
    parser.add_argument("--whole", action="store_true", help="all layers of the shape")
    parser.add_argument("--max-ram", help="convert under this limit")
    parser.add_argument(
        "--set", action="append", default=[], help="as for pq convert, e.g. sweeps=1 to save time"
    )
    parser.add_argument(
        "--again", action="store_true", help="estimate the rows there are again, convert nothing"
    )
    main(parser.parse_args())
