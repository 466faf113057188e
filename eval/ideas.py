"""Ideas of other papers beside pq's recipes at equal bits: QQQ, block floating point, GEAR.

    python eval/ideas.py --model DIR [--model DIR …] --calibration FILE --text FILE \
        --output eval/results/ideas.json

A row is measured when the results file does not have it yet, so a stopped run goes on where it was;
`--only` selects rows by a regular expression, `--list` names them, `--seconds` starts no further row
after so long. Block floating point, INT8 inputs and GEAR's cache are simulated: what they round is
rounded so, and no format holds it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ideas_stages  # the scripts beside this one
import measuring
import torch
from ideas_cache import Gear, geared
from ideas_rows import INT4_16BIT, ROWS, Row
from ideas_stages import BlockFloat
from torch import nn

from quantize.conversion.loop import Request, convert
from quantize.evaluation import evaluate
from quantize.evaluation.parents import ParentCache
from quantize.methods.base import Stage
from quantize.methods.fireq.attention import FireqAttention
from quantize.methods.gptq import Gptq
from quantize.model import load
from quantize.recipe.recipe import Calibration, Recipe

RESULTS = Path(__file__).parent / "results"
_KEYS = ("perplexity", "baseline_perplexity", "kld_mean", "kld_stderr", "top1_agreement")


@contextmanager
def _int8_inputs() -> Iterator[None]:
    """Let packed linears that are loaded meanwhile round their inputs to INT8."""
    made = load.packed_linear

    def rounding(*args: Any) -> nn.Module:
        linear = made(*args)
        linear.register_forward_pre_hook(lambda _, inputs: (ideas_stages.round_int8(inputs[0]),))
        return linear

    with patch.object(load, "packed_linear", rounding):
        yield


def measure(row: Row, model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert and evaluate one row. folder: of conversions, which rows with the same stages share."""
    if row.known and (found := _from_file(row, model, args)):
        return found
    output, seconds = model, 0.0
    if row.stages:
        output = folder / f"{model.name}-{_key(row.stages)}"
        seconds = _convert(row, model, args, output)
    gear = row.cache if isinstance(row.cache, Gear) else None
    numerics = INT4_16BIT if gear else row.cache
    with geared(gear) if gear else nullcontext(), _int8_inputs() if row.int8 else nullcontext():
        found = evaluate(
            output,
            model,
            dataset=args.text,
            seqlen=args.seqlen,
            max_windows=args.windows,
            attention=numerics,  # type: ignore[arg-type]  # a Gear never comes here
            parents=ParentCache(args.work / "parents"),
        )
    return {
        **_named(row, model),
        "bits": bits_of(row, model, found.bits_per_weight, args.seqlen),
        "seconds": round(seconds, 1),
        **{key: getattr(found, key) for key in _KEYS},
    }


def _from_file(row: Row, model: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The row as another results file has it; None where that has another protocol."""
    assert row.known is not None
    stem, key = row.known
    held = json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))
    if held["protocol"] != measuring.head(args)["protocol"]:
        return None
    found = next(
        (r for r in held["rows"] if {"model": model.name, **key}.items() <= r.items()), None
    )
    if found is None:
        return None
    figures = found["figures"].get("kernel", found["figures"]["stock"])
    return {
        **_named(row, model),
        "bits": found["bits_per_weight"],
        "file": f"{stem}.json",
        **{key: figures[key] for key in _KEYS if key in figures},
    }


def _named(row: Row, model: Path) -> dict[str, Any]:
    return {"model": model.name, "idea": row.idea, "name": row.name, "simulated": row.simulated}


def bits_of(row: Row, model: Path, packed: float | None, tokens: int) -> float:
    """Stored bits of a weight, or of a key or value where the row is about the cache."""
    facts = json.loads((model / "config.json").read_text(encoding="utf-8"))
    last = row.stages[-1] if row.stages else None
    if isinstance(row.cache, Gear):
        return row.cache.bits_per_value(tokens, facts["num_key_value_heads"], facts["head_dim"])
    if isinstance(last, FireqAttention):
        return last.numerics.bits_per_value(facts["head_dim"])
    if row.cache is not None:
        return row.cache.bits_per_value(facts["head_dim"])
    if not isinstance(last, BlockFloat):
        assert packed is not None
        return packed
    source = load.open_source(model)
    sizes = [s for n, s in source.shapes.items() if ".layers." in n and len(s) == 2]
    total = sum(N * K * last.stored_bits(N, K) for N, K in sizes)
    return total / sum(N * K for N, K in sizes)


def _key(stages: tuple[Stage, ...]) -> str:
    told = json.dumps([stage.model_dump(mode="json") for stage in stages], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _convert(row: Row, model: Path, args: argparse.Namespace, output: Path) -> float:
    """Convert where that was not done yet → seconds."""
    if output.exists():
        return 0.0
    kv = any(isinstance(stage, FireqAttention) for stage in row.stages)
    recipe = Recipe(
        name="ideas",
        description=row.name,
        format="pq" if kv else "compressed-tensors",
        calibration=Calibration(
            dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
        ),
        stages=(Gptq(),),
    ).model_copy(update={"stages": row.stages})
    started = time.monotonic()
    # Recipes know no stages of other people's; these are dumped all the same.
    warnings.filterwarnings("ignore", "(?s).*PydanticSerializationUnexpectedValue")
    convert(Request(model, recipe, output, torch.device("cpu"), torch.float32))
    return time.monotonic() - started


def table(results: Mapping[str, Any]) -> str:
    """A table for each idea as Markdown, rows by rising bits, the models beside each other."""
    rows: list[dict[str, Any]] = results["rows"]
    models = sorted(dict.fromkeys(r["model"] for r in rows))
    shown = []
    for idea in sorted(dict.fromkeys(r["idea"] for r in rows)):
        what = "value" if "cache" in idea else "weight"
        shown += [
            "| " + " | ".join([idea, f"bits per {what}", *(f"KLD, {m}" for m in models)]) + " |",
            "|---|---:|" + "---:|" * len(models),
        ]
        found = {(r["name"], r["model"]): r for r in rows if r["idea"] == idea}
        names = dict.fromkeys((r["bits"], r["name"], r["simulated"]) for r in found.values())
        for bits, name, simulated in sorted(names):
            klds = [found.get((name, model)) for model in models]
            cells = ["" if r is None else _kld(r) for r in klds]
            told = f"{name} (simulated)" if simulated else name
            shown.append("| " + " | ".join([told, f"{bits:.3f}", *cells]) + " |")
        shown.append("")
    return "\n".join(shown[:-1])


def _kld(row: Mapping[str, Any]) -> str:
    spread = f" ± {row['kld_stderr']:.5f}" if "kld_stderr" in row else ""
    return f"{row['kld_mean']:.5f}{spread}"


def main() -> None:
    """Run the rows that are missing and write the results file after each of them."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--only", default="", help="measure rows whose name this is found in")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--seconds", type=float, help="start no further row after so long")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps conversions and the parent's run"
    )
    args = parser.parse_args()
    rows = [row for row in ROWS if re.search(args.only, row.name)]
    if args.list:
        print("\n".join(row.name for row in rows))
        return
    started, results = time.monotonic(), measuring.head(args)
    if args.output and args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))
    done = {(r["model"], r["name"]) for r in results["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        for row in rows:
            for model in args.model:
                late = args.seconds and time.monotonic() - started > args.seconds
                if (model.name, row.name) in done or late:
                    continue
                found = measure(row, model, args, args.work)
                results["rows"].append(found)
                print(
                    f"{model.name}: {row.name}: {found['bits']:.3f} {found['kld_mean']:.5f}",
                    flush=True,
                )
                measuring.keep(results, args.output)


if __name__ == "__main__":
    main()
