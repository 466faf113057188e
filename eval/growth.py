"""How the time of a block grows with the model and with the calibration text, on random models in real shapes.

    python eval/growth.py --scratch /scratch [--output eval/results/growth.json] [--only 7B/gptq] [--windows 4]

One block of every shape is converted with few windows and with many, each in a process of its own with one thread. Its
processor seconds (which others on the machine change little) are put beside those that the block's linears take to run
once over the same tokens at the rate at which this machine multiplies matrices: that can be compared between machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import keep, versions  # the scripts beside this one
from random_model import SHAPES, build

RECIPES = ("gptq", "fireq-linear", "fireq", "sbvr")
WINDOWS = (4, 64)
SEQLEN = 512


def table(results: dict[str, Any]) -> str:
    """The rows of a results file as a table."""
    lines = [
        f"| shape | recipe | windows of {SEQLEN} | CPU seconds | forward passes at matmul rate | peak memory |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['shape']} | {row['recipe']} | {row['windows']} | {row['seconds']:.1f} | "
            f"{row['forward_passes']:.1f} | {row['peak'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def rate() -> float:
    """Multiply-adds a processor second of this machine's float32 matrix products, the median."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    taken = []
    for _ in range(9):
        started = time.process_time()
        torch.mm(a, b)
        taken.append(time.process_time() - started)
    return size**3 / statistics.median(taken)


def weights(shape: str) -> int:
    """Weights of the linears of one block."""
    hidden, intermediate, _, heads, kv_heads, _ = SHAPES[shape]
    kv = hidden // heads * kv_heads
    return 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate


def convert(model: Path, recipe: str, windows: int, scratch: Path) -> dict[str, Any]:
    """Processor seconds of the whole process, its seconds in the block, and its peak."""
    output, told = scratch / "out", scratch / "summary.json"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "quantize", "convert", "--model", str(model), "--json"]
    command += ["--recipe", recipe, "--output", str(output), "--device", "cpu"]
    command += ["--nsamples", str(windows), "--seqlen", str(SEQLEN)]
    with told.open("w") as file:
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(command, stdout=file, env=alone)
        _, status, used = os.wait4(running.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"exit code {code}: {' '.join(command)}")
    shutil.rmtree(output)
    summary = json.loads(told.read_text())
    return {
        "seconds": used.ru_utime + used.ru_stime,
        "wall_a_block": summary["seconds_per_block"],
        "peak": used.ru_maxrss * 1024,
    }


def main() -> None:
    """Measure what is asked for, and keep every row as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models of 1.5 GB")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "growth.json"
    )
    parser.add_argument("--only", action="append", help="shape/recipe, repeatable")
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    torch.set_num_threads(1)
    results["protocol"] = (
        f"one block of random weights, the built-in text, whole processes (their start takes some 8 s); "
        f"{2 * rate() / 1e9:.0f} GFLOP/s in float32 products; a forward pass: the block's linears, once, over the "
        "text"
    )
    results["machine"] = f"{platform.machine()}, one thread"
    results["versions"] = versions()
    for shape in SHAPES:
        for recipe in RECIPES:
            if args.only and f"{shape}/{recipe}" not in args.only:
                continue
            model = args.scratch / f"{shape}x1"
            if not (model / "model.safetensors.index.json").exists():
                build(shape, model, 1)
            for windows in args.windows:
                found = convert(model, recipe, windows, args.scratch)
                key = {"shape": shape, "recipe": recipe, "windows": windows}
                pass_seconds = weights(shape) * windows * SEQLEN / rate()
                row = key | found | {"forward_passes": found["seconds"] / pass_seconds}
                rows = [old for old in results["rows"] if any(old[k] != key[k] for k in key)]
                rows.append(row)
                rows.sort(
                    key=lambda one: (
                        list(SHAPES).index(one["shape"]),
                        RECIPES.index(one["recipe"]),
                        one["windows"],
                    )
                )
                results["rows"] = rows
                keep(results, args.output)
                print(row, flush=True)


if __name__ == "__main__":
    main()
