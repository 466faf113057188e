"""What each part of FireQ costs and gains: linears, INT4 cache, pre- and post-RoPE scales, scale dtypes.

    python eval/ablation.py --model DIR [--model DIR …] --calibration FILE --text FILE --output eval/results/NAME.json

Every row converts from scratch and is measured against the parent in the same run. A row is measured when the results
file does not have it yet; `--only` selects rows by a regular expression, `--again` measures them anew. `--long N` also
measures the KV rows on windows of N tokens and keeps their KL divergence by position.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring  # the script beside this one
import torch

from quantize.conversion.loop import Request, convert
from quantize.evaluation import evaluate
from quantize.formats.kv4 import KvNumerics, KvScheme
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import load_recipe

_SYMMETRIC = "symmetric=true"
# (part, recipe, changes of stage fields, format)
ROWS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("W4A16 GPTQ g128, 16-bit cache", "gptq", (), ""),
    ("linear only", "fireq-linear", (), ""),
    ("KV4 only, learned maps", "fireq-kv", (), ""),
    ("KV4 only, scales", "fireq-kv", ("affine=false",), ""),
    ("KV4 only, scales, symmetric", "fireq-kv", (_SYMMETRIC,), ""),
    (
        "KV4 only, symmetric, no scales",
        "fireq-kv",
        ("pre=false", "post=false", "values=false", _SYMMETRIC),
        "",
    ),
    ("KV4 only, symmetric, pre", "fireq-kv", ("post=false", "values=false", _SYMMETRIC), ""),
    ("KV4 only, symmetric, post", "fireq-kv", ("pre=false", "values=false", _SYMMETRIC), ""),
    ("KV4 only, symmetric, pre and post", "fireq-kv", ("values=false", _SYMMETRIC), ""),
    ("KV4 only, scales, symmetric, in E4M3", "fireq-kv", ("scale_dtype=e4m3", _SYMMETRIC), ""),
    ("linear and KV4", "fireq", (), ""),
    ("linear and KV4, scales, symmetric, in E4M3", "fireq", ("scale_dtype=e4m3", _SYMMETRIC), ""),
    ("linear and KV4 without post scales, compressed-tensors", "fireq", (), "compressed-tensors"),
    ("published: linear only, FP8 group scales", "fireq-paper-linear", (), ""),
    ("published: linear only, BF16 group scales", "fireq-paper-linear", ("fireq.scales=bf16",), ""),
    ("published: linear and KV4, FP8 group scales", "fireq-paper", (), ""),
    ("published: linear and KV4, BF16 group scales", "fireq-paper", ("fireq.scales=bf16",), ""),
)


def measure(
    model: Path, row: tuple[str, str, tuple[str, ...], str], args: argparse.Namespace
) -> dict[str, Any]:
    """Convert and evaluate one row."""
    part, name, changes, kind = row
    recipe = load_recipe(name).with_overrides(
        dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
    )
    recipe = with_stage_fields(recipe, changes)
    if kind:
        recipe = recipe.model_copy(update={"format": kind})
    attention = (
        KvNumerics(KvScheme(symmetric=False)) if kind else None
    )  # the run-time flag of a format that does not hold it
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        started = time.monotonic()
        convert(Request(model, recipe, output, torch.device("cpu"), torch.float32))
        seconds = time.monotonic() - started
        how: dict[str, Any] = {"dataset": args.text, "attention": attention}
        found = evaluate(output, model, seqlen=args.seqlen, max_windows=args.windows, **how)
        long = None
        if args.long and "KV4" in part:
            windows = max(1, args.windows * args.seqlen // args.long)
            long = evaluate(output, model, seqlen=args.long, max_windows=windows, **how)
    keys = (
        "perplexity",
        "baseline_perplexity",
        "kld_mean",
        "kld_stderr",
        "top1_agreement",
        "bits_per_weight",
        "kv_cache",
    )
    return {
        "model": model.name,
        "part": part,
        "recipe": name,
        "changes": list(changes),
        "seconds": round(seconds, 1),
        **{key: getattr(found, key) for key in keys},
        "long": None
        if long is None
        else {"protocol": long.protocol, "kld_mean": long.kld_mean, **long.by_position},
    }


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | part | KV cache | perplexity (parent) | KLD | same top-1 | encode |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['part']} | {r['kv_cache']} | {r['perplexity']:.2f} ({r['baseline_perplexity']:.2f}) "
        f"| {r['kld_mean']:.5f} | {r['top1_agreement']:.3f} | {r['seconds']:.0f} s |"
        for r in results["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the rows and write the results file after each of them."""
    parser = measuring.parser(__doc__)
    parser.add_argument(
        "--long", type=int, help="also measure windows of so many tokens, by position"
    )
    parser.add_argument("--only", help="rows whose part this regular expression finds")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    args = parser.parse_args()
    results = measuring.head(args)
    if args.output and args.output.exists():
        results |= json.loads(args.output.read_text(encoding="utf-8"))
    for model in args.model:
        for row in ROWS:
            there = [r for r in results["rows"] if (r["model"], r["part"]) == (model.name, row[0])]
            if (args.only and not re.search(args.only, row[0])) or (there and not args.again):
                continue
            found = measure(model, row, args)
            results["rows"] = _with(results["rows"], found)
            print(table({"rows": [found]}).splitlines()[-1], flush=True)
            measuring.keep(results, args.output)


def _with(rows: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with another one in its place: by model, in the order of `ROWS`."""
    models = list(dict.fromkeys([*(r["model"] for r in rows), found["model"]]))
    parts = [row[0] for row in ROWS]
    key = found["model"], found["part"]
    kept = [r for r in rows if (r["model"], r["part"]) != key]
    return sorted(
        [*kept, found],
        key=lambda r: (
            models.index(r["model"]),
            parts.index(r["part"]) if r["part"] in parts else len(parts),
        ),
    )


if __name__ == "__main__":
    main()
