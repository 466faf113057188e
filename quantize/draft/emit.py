"""What engines are told: vLLM's `--speculative-config` and the lines around it.

Checked against vLLM 0.32 (`vllm/config/speculative.py`), whose draft models need the parent's
vocab_size, run with its tensor parallelism, and are by default sampled greedily, which at T > 0
accepts p(argmax q) of the tokens instead of Σ min(p, q): `probabilistic` is always written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantize.draft.lookup import NGRAM
from quantize.draft.pays import Pay
from quantize.draft.replay import Array
from quantize.errors import UsageError

_LAST = 1 << 20
"""End of the last range of batch sizes: above any --max-num-seqs."""


def speculative_config(
    draft: Path | None,
    gamma: int,
    *,
    by_batch: Sequence[tuple[int, int, int]] = (),
    same_vocabulary: bool = True,
    synthetic: Sequence[float] = (),
) -> dict[str, Any]:
    """The JSON object of `--speculative-config`.

    draft: None is prompt lookup. gamma: tokens, at least 1. by_batch: (from, to, tokens) of batch
    sizes, see `lengths_by_batch`. same_vocabulary: whether both config.json have one vocab_size;
    without it vLLM translates between vocabularies, which it does for greedy drafts alone.
    synthetic: accept the token at each position with these unconditional chances instead of checking
    it, to time an engine at a predicted acceptance.
    UsageError for a length below 1.
    """
    if gamma < 1:
        raise UsageError("no length is faster than no draft here; there is nothing to emit")
    if draft is None:
        found: dict[str, Any] = {
            "method": "ngram",
            "num_speculative_tokens": gamma,
            "prompt_lookup_max": NGRAM,
            "prompt_lookup_min": 1,
        }
    else:
        found = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": gamma}
        if same_vocabulary:
            found["draft_sample_method"] = "probabilistic"
        else:
            found["use_heterogeneous_vocab"] = True
    if by_batch:
        found["num_speculative_tokens_per_batch_size"] = [list(entry) for entry in by_batch]
    if synthetic:
        found["rejection_sample_method"] = "synthetic"
        found["synthetic_acceptance_rates"] = [round(rate, 4) for rate in synthetic]
    return found


def lengths_by_batch(found: Sequence[Pay]) -> tuple[list[tuple[int, int, int]], int]:
    """(ranges of batch sizes with their tokens, largest tokens) by the best lengths of some sizes: each
    holds up to the next. vLLM 0.32 fails on a length of 0 (issue 49548), so that 1 stands for it."""
    ranges: list[tuple[int, int, int]] = []
    ordered = sorted(found, key=lambda pay: pay.batch)
    for index, pay in enumerate(ordered):
        first = 1 if index == 0 else ordered[index - 1].batch + 1
        last = pay.batch if index + 1 < len(ordered) else _LAST
        gamma = max(1, pay.gamma)
        if ranges and ranges[-1][2] == gamma:
            ranges[-1] = (ranges[-1][0], last, gamma)
        else:
            ranges.append((first, last, gamma))
    return ranges, max(entry[2] for entry in ranges)


def serve_line(parent: str, config: dict[str, Any], tp: int = 1) -> str:
    """The command that serves the parent with its draft."""
    text = json.dumps(config, separators=(",", ":"))
    parallel = f" --tensor-parallel-size {tp}" if tp > 1 else ""
    return f"vllm serve {parent}{parallel} --speculative-config '{text}'"


def accepted_at(accept: Sequence[Array], gamma: int) -> list[float]:
    """Chance that a step accepts at least its first 1, 2, … γ drafted tokens: what engines print by
    position, and `synthetic_acceptance_rates`."""
    reached = np.zeros(gamma)
    total = 0.0
    for values in accept:
        a = values.tolist()
        T = len(a)
        begins = np.zeros(T + gamma + 2)
        begins[0] = 1.0
        for t in range(T - gamma):  # steps that are not cut short by the end
            here = float(begins[t])
            total += here
            for k in range(gamma):
                begins[t + k + 1] += here * (1 - a[t + k])
                here *= a[t + k]
                reached[k] += here
            begins[t + gamma + 1] += here
    return (reached / total).tolist() if total else []
