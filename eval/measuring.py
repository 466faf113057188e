"""What the scripts of this folder have in common: their arguments, and the head of a results file."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantize
from quantize.evaluation.protocols import Protocol
from quantize.model.tokenizer import load_tokenizer


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


def draft_parser(description: str, prompts: int, tokens: int) -> argparse.ArgumentParser:
    """Arguments of every script that measures drafts of one parent; prompts, tokens: how many prompts
    there are, and how many tokens the parent writes after each, where nothing else is asked for."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("drafts", nargs="+", type=Path)
    made.add_argument("--target", type=Path, required=True, help="the parent")
    made.add_argument("--text", default="builtin")
    made.add_argument("--prompts", type=int, default=prompts)
    made.add_argument("--tokens", type=int, default=tokens)
    made.add_argument("--output", type=Path, help="results file")
    return made


def head(args: argparse.Namespace) -> dict[str, Any]:
    """Protocol, machine and versions, without which a figure says nothing."""
    return {
        "protocol": f"{_protocols(args.model, args.seqlen)}, {args.windows} windows of {Path(args.text).name}; "
        "parent and model in float32; "
        f"calibrated on {args.nsamples} x {args.seqlen} tokens of {Path(args.calibration).name}; "
        "KLD = mean KL(parent || quantized) in nats; lm_head and embeddings stay 16-bit",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "rows": [],
    }


def versions() -> dict[str, str]:
    """Releases that a figure may depend on."""
    return {
        "pq": quantize.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _protocols(models: Sequence[Path], seqlen: int) -> str:
    """The protocols that `evaluate` measures these models by: with BOS where the tokenizer adds it."""
    plain = Protocol("strided", seqlen)
    names = [plain.with_bos(load_tokenizer(model), "auto").name for model in models]
    return " and ".join(dict.fromkeys(names))


def keep(results: dict[str, Any], output: Path | None) -> None:
    """Write the results file; called after each row, so that a stopped run keeps what it measured."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
