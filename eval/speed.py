"""Time of `pq eval` against a plain transformers forward over the same tokens, as ratios in one run.

    python eval/speed.py --parent DIR --text FILE MODEL [MODEL …]

The plain forward computes all logits and nothing more; pq also reads the text, streams the weights, unpacks them,
emulates the kernel and scores every token. Rounds alternate, and the median of the ratios is printed with their range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from quantize.calibration.tokens import evaluation_tokens
from quantize.evaluation import evaluate
from quantize.model.tokenizer import load_tokenizer


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--parent", type=Path, required=True)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    parent = AutoModelForCausalLM.from_pretrained(args.parent, dtype=torch.float32)
    tokens = evaluation_tokens(
        load_tokenizer(args.parent), dataset=args.text, seqlen=args.seqlen, max_windows=args.windows
    ).tokens
    batches = torch.split(tokens, max(1, 4096 // args.seqlen))

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            parent(batch, use_cache=False)

    def ours(model: Path) -> None:
        evaluate(model, None, dataset=args.text, seqlen=args.seqlen, max_windows=args.windows)

    plain()
    ratios: dict[Path, list[float]] = {model: [] for model in args.models}
    for model in args.models:
        ours(model)  # imports and disk cache
    for _ in range(args.rounds):
        base = seconds(plain)
        for model in args.models:
            ratios[model].append(seconds(lambda model=model: ours(model)) / base)  # type: ignore[misc]
    for model, found in ratios.items():
        print(
            f"{model.name}: {statistics.median(found):.2f}x plain forward ({min(found):.2f} … {max(found):.2f})"
        )


if __name__ == "__main__":
    main()
