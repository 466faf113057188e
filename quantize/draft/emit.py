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

from quantize.draft.lookup import NGRAM
from quantize.draft.pays import Pay
from quantize.draft.replay import Array, whole_steps
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


def length_notes(gamma: int, context: int | None, parents: int | None) -> list[str]:
    """What to heed when the server's length is set, a sentence each.

    vLLM 0.32 asks once for a whole batch whether its longest sequence, with the tokens under check and γ
    more, is within the draft's length (`_input_fits_in_drafter`, `vllm/v1/worker/gpu_model_runner.py`);
    where it is not, γ zeros are checked in every sequence and counted as refused (vLLM issues 34734,
    52756). context, parents: tokens that config.json of draft and parent give; None where it does not
    say, or for a draft without a model.
    """
    found = [
        f"set --max-model-len {2 * gamma} tokens above the longest text: vLLM 0.32 drafts for none of "
        f"a batch while its longest sequence is within {2 * gamma} tokens of the end, and counts what "
        "it did not draft as refused"
    ]
    if context is not None and parents is not None and context < parents:
        found.append(
            f"the draft reads {context} tokens, the parent {parents}: while one sequence of a batch is "
            f"longer than {context - 2 * gamma}, none of it gets a draft; set --max-model-len to "
            f"{context} or serve longer texts without a draft"
        )
    return found


def accepted_at(accept: Sequence[Array], gamma: int) -> list[float]:
    """Chance that a step accepts at least its first 1, 2, … γ drafted tokens: what engines print by
    position, and `synthetic_acceptance_rates`. Empty where no text is longer than γ."""
    steps, reached = whole_steps(accept, gamma)
    total = float(steps.sum())
    return (reached.sum(0) / total).tolist() if total else []
