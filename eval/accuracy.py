"""Convert a model with several recipes, measure each against its parent, and keep the figures.

    python eval/accuracy.py --model DIR [--model DIR …] --calibration FILE --text FILE --output eval/results/NAME.json

Every row converts from scratch and re-runs the parent in the same process on the same windows. Rows are named
recipe/activations/bits; both numerics are measured: `kernel` (what an INT4×FP8 kernel computes) and `stock` (what
transformers computes from the same file).
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring  # the script beside this one
import torch

from quantize.conversion.loop import Request, convert
from quantize.evaluation import evaluate
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import load_recipe

ROWS = (
    ("rtn", "none", 4),
    ("gptq", "none", 4),
    ("awq", "none", 4),
    ("fireq-paper-linear", "none", 4),
    ("fireq-linear", "none", 4),
    ("rtn", "fp8", 4),
    ("gptq", "fp8", 4),
    ("awq", "fp8", 4),
    ("fireq-paper-linear", "fp8", 4),
    ("fireq-linear", "fp8", 4),
    ("gptq", "none", 3),
    ("awq", "none", 3),
    ("fireq-linear", "none", 3),
    ("gptq", "none", 2),
    ("awq", "none", 2),
    ("fireq-linear", "none", 2),
)


def measure(model: Path, row: tuple[str, str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Convert and evaluate one row."""
    name, activations, bits = row
    recipe = load_recipe(name).with_overrides(
        dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
    )
    recipe = with_stage_fields(recipe, [f"activations={activations}", f"bits={bits}"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        started = time.monotonic()
        summary = convert(Request(model, recipe, output, torch.device("cpu"), torch.float32))
        seconds = time.monotonic() - started
        figures = {
            numerics: dataclasses.asdict(
                evaluate(
                    output,
                    model,
                    dataset=args.text,
                    seqlen=args.seqlen,
                    max_windows=args.windows,
                    numerics=numerics,
                )
            )
            for numerics in ("kernel", "stock")
            if numerics == "stock" or activations == "fp8"
        }
    return {
        "model": model.name,
        "recipe": name,
        "activations": activations,
        "bits": bits,
        "bits_per_weight": summary.bits_per_weight,
        "encode_seconds": round(seconds, 1),
        "figures": figures,
    }


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | recipe | scheme | bits/weight | perplexity (parent) | KLD | same top-1 | KLD, stock | encode |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        stock = row["figures"]["stock"]
        best = row["figures"].get("kernel", stock)
        scheme = f"W{row['bits']}A{'8-FP8' if row['activations'] == 'fp8' else '16'}"
        lines.append(
            f"| {row['model']} | {row['recipe']} | {scheme} | {row['bits_per_weight']:.3f} "
            f"| {best['perplexity']:.2f} ({best['baseline_perplexity']:.2f}) | {best['kld_mean']:.5f} "
            f"| {best['top1_agreement']:.3f} | {stock['kld_mean']:.5f} | {row['encode_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the rows asked for and write the results file after each of them."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--only", help="recipes to run, separated by commas")
    parser.add_argument("--bits", default="4,3,2", help="bits to run, separated by commas")
    args = parser.parse_args()
    names = set(args.only.split(",")) if args.only else {row[0] for row in ROWS}
    bits = {int(b) for b in args.bits.split(",")}
    rows = [row for row in ROWS if row[0] in names and row[2] in bits]
    results = measuring.head(args)
    for model in args.model:
        for row in rows:
            results["rows"].append(measure(model, row, args))
            results["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(table({"rows": results["rows"][-1:]}).splitlines()[-1], flush=True)
            measuring.keep(results, args.output)
    print(table(results), file=sys.stderr)


if __name__ == "__main__":
    main()
