"""Perplexity of checkpoints by vLLM's engine beside transformers, and how far their log-probabilities lie apart.

    python eval/vllm_table.py --vllm .venv-vllm/bin/python --text FILE --output eval/results/vllm.json DIR:DTYPE …

Run with pq's own Python; the engine runs in the other, where the plugin is installed. Each half runs in a process of
its own, since an engine keeps its choices for as long as it lives.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WINDOW = 256
"""Tokens of a prompt."""


def main() -> None:
    """Measure every checkpoint and write one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="DIR:DTYPE")
    parser.add_argument("--vllm", required=True, help="Python of vLLM's environment")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--compiled", action="store_true", help="let the engine use torch.compile")
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for checkpoint in given.checkpoints:
        place, _, dtype = checkpoint.rpartition(":")
        request = {
            "model": str(Path(place).resolve()),
            "dtype": dtype,
            "text": str(given.text.resolve()),
            "windows": given.windows,
            "eager": not given.compiled,
        }
        wanted = _measure(sys.executable, request | {"by": "transformers"})
        found = _measure(given.vllm, request | {"by": "vllm"})
        apart = [abs(a - b) for a, b in zip(wanted, found, strict=True)]
        rows.append(
            {
                "checkpoint": Path(place).name,
                "dtype": dtype,
                "compiled": given.compiled,
                "tokens": len(apart),
                "perplexity": {"transformers": _perplexity(wanted), "vllm": _perplexity(found)},
                "difference": {"mean": sum(apart) / len(apart), "max": max(apart)},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


def _perplexity(shares: list[float]) -> float:
    return math.exp(-sum(shares) / len(shares))


def _measure(python: str, request: dict[str, Any]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps(request))
        quiet = {
            "PQ_NO_VERSION_NOTICE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        command = [python, __file__, "--half", str(asked), str(answered)]
        subprocess.run(command, check=True, env=quiet | os.environ)
        found: list[float] = json.loads(answered.read_text())
        return found


def _half(asked: Path, answered: Path) -> None:
    request = json.loads(asked.read_text())
    by = _by_vllm if request["by"] == "vllm" else _by_transformers
    answered.write_text(json.dumps(by(request, _prompts(request))))


def _prompts(request: dict[str, Any]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{request['model']}/tokenizer.json")
    ids = tokenizer.encode(Path(request["text"]).read_text(encoding="utf-8")).ids
    last = min(len(ids) // WINDOW, request["windows"]) * WINDOW
    return [ids[first : first + WINDOW] for first in range(0, last, WINDOW)]


def _by_transformers(request: dict[str, Any], prompts: list[list[int]]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    import quantize  # noqa: F401 - pq's format

    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
    out: list[float] = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            shares = model(tokens).logits[0, :-1].float().log_softmax(-1)
        out += shares.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return out


def _by_vllm(request: dict[str, Any], prompts: list[list[int]]) -> list[float]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=request["model"],
        dtype=request["dtype"],
        enforce_eager=request["eager"],
        max_model_len=2 * WINDOW,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    out: list[float] = []
    for answer in engine.generate(asked, sampling, use_tqdm=False):
        pairs = zip(answer.prompt_logprobs, answer.prompt_token_ids, strict=True)
        out += [held[token].logprob for held, token in pairs if held is not None]
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["--half"]:
        _half(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
