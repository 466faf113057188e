"""What the parent writes after the prompts, from which everything else follows.

Speculative decoding gives text distributed as the parent's own, whatever the draft. One rollout of
the parent is therefore a sample of what any draft would be checked on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from quantize.draft.prompts import Prompt
from quantize.errors import DataError
from quantize.files.disk import write_text
from quantize.files.strict_json import parse
from quantize.model.transformers_generate import continuation

Progress = Callable[[str, int, int], None]
_TOGETHER = 32
"""Prompts of equal length that are continued together: enough for products of a useful size, and
little memory for their cache."""


@dataclass(frozen=True)
class Rollout:
    """Prompts and what the parent wrote after each."""

    temperature: float
    """0: the likeliest token always."""
    prompts: tuple[Prompt, ...]
    tokens: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Tokens written."""
        return sum(map(len, self.tokens))


def roll_out(
    model: Any,
    prompts: Sequence[Prompt],
    count: int,
    temperature: float,
    *,
    seed: int,
    stop: Sequence[int],
    vocab: int,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Rollout:
    """Let the model write up to `count` tokens after each prompt; `stop` ends a text.

    What is drawn depends on the seed, the prompts and how many there are. DataError where nothing
    was written.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    batches: list[list[int]] = []
    for _, group in groupby(order, key=lambda index: len(prompts[index].ids)):
        alike = list(group)
        batches += [alike[at : at + _TOGETHER] for at in range(0, len(alike), _TOGETHER)]
    generator = torch.Generator(device).manual_seed(seed)
    written: dict[int, tuple[int, ...]] = {}
    done, total = 0, count * len(batches)

    def tick() -> None:
        nonlocal done
        done += 1
        progress("parent writes", done, total)

    for number, batch in enumerate(batches):
        ids = torch.tensor([prompts[index].ids for index in batch], device=device)
        out = continuation(model, ids, count, temperature, generator, stop, vocab, tick)
        done = (number + 1) * count
        for index, row in zip(batch, out.tolist(), strict=True):
            written[index] = tuple(token for token in row if token >= 0)
    return Rollout(temperature, tuple(prompts), tuple(written[i] for i in range(len(prompts))))


def save_rollouts(rollouts: Sequence[Rollout], parent: str, path: Path) -> None:
    """Write rollouts for later runs with other drafts; OutputError."""
    facts = {
        "parent": parent,
        "rollouts": [
            {
                "temperature": rollout.temperature,
                "texts": [
                    {"domain": p.domain, "prompt": list(p.ids), "tokens": list(tokens)}
                    for p, tokens in zip(rollout.prompts, rollout.tokens, strict=True)
                ],
            }
            for rollout in rollouts
        ],
    }
    write_text(path, json.dumps(facts) + "\n")


def read_rollouts(path: Path) -> list[Rollout]:
    """Rollouts that `save_rollouts` wrote, or that another engine's output was put into; DataError
    for a file of another form."""
    try:
        facts = parse(path.read_text(encoding="utf-8"))
        return [
            Rollout(
                float(entry["temperature"]),
                tuple(
                    Prompt(str(t["domain"]), tuple(map(int, t["prompt"]))) for t in entry["texts"]
                ),
                tuple(tuple(map(int, t["tokens"])) for t in entry["texts"]),
            )
            for entry in facts["rollouts"]
        ]
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror}); give a saved rollout") from None
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{path}: is no rollout ({err}); pq draft --save-rollout writes one"
        ) from None
