"""Runs vLLM's engine in a process of its own on one checkpoint, and transformers on the same.

    python engine.py REQUEST.json ANSWER.json

A request has `model`, `dtype`, `engine` (arguments of vLLM's LLM) and `runs`: lists of {"prompts": [[token, …], …],
"max_tokens": n, "together": bool}; the answer a list of what each prompt came to: `logprobs` of its own tokens but
the first, and generated `tokens`. With `"by": "transformers"` that library answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parents[1]


def ask(folder: Path, **request: Any) -> list[list[dict[str, Any]]]:
    """What an engine says to a request; AssertionError with its last lines where it fails."""
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps({key: _plain(value) for key, value in request.items()}))
    done = subprocess.run(
        [sys.executable, str(TESTS / "engine.py"), str(asked), str(answered)],
        env=environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    answer: list[list[dict[str, Any]]] = json.loads(answered.read_text())
    return answer


def environment(folder: Path) -> dict[str, str]:
    """Variables for an engine; where no plugin is installed, one of this checkout's, in `folder`."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(plugin(folder)), str(ROOT), str(TESTS)]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "PQ_NO_VERSION_NOTICE": "1",
        "HF_HUB_OFFLINE": "1",
    }


def plugin(folder: Path) -> Path:
    """A folder that declares this checkout's entry point."""
    place = folder / "site" / "pq_vllm-0.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: pq-vllm\nVersion: 0\n")
    (place / "entry_points.txt").write_text("[vllm.general_plugins]\npq = quantize.vllm:register\n")
    return place.parent


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _by_vllm(request: dict[str, Any]) -> list[list[dict[str, Any]]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    settings = {
        "enforce_eager": True,
        "max_model_len": 512,
        "disable_log_stats": False,
    } | request.get("engine", {})
    engine = LLM(model=request["model"], dtype=request["dtype"], **settings)
    answers = []
    for run in request["runs"]:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=run.get("max_tokens", 1),
            ignore_eos=True,
            prompt_logprobs=0 if run.get("logprobs", True) else None,
        )
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in run["prompts"]]
        groups = [prompts] if run.get("together", True) else [[prompt] for prompt in prompts]
        outputs = [
            out for group in groups for out in engine.generate(group, sampling, use_tqdm=False)
        ]
        answers.append([_answer(out) for out in outputs])
    if request.get("facts"):
        from facts import facts

        answers.append([facts(engine)])
    return answers


def _answer(output: Any) -> dict[str, Any]:
    found = output.prompt_logprobs or []
    pairs = list(zip(found, output.prompt_token_ids, strict=False))[1:]
    return {
        "logprobs": [held[token].logprob for held, token in pairs],
        "tokens": list(output.outputs[0].token_ids),
        "cached": output.num_cached_tokens or 0,
    }


def _by_transformers(request: dict[str, Any]) -> list[list[dict[str, Any]]]:
    import torch
    from transformers import AutoModelForCausalLM

    import quantize  # noqa: F401 - pq's format

    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
    answers = []
    for run in request["runs"]:
        out = []
        for prompt in run["prompts"]:
            tokens = torch.tensor([prompt])
            with torch.no_grad():
                shares = model(tokens).logits[0, :-1].float().log_softmax(-1)
                new = run.get("max_tokens", 1)
                grown = model.generate(
                    tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False
                )
            given = shares.gather(1, tokens[0, 1:, None])[:, 0].tolist()
            out.append({"logprobs": given, "tokens": grown[0, len(prompt) :].tolist()})
        answers.append(out)
    return answers


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    by = _by_transformers if asked.get("by") == "transformers" else _by_vllm
    Path(sys.argv[2]).write_text(json.dumps(by(asked)))
