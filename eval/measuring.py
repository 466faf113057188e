"""What the scripts of this folder have in common: their arguments, and the head of a results file."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import quantize


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments of every script that converts models and measures them against their parents."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", type=Path, action="append", required=True)
    made.add_argument("--calibration", default="builtin")
    made.add_argument("--text", default="builtin")
    made.add_argument("--nsamples", type=int, default=128)
    made.add_argument("--seqlen", type=int, default=512)
    made.add_argument("--windows", type=int, default=60)
    made.add_argument("--output", type=Path, help="results file")
    return made


def head(args: argparse.Namespace) -> dict[str, Any]:
    """Protocol, machine and versions, without which a figure says nothing."""
    return {
        "protocol": f"strided-{args.seqlen}, {args.windows} windows of {Path(args.text).name}; "
        "parent and model in float32; "
        f"calibrated on {args.nsamples} x {args.seqlen} tokens of {Path(args.calibration).name}; "
        "KLD = mean KL(parent || quantized) in nats; lm_head and embeddings stay 16-bit",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "pq": quantize.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [],
    }


def keep(results: dict[str, Any], output: Path | None) -> None:
    """Write the results file; called after each row, so that a stopped run keeps what it measured."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
