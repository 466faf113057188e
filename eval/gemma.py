"""The recipes on a real model: Gemma 3 270M, row by row, on two texts.

    python ../shared/tools/get_gemma.py GEMMA
    python eval/gemma.py --model GEMMA --calibration ../shared/text/c4-calibration.txt \
        --text ../shared/text/wikitext2-test.txt --second ../shared/text/lambada_test.jsonl \
        --output eval/results/gemma.json

A row is measured when the results file does not have it yet, so a stopped run goes on where it was and rows can be run
in several sittings; `--only` selects them by a regular expression, `--list` names them, `--again` measures them anew.
Each row is a process of its own, whose time and peak memory are its conversion's. `--seconds` starts no further row
after so long. The second text is for figures alone: nothing may be chosen by it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ladimo  # the scripts beside this one
import measuring
import torch

from quantize.conversion.loop import Request, convert
from quantize.evaluation import evaluate
from quantize.formats.kv4 import KvNumerics, KvScheme
from quantize.formats.vllm_kv4 import VllmInt4
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe

_KEYS = (
    "perplexity",
    "baseline_perplexity",
    "kld_mean",
    "kld_stderr",
    "kld_p99",
    "top1_agreement",
)
_CACHES = {"": None, "int4": KvNumerics(KvScheme(symmetric=False)), "vllm-int4": VllmInt4()}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    recipe: str | None
    """None: the parent itself, on another cache."""
    changes: tuple[str, ...] = ()
    """Fields of stages, as `--set` takes them."""
    bos: bool = True
    """Whether calibration windows begin with BOS."""
    cache: str = ""
    """The cache that evaluation emulates, for models that have none of their own."""
    nsamples: int | None = None
    """Windows to calibrate on, where a method wants more than the others."""
    static: bool = False
    """Whether FFNs are pruned as `ladimo` would divide them, instead of divided."""


_W4A16 = ("fireq.activations=none",)
_BLOCKS = ("activated_reduction=0.0748",)
ROWS = (
    Row("round to nearest, W4A16", "rtn"),
    Row("GPTQ, W4A16", "gptq"),
    Row("AWQ, W4A16", "awq"),
    Row("`fireq-linear`, W4A16", "fireq-linear", _W4A16),
    Row("`fireq-linear`, W4A8-FP8", "fireq-linear"),
    Row("`fireq`, W4A8 and an INT4 cache", "fireq"),
    Row("`fireq-kv`, the INT4 cache alone", "fireq-kv"),
    Row("INT4 cache without scales", None, cache="int4"),
    Row("vLLM's INT4 cache (emulated)", None, cache="vllm-int4"),
    Row("`sbvr`, W4A16", "sbvr"),
    Row("`sbvr-3bit`, W3A16", "sbvr-3bit"),
    Row("`sbvr-2bit`, W2A16", "sbvr-2bit"),
    Row("GPTQ, W3A16", "gptq", ("bits=3",)),
    Row("`fireq-linear`, W4A16, calibrated without BOS", "fireq-linear", _W4A16, bos=False),
    Row(
        "`fireq-linear`, W4A16, tokens count the same",
        "fireq-linear",
        (*_W4A16, "equalize.token_weights=equal", "fireq.token_weights=equal"),
    ),
    Row(
        "`fireq-linear`, W4A16, tokens by attention",
        "fireq-linear",
        (*_W4A16, "equalize.token_weights=attention", "fireq.token_weights=attention"),
    ),
    Row("GPTQ, W4A16, tokens count the same", "gptq", ("token_weights=equal",)),
    Row("GPTQ, W4A16, tokens by attention", "gptq", ("token_weights=attention",)),
    Row("`ladimo`, 20 % fewer activated parameters", "ladimo"),
    # The head is 63 % of what a token is multiplied with, and no expert can save any of it.
    Row("`ladimo`, 20 % fewer in the blocks", "ladimo", _BLOCKS),
    # The 100,000 tokens of the recipe, where those above learn from 16,384.
    Row("`ladimo`, 20 % fewer in the blocks, 196 windows", "ladimo", _BLOCKS, nsamples=196),
    Row("the same pruned and distilled", "ladimo", _BLOCKS, nsamples=196, static=True),
)


def recipe_of(row: Row, args: argparse.Namespace) -> Recipe:
    """The recipe of a row, on the calibration text of the run."""
    assert row.recipe is not None
    recipe = load_recipe(row.recipe).with_overrides(
        dataset=args.calibration,
        nsamples=row.nsamples or args.nsamples,
        seqlen=args.seqlen,
        bos=None if row.bos else "never",
    )
    recipe = with_stage_fields(recipe, row.changes)
    return ladimo.pruned(recipe) if row.static else recipe


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Convert and evaluate one row in this process."""
    model = args.model[0]
    found: dict[str, Any] = {"model": model.name, "row": row.name, "recipe": row.recipe}
    with tempfile.TemporaryDirectory() as folder:
        output, seconds, cpu = model, 0.0, 0.0
        if row.recipe is not None:
            output = Path(folder) / "out"
            started, used = time.monotonic(), time.process_time()
            request = Request(
                model, recipe_of(row, args), output, torch.device("cpu"), torch.float32
            )
            summary = convert(request)
            seconds, cpu = time.monotonic() - started, time.process_time() - used
            found["bits_per_weight"] = summary.bits_per_weight
            found["activated_reduction"] = summary.activated_reduction
        found |= {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "figures": {
                Path(text).name: _figures(output, text, row, args)
                for text in (args.text, args.second)
                if text
            },
        }
    return found


def _figures(output: Path, text: str, row: Row, args: argparse.Namespace) -> dict[str, float]:
    figures = evaluate(
        output,
        args.model[0],
        dataset=text,
        seqlen=args.seqlen,
        max_windows=args.windows,
        attention=_CACHES[row.cache],
    )
    return {key: getattr(figures, key) for key in _KEYS}


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown: both texts side by side."""
    texts = list(results["rows"][0]["figures"])
    titles = "".join(f" KLD, {text} | p99 | same top-1 | perplexity |" for text in texts)
    lines = [
        f"| | bits per weight |{titles} encode, CPU seconds | peak |",
        f"|---|---:|{'---:|---:|---:|---:|' * len(texts)}---:|---:|",
    ]
    order = {row.name: place for place, row in enumerate(ROWS)}
    for row in sorted(results["rows"], key=lambda r: order.get(r["row"], len(order))):
        bits = row.get("bits_per_weight")
        cells = "".join(
            f" {f['kld_mean']:.4f} | {f['kld_p99']:.2f} | {f['top1_agreement']:.3f} | {f['perplexity']:.2f} |"
            for f in row["figures"].values()
        )
        quantized = bits is not None and bits < 16
        encode = f"{row['cpu_seconds']:.0f} s" if row["recipe"] else "–"
        lines.append(
            f"| {row['row']} | {f'{bits:.3f}' if quantized else '16'} |{cells} {encode} "
            f"| {row['peak_rss_mb'] / 1024:.1f} GB |"
        )
    parents = ", ".join(
        f"{f['baseline_perplexity']:.2f} on {text}"
        for text, f in results["rows"][0]["figures"].items()
    )
    return "\n".join([*lines, "", f"Perplexity of the parent: {parents}."])


def _load(args: argparse.Namespace) -> dict[str, Any]:
    if args.output and args.output.exists():
        found: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8"))
        return found
    second = f"; second text {Path(args.second).name}, never tuned on" if args.second else ""
    head = measuring.head(args)
    return head | {"protocol": head["protocol"] + second}


def _measured_apart(index: int, arguments: list[str]) -> dict[str, Any]:
    """A row in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--row", str(index)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"row {ROWS[index].name}: exit code {done.returncode}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Run the rows that are missing, and write the results file after each of them."""
    parser = measuring.parser(__doc__)
    parser.set_defaults(nsamples=32, windows=20)
    parser.add_argument("--second", help="another text, for figures alone")
    parser.add_argument("--only", help="rows whose name this regular expression finds")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    parser.add_argument("--list", action="store_true", help="name the rows and which are there")
    parser.add_argument("--seconds", type=float, help="start no row after so long")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(ROWS[args.row], args)))
        return
    results = _load(args)
    started = time.monotonic()
    for index, row in enumerate(ROWS):
        if args.only and not re.search(args.only, row.name):
            continue
        there = any(found["row"] == row.name for found in results["rows"])
        if args.list:
            print("there  " if there else "missing", row.name)
            continue
        if there and not args.again:
            continue
        if args.seconds and time.monotonic() - started > args.seconds:
            print(f"{row.name}: not started, {args.seconds:.0f} s are over", flush=True)
            break
        found = _measured_apart(index, sys.argv[1:])
        rows = [one for one in results["rows"] if one["row"] != row.name]
        results["rows"] = [*rows, found]
        print(table({"rows": [found]}).splitlines()[2], flush=True)
        measuring.keep(results, args.output)


if __name__ == "__main__":
    main()
