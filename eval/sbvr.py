"""SBVR against its peers at 4, 3 and 2 bits, and what each of its parts costs and gains.

    python eval/sbvr.py --model DIR [--model DIR …] --calibration FILE --text FILE --output eval/results/NAME.json

Every row converts from scratch and is measured against the parent in the same run. HQQ and bitsandbytes NF4 are run
from their own packages (`pip install hqq bitsandbytes`); without these their rows are left out. `--only` selects rows.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring  # the script beside this one
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantize.conversion.loop import Request, convert
from quantize.evaluation import evaluate
from quantize.files.checkpoint import Checkpoint
from quantize.methods.rotate import Rotate
from quantize.model.skeleton import Skeleton
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe

_KEYS = ("perplexity", "baseline_perplexity", "kld_mean", "kld_stderr", "top1_agreement")


RECIPES = {4: "sbvr", 3: "sbvr-3bit", 2: "sbvr-2bit"}


def rows() -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, recipe, changes of stage fields); `unbalanced` leaves AWQ's scales out, `rotated` adds a rotation."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for bits, recipe in RECIPES.items():
        found += [
            (f"{bits}-bit RTN g128", "rtn", (f"bits={bits}",)),
            (f"{bits}-bit AWQ g128", "awq", (f"bits={bits}",)),
            (f"{bits}-bit GPTQ g128", "gptq", (f"bits={bits}",)),
            (
                f"{bits}-bit integers, FireQ's solver",
                "fireq-linear",
                (f"fireq.bits={bits}", "fireq.activations=none"),
            ),
            (f"{bits}-bit SBVR", recipe, ()),
            (f"{bits}-bit SBVR, data-free", recipe, ("unbalanced", "fit=data-free")),
        ]
    for bits in (4, 2):
        free = ("unbalanced", "fit=data-free")
        found += [
            (f"{bits}-bit SBVR, unbalanced", RECIPES[bits], ("unbalanced",)),
            (f"{bits}-bit SBVR, rotated", RECIPES[bits], ("rotated",)),
            (f"{bits}-bit SBVR, no bias", RECIPES[bits], ("bias=false",)),
            (f"{bits}-bit SBVR, data-free, rotated", RECIPES[bits], (*free, "rotated")),
            (f"{bits}-bit SBVR, data-free, no bias", RECIPES[bits], (*free, "bias=false")),
            (f"{bits}-bit SBVR, data-free, 1 line", RECIPES[bits], (*free, "lines=1")),
            (f"{bits}-bit SBVR, data-free, 16 lines", RECIPES[bits], (*free, "lines=16")),
            (f"{bits}-bit SBVR, data-free, 64 lines", RECIPES[bits], (*free, "lines=64")),
            (
                f"{bits}-bit SBVR, data-free, 256 lines at any cost",
                RECIPES[bits],
                (*free, "overhead=null"),
            ),
            (f"{bits}-bit SBVR, data-free, free lines", RECIPES[bits], (*free, "codebook=lines")),
            (
                f"{bits}-bit SBVR, data-free, shapes x scales",
                RECIPES[bits],
                (*free, "codebook=shapes"),
            ),
            (
                f"{bits}-bit SBVR, data-free, g64",
                RECIPES[bits],
                (*free, "group_size=64", "overhead=0.25"),
            ),
            (
                f"{bits}-bit SBVR, data-free, g256",
                RECIPES[bits],
                (*free, "group_size=256", "overhead=0.0625"),
            ),
        ]
    return found


def nf4(w: Tensor) -> Tensor:
    """bitsandbytes NF4: blocks of 64, their absmax in 8 bits again by blocks of 256 (4.127 bits per weight)."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(
        w.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return bnb.dequantize_4bit(codes, state).float()


def hqq(bits: int) -> Callable[[Tensor], Tensor]:
    """HQQ: groups of 128 with scale and zero in 16 bits each (bits + 0.25 bits per weight)."""

    def round_trip(w: Tensor) -> Tensor:
        from hqq.core.quantize import Quantizer

        settings: dict[str, Any] = {
            "group_size": 128,
            "axis": 1,
            "optimize": True,
            "round_zero": False,
        }
        codes, meta = Quantizer.quantize(
            w, nbits=bits, compute_dtype=torch.float32, device="cpu", **settings
        )
        return Quantizer.dequantize(codes, meta).float()

    return round_trip


PEERS: tuple[tuple[str, float, Callable[[Tensor], Tensor]], ...] = (
    ("4-bit NF4 (bitsandbytes)", 4.127, nf4),
    ("4-bit HQQ", 4.25, hqq(4)),
    ("3-bit HQQ", 3.25, hqq(3)),
    ("2-bit HQQ", 2.25, hqq(2)),
)


def write_replaced(model: Path, folder: Path, round_trip: Callable[[Tensor], Tensor]) -> None:
    """Write a plain checkpoint whose linears inside the blocks hold their weights
    after `round_trip`, in float32."""
    source = Checkpoint(model)
    arch = Skeleton(model, torch.device("cpu"), torch.float32).arch
    inside = tuple(f".{name}.weight" for name in arch.roles)
    folder.mkdir()
    tensors = {name: source.tensor(name) for name in source.names()}
    save_file(
        {n: round_trip(t.float()) if n.endswith(inside) else t for n, t in tensors.items()},
        folder / "model.safetensors",
    )
    for path in (model / "config.json", *source.side_files()):
        shutil.copy(path, folder / path.name)


def recipe_of(name: str, changes: tuple[str, ...], args: argparse.Namespace) -> Recipe:
    """The recipe of a row."""
    recipe = load_recipe(name).with_overrides(
        dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
    )
    recipe = with_stage_fields(recipe, tuple(change for change in changes if "=" in change))
    smooth = [
        stage for stage in recipe.stages if stage.kind == "smooth" and "unbalanced" not in changes
    ]
    smooth += [Rotate()] if "rotated" in changes else []
    return recipe.model_copy(
        update={"stages": (*smooth, *(s for s in recipe.stages if s.kind != "smooth"))}
    )


def measure(
    model: Path, name: str, make: Callable[[Path], float], args: argparse.Namespace
) -> dict[str, Any]:
    """Make a checkpoint and evaluate it; `make` writes it to the folder it is given and returns bits per weight."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        started = time.monotonic()
        bits = make(output)
        seconds = time.monotonic() - started
        found = evaluate(
            output, model, seqlen=args.seqlen, max_windows=args.windows, dataset=args.text
        )
    figures = {key: getattr(found, key) for key in _KEYS}
    return {
        "model": model.name,
        "method": name,
        "seconds": round(seconds, 1),
        "bits_per_weight": bits,
        **figures,
    }


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | method | bits per weight | perplexity (parent) | KLD | same top-1 | encode |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['method']} | {r['bits_per_weight']:.3f} | {r['perplexity']:.2f} "
        f"({r['baseline_perplexity']:.2f}) | {r['kld_mean']:.5f} | {r['top1_agreement']:.3f} | {r['seconds']:.0f} s |"
        for r in results["rows"]
    ]
    return "\n".join(lines)


def _makers(model: Path, args: argparse.Namespace) -> dict[str, Callable[[Path], float]]:
    def ours(recipe: Recipe) -> Callable[[Path], float]:
        def make(output: Path) -> float:
            return convert(
                Request(model, recipe, output, torch.device("cpu"), torch.float32)
            ).bits_per_weight

        return make

    def peer(bits: float, round_trip: Callable[[Tensor], Tensor]) -> Callable[[Path], float]:
        def make(output: Path) -> float:
            write_replaced(model, output, round_trip)
            return bits

        return make

    peers = {name: peer(bits, round_trip) for name, bits, round_trip in PEERS}
    return peers | {
        name: ours(recipe_of(recipe, changes, args)) for name, recipe, changes in rows()
    }


def main() -> None:
    """Run the rows and write the results file after each of them."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--only", help="measure rows whose name this regular expression finds")
    args = parser.parse_args()
    results = measuring.head(args)
    for model in args.model:
        for name, make in _makers(model, args).items():
            if args.only and not re.search(args.only, name):
                continue
            try:
                row = measure(model, name, make, args)
            except ModuleNotFoundError as err:
                print(f"{name}: left out, {err.name} is not installed", flush=True)
                continue
            results["rows"].append(row)
            print(table({"rows": [row]}).splitlines()[-1], flush=True)
            measuring.keep(results, args.output)


if __name__ == "__main__":
    main()
