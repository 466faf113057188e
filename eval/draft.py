"""Drafts of one parent: acceptance, tokens per step, policies and bursts, into a results file.

    python eval/draft.py --target PARENT --text FILE --other FILE --cost .53 --output eval/results/draft.json DRAFT ...

The parent writes after prompts of both texts; figures are of both together, by text too. The policy
fitted on one text is compared with the best static length of that text on the other. A cost ratio
stands for the latency model where the parent is a small stand-in: .53 is what that model gives a W4
copy of an 8B model on an H100 at batch 1.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import measuring  # the script beside this one
import torch

from quantize.draft.analysis import analyse, as_json
from quantize.draft.fit import carried_over
from quantize.draft.policies import Costs
from quantize.draft.run import CACHE, Measurement, Settings, measure
from quantize.draft.trace import Trace

_LEFT_OUT = ("worst", "curves", "by_position", "domains")
"""Of JSON that a results file does without."""


def trimmed(data: Any) -> Any:
    """JSON data with six digits, and without what is for pages."""
    if isinstance(data, dict):
        return {key: trimmed(value) for key, value in data.items() if key not in _LEFT_OUT}
    if isinstance(data, list | tuple):
        return [trimmed(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def across(found: Measurement, costs: Costs) -> list[dict[str, Any]]:
    """Policies fitted on one text and tried on the other, both ways."""
    rows = []
    for figures, traces in zip(found.drafts, found.traces, strict=False):
        for trace in traces:
            parts = by_text(trace)
            for one in parts:
                for other in parts:
                    if one == other:
                        continue
                    fit = carried_over(parts[one], parts[other], costs)
                    rows.append(
                        {
                            "draft": figures.name,
                            "temperature": trace.temperature,
                            "fitted_on": one,
                            "tried_on": other,
                            "static": fit.static.name,
                            "static_speed_up": fit.static_speed_up.value,
                            "fitted_speed_up": fit.fitted_speed_up.value,
                            "gain": [fit.gain.value, fit.gain.low, fit.gain.high],
                            "wins": fit.wins,
                        }
                    )
    return rows


def by_text(trace: Trace) -> dict[str, Trace]:
    """The parts of a trace by data set."""
    names = [prompt.domain for prompt in trace.rollout.prompts]
    return {
        name: trace.only([i for i, n in enumerate(names) if n == name])
        for name in dict.fromkeys(names)
    }


def main() -> None:
    """Run as a script."""
    arguments = measuring.draft_parser(__doc__ or "", prompts=32, tokens=160)
    arguments.add_argument("--other")
    arguments.add_argument("--temperature", type=float, action="append")
    arguments.add_argument("--cost", type=float, default=0.53)
    arguments.add_argument("--kv-int4", action="store_true")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    begun = time.time()
    settings = Settings(
        tuple(text for text in (args.text, args.other) if text),
        args.prompts,
        64,
        args.tokens,
        temperatures=tuple(args.temperature or (0.0, 1.0)),
        kv_int4=args.kv_int4,
    )
    found = measure(args.target, args.drafts, settings)
    measured = time.time() - begun
    names = [figures.name for figures in found.drafts]
    cache = names.index(CACHE) if CACHE in names else None
    analysis = analyse(found, args.target, cost=args.cost, policies=True, cache=cache)
    results = {
        "machine": f"{platform.machine()}, 1 thread",
        "versions": measuring.versions(),
        "seconds": {"measured": measured, "all": time.time() - begun},
        **as_json(analysis),
        "fitted_on_other_text": across(found, Costs(args.cost)) if args.other else [],
    }
    results["settings"]["datasets"] = [Path(text).name for text in settings.datasets]
    for draft in results["drafts"]:
        draft.pop("command"), draft.pop("speculative_config")
    text = json.dumps(trimmed(results), indent=1) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
