"""What it costs that FP8 group scales reload exactly on several GPUs, and what it spares.

    python eval/tensor_parallel.py ../shared/models/yardstick --output eval/results/tensor-parallel.json

All linears of a small model get INT4 weights in groups of 128 for E4M3 inputs, by rounding or by
GPTQ's error feedback, with three kinds of group scales: bfloat16 as they come (what rtn and gptq
wrote before), E4M3 multiples of a row factor, and those that every shard finds again as well. Then
the weights are replaced by what an engine on T GPUs multiplies: scales and factors derived from the
shards of o_proj and down_proj. Figures are KLD from the 16-bit parent, in nats a token, and the share
of the shared linears' weights that are other ones than on one GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.formats.fp8 import product_weight, quantize_activations, row_factor
from quantize.formats.grouping import shard_counts
from quantize.model.roles import splits_inputs
from quantize.solvers.feedback import damp, error_feedback, feedback_order
from quantize.solvers.grid import Grid

GROUP = 128
KINDS = ("bfloat16", "one GPU", "every shard")


def grid_of(kind: str, name: str, K: int) -> Grid:
    """The code book of a linear with scales of this kind."""
    shards = shard_counts(K // GROUP, (2, 4, 8)) if splits_inputs(name) else ()
    return Grid(
        4,
        GROUP,
        fp8_scales=kind != KINDS[0],
        shards=shards if kind == KINDS[2] else (),
    )


def served(codes: Tensor, scale: Tensor, gpus: int) -> Tensor:
    """Weight [N, K] that an engine multiplies, a row's inputs cut into so many shards."""
    N, G = scale.shape
    own = scale.reshape(N * gpus, G // gpus)
    spread = own.repeat_interleave(GROUP, dim=1)
    return product_weight(codes.reshape(N * gpus, -1), spread, row_factor(own)).view(N, -1)


def windows_of(model: Path, text: Path, count: int, length: int) -> Tensor:
    """Tokens [count, length] from the beginning of a text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(text.read_text(encoding="utf-8")[: 40 * count * length]).input_ids
    return torch.tensor(tokens[: count * length]).view(count, length)


def moments(model: nn.Module, linears: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """E[x xᵀ] of the rounded inputs of every linear, with the 16-bit model around them."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = quantize_activations(args[0].flatten(0, -2))
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

        return seen

    handles = [lin.register_forward_pre_hook(hook(name)) for name, lin in linears.items()]
    with torch.inference_mode():
        for batch in tokens.split(4):
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}


def kld(logits: Tensor, parent: Tensor) -> float:
    """Mean over tokens of KL(parent ‖ model)."""
    p, q = (torch.log_softmax(x.float(), dim=-1) for x in (parent, logits))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def measure(folder: Path, text: Path, fit: int, test: int, length: int) -> list[dict[str, Any]]:
    """A row for each method and kind of scales."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    tokens = windows_of(folder, text, fit + test, length)
    seen, asked = tokens[:fit], tokens[fit:]
    with torch.inference_mode():
        parent = torch.cat([model(batch).logits for batch in asked.split(4)])
    hessians = moments(model, linears, seen)
    weights = {name: lin.weight.detach().float().clone() for name, lin in linears.items()}
    for lin in linears.values():
        lin.register_forward_pre_hook(lambda _, args: (quantize_activations(args[0]),))
    rows = []
    for method in ("rtn", "gptq"):
        for kind in KINDS:
            fitted = {}
            for name, w in weights.items():
                grid = grid_of(kind, name, w.shape[1])
                scale, factor = grid.absmax_scale(w) if method == "rtn" else grid.fit_scale(w)
                codes = grid.round(w, scale, factor)[0]
                if method == "gptq":
                    usable = damp(
                        hessians[name], 0.01, feedback_order(hessians[name], "activation")
                    )
                    assert usable is not None
                    codes = error_feedback(w, usable, grid, scale, factor)[0].codes
                fitted[name] = codes, scale
            row: dict[str, Any] = {"method": method, "scales": kind}
            for gpus in (1, 2):
                moved = total = 0
                for name, lin in linears.items():
                    codes, scale = fitted[name]
                    cut = gpus if splits_inputs(name) and scale.shape[1] % gpus == 0 else 1
                    weight = served(codes, scale, cut)
                    lin.weight.data = weight
                    if splits_inputs(name):
                        whole = served(codes, scale, 1)
                        moved += int((weight != whole).sum())
                        total += weight.numel()
                with torch.inference_mode():
                    logits = torch.cat([model(batch).logits for batch in asked.split(4)])
                row[f"kld_{gpus}"] = round(kld(logits, parent), 5)
                row[f"other_weights_{gpus}"] = round(moved / max(1, total), 4)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Run as a script."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--fit", type=int, default=32, help="windows that GPTQ sees")
    arguments.add_argument("--test", type=int, default=24, help="windows that are measured")
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--output", type=Path)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.model, args.text, args.fit, args.test, args.length)
    if args.output:
        facts = {"model": args.model.name, "fit": args.fit, "test": args.test}
        facts |= {"length": args.length, "rows": rows}
        args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
