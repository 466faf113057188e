"""LaDiMo against what it must beat at equal activated parameters and equal tokens, and over budgets.

    python eval/ladimo.py --model DIR [--model DIR …] --calibration FILE --text FILE --nsamples 196 \
        --output eval/results/ladimo.json

Every row converts from scratch and is measured against the parent in the same run. The baselines get the layers and
sizes that the search chose for LaDiMo, so that they save the same in the same places; `everywhere` gives all layers
one size instead. `--only` selects rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import measuring  # the script beside this one
import torch

from quantize.block.block import Block
from quantize.block.teacher import keep_parent
from quantize.conversion.loop import Request, convert
from quantize.evaluation import evaluate
from quantize.methods.ladimo.budget import neurons_for
from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.distill import Training, distill, refit_down
from quantize.methods.ladimo.pruning import prune
from quantize.methods.ladimo.split import Layout, Split
from quantize.methods.ladimo.stage import Ladimo
from quantize.methods.ladimo.student import Student
from quantize.methods.ladimo.trial import dense_ffn
from quantize.model.dense_ffn import dense_ffn_of
from quantize.model.moe import Threshold
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe

_KEYS = ("perplexity", "baseline_perplexity", "kld_mean", "kld_stderr", "top1_agreement")
_BIASED = ("llama",)  # types whose FFNs know biases
_BUDGETS = (0.1, 0.2, 0.3, 0.4)  # of activated parameters saved: to where quality is lost


class StaticPruning(Ladimo):
    """The baseline: FFNs keep so many neurons as LaDiMo's would use, and a bias for the mean of the others.

    The neurons that go stay in the checkpoint as zeros, since a llama's FFNs all have one size. Of a model whose FFNs
    know no biases (Gemma) the mean is left to the lesson, as LaDiMo's experts leave it.
    """

    method: Literal["static-pruning"] = "static-pruning"  # type: ignore[assignment]
    native_field: ClassVar[str | None] = None  # type: ignore[misc]

    def config(self, parent: Mapping[str, Any]) -> dict[str, Any]:
        """The parent's, with biases in the FFN where its class knows them."""
        return {**parent, "mlp_bias": True} if parent["model_type"] in _BIASED else dict(parent)

    def linears(self, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """None changes its shape."""
        return dict(linears)

    def apply(self, block: Block) -> None:
        """Prune, and with `teaching: distill` teach what is left the same lesson that LaDiMo's experts get."""
        keep_parent(block)
        biased = block.arch.model_type in _BIASED
        for role in ("gate", "up", "down") if biased else ():
            block.add_bias(block.arch.of_role(role))
        assert isinstance(self.mean_experts, tuple)
        mean = self.mean_experts[block.index]
        if mean is None:
            return
        ffn, lesson = dense_ffn(block), self._lesson(block)
        x = lesson.train.x
        sizes = self._layout(ffn.neurons)
        assert sizes is not None
        found = prune(ffn, x, neurons_for(len(ffn.down), sizes, mean))
        owner = torch.zeros(ffn.neurons, dtype=torch.int64)
        owner[found.kept] = (
            1  # the shared expert of a mixture whose one routed expert nobody visits
        )
        split = Split(Layout(1, ffn.neurons - len(found.kept), len(found.kept)), owner)
        student = copy.deepcopy(
            Student(ffn, split, torch.zeros(1, x.shape[1]), Threshold(float("inf")))
        )
        bias = found.bias if biased else torch.zeros_like(found.bias)
        beside_bias = lesson.train.minus(bias) if biased else lesson.train
        if self.teaching != "none":
            refit_down(student, beside_bias)
        if self.teaching == "distill":
            training = Training(
                self.steps, self.batch_tokens, self.learning_rate, self.weight_decay, self.seed
            )
            distill(student, beside_bias, training)
        for role, weight in (("gate", student.gate), ("up", student.up), ("down", student.down)):
            block.linear(block.arch.of_role(role)).weight.copy_(weight)
        down = block.linear(block.arch.of_role("down"))
        down.weight[:, owner == 0] = 0
        if biased:
            assert down.bias is not None
            down.bias.copy_(bias)
        kept = Ffn(
            student.gate[found.kept], student.up[found.kept], student.down[:, found.kept], ffn.act
        )
        error = lesson.held_out.error(lambda x: kept(x) + bias)
        block.note(dense_ffn_of(block.arch), ffn_error=error, mean_experts=mean)


def rows(levels: str, everywhere: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, recipe or `static`, changes of stage fields) at one budget; levels, everywhere: sizes of all layers."""
    free = "teaching=none"
    return [
        ("LaDiMo, top-k (stock loaders)", "ladimo", ("policy=top-k",)),
        ("LaDiMo, least squares", "ladimo", (levels, "teaching=least-squares")),
        ("LaDiMo, aims at each layer", "ladimo", (levels, "aim=layer")),
        ("contiguous split, distilled", "ladimo", (levels, "construction=contiguous")),
        ("random split, distilled", "ladimo", (levels, "construction=random")),
        ("static pruning, distilled", "static", (levels,)),
        ("clustered split, train-free", "ladimo", (levels, free)),
        ("contiguous split, train-free", "ladimo", (levels, free, "construction=contiguous")),
        ("random split, train-free", "ladimo", (levels, free, "construction=random")),
        ("LaDiMo, everywhere", "ladimo", (everywhere,)),
        (
            "contiguous split, distilled, everywhere",
            "ladimo",
            (everywhere, "construction=contiguous"),
        ),
        ("static pruning, distilled, everywhere", "static", (everywhere,)),
        ("static pruning, everywhere", "static", (everywhere, free)),
        ("LaDiMo + FireQ W4A8", "ladimo-fireq", (levels,)),
        ("LaDiMo + SBVR W4A16", "ladimo-sbvr", (levels,)),
    ]


def recipe_of(name: str, changes: tuple[str, ...], args: argparse.Namespace) -> Recipe:
    """The recipe of a row."""
    source = "ladimo" if name == "static" else name
    recipe = load_recipe(source).with_overrides(
        dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
    )
    recipe = with_stage_fields(recipe, tuple(p for change in changes for p in change.split(";")))
    return pruned(recipe) if name == "static" else recipe


def pruned(recipe: Recipe) -> Recipe:
    """`ladimo` with FFNs pruned instead of divided."""
    (stage,) = recipe.stages
    return recipe.model_copy(
        update={"stages": (StaticPruning(**stage.model_dump(exclude={"method"})),)}
    )


def measure(
    model: Path, name: str, recipe: Recipe, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert and evaluate: the row, and what the plan settled."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        started = time.monotonic()
        done = convert(Request(model, recipe, output, torch.device("cpu"), torch.float32))
        seconds = time.monotonic() - started
        found = evaluate(
            output, model, seqlen=args.seqlen, max_windows=args.windows, dataset=args.text
        )
        layers = json.loads((output / "pq.json").read_text())["layers"]
    plan = next((facts for key, facts in layers.items() if key in ("ladimo", "static-pruning")), {})
    errors = {key: facts["ffn_error"] for key, facts in layers.items() if "ffn_error" in facts}
    figures = {key: getattr(found, key) for key in _KEYS}
    row = {
        "model": model.name,
        "conversion": name,
        "seconds": round(seconds, 1),
        "bits_per_weight": done.bits_per_weight,
        "activated_reduction": plan["activated_reduction"],
        "blocks_converted": len(errors),
        "ffn_errors": {key: float(f"{error:.4g}") for key, error in errors.items()},
        **figures,
    }
    return row, plan


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | conversion | fewer activated | bits per weight | perplexity (parent) | ratio | KLD | same top-1 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['conversion']} | {r['activated_reduction']:.1%} | {r['bits_per_weight']:.3f} "
        f"| {r['perplexity']:.2f} ({r['baseline_perplexity']:.2f}) | {r['perplexity'] / r['baseline_perplexity']:.3f} "
        f"| {r['kld_mean']:.4f} | {r['top1_agreement']:.3f} |"
        for r in results["rows"]
    ]
    return "\n".join(lines)


def levels_of(plan: Mapping[str, Any], blocks: int) -> str:
    """The changes of fields that repeat a plan, separated by semicolons."""
    means = ",".join(str(plan["mean_experts"].get(str(index), "null")) for index in range(blocks))
    return f"shared={plan['shared']};experts={plan['experts']};mean_experts={means}"


def main() -> None:
    """Run the rows and write the results file after each of them."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--only", help="measure rows whose name this regular expression finds")
    args = parser.parse_args()
    results = measuring.head(args)

    def run(model: Path, name: str, recipe: str, changes: tuple[str, ...]) -> dict[str, Any]:
        row, plan = measure(model, name, recipe_of(recipe, changes, args), args)
        results["rows"].append(row)
        print(table({"rows": [row]}).splitlines()[-1], flush=True)
        measuring.keep(results, args.output)
        return plan

    for model in args.model:
        blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        plans = {}
        for budget in _BUDGETS:
            plans[budget] = run(
                model, f"LaDiMo, {budget:.0%}", "ladimo", (f"activated_reduction={budget}",)
            )
        for budget in _BUDGETS:
            told = (levels_of(plans[budget], blocks), "teaching=none")
            run(model, f"static pruning, {budget:.0%}", "static", told)
        chosen = plans[0.2]
        everywhere = f"shared={chosen['shared']};experts={chosen['experts']};mean_experts={chosen['everywhere']}"
        for name, recipe, changes in rows(levels_of(chosen, blocks), everywhere):
            if not args.only or re.search(args.only, name):
                run(model, name, recipe, changes)


if __name__ == "__main__":
    main()
