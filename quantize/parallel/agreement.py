"""Whether several processes are about to compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.errors import UsageError
from quantize.parallel.ranks import Ranks


def require_equal(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """UsageError unless all ranks agree on JSON data that decides what they compute."""
    first, *others = ranks.gather(dict(facts))
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                raise UsageError(
                    f"rank {rank} differs from rank 0 in {name}: {_short(other.get(name))} "
                    f"instead of {_short(value)}; start equal commands with equal software on "
                    "equal machines"
                )


def processor(device: torch.device) -> str:
    """What products are computed on: those of different ones may differ in the last bit."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
