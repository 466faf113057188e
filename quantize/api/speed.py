"""How fast a checkpoint writes here."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import torch

from quantize.api.loads import is_served, load
from quantize.model.transformers_generate import continuation

_PROMPT, _WARM, _COUNTED = 16, 4, 24


def tokens_per_second(folder: Path, device: torch.device, dtype: torch.dtype) -> float | None:
    """Tokens a second of one sequence that the model writes in transformers, the prompt not counted:
    the median of some after the first few. None for what transformers does not load as it is, whose
    speed would be that of another model."""
    if not is_served(folder):
        return None
    model, tokenizer = load(folder, device=device, dtype=dtype)
    prompts = torch.arange(_PROMPT, device=device)[None] % max(1, len(tokenizer))
    ends: list[float] = []

    def tick() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    continuation(model, prompts, _WARM + _COUNTED, 0, tick=tick)
    counted = ends[_WARM - 1 :]
    return 1 / statistics.median(b - a for a, b in itertools.pairwise(counted))
