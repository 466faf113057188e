"""Run inside vLLM's environment, as a script: what the real engine makes of checkpoints.

    vllm_engine.py ASKED.json    where ASKED is {name: [folder, dtype, [[token, …], …]]}

For each model a line `FOUND {"model": name, "logprobs": [[…], …]}` with the log probability of every
token of each window but its first, or `{"model": name, "refused": "the engine's message"}`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

_MEMORY = 100_000_000
"""Bytes of the KV cache: some thousand tokens of a small model."""


def logprobs(folder: str, dtype: str, windows: list[list[int]]) -> list[list[float]]:
    """Of every token but the first of each window."""
    from vllm import LLM, SamplingParams

    length = max(map(len, windows))
    llm = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=length + 1,
        enforce_eager=True,
        kv_cache_memory_bytes=_MEMORY,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    answers = llm.generate(
        [{"prompt_token_ids": window} for window in windows], asked, use_tqdm=False
    )
    out = []
    for window, answer in zip(windows, answers, strict=True):
        found: Any = answer.prompt_logprobs
        out.append([found[i][token].logprob for i, token in enumerate(window) if i])
    return out


def main() -> None:
    """Run as a script."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    from vllm.distributed import cleanup_dist_env_and_memory

    for name, (folder, dtype, windows) in asked.items():
        found: dict[str, Any] = {"model": name}
        try:
            found["logprobs"] = logprobs(folder, dtype, windows)
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, TypeError) as err:
            found["refused"] = f"{type(err).__name__}: {err}"
        sys.stdout.write(f"FOUND {json.dumps(found)}\n")
        sys.stdout.flush()
        gc.collect()
        cleanup_dist_env_and_memory(shutdown_ray=False)


if __name__ == "__main__":
    main()
