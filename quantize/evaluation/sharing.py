"""What the ranks of one evaluation share before they measure."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quantize.evaluation.protocols import Windows
from quantize.files.hub_origin import called
from quantize.model.dequantized import open_source
from quantize.parallel.agreement import processor, require_equal
from quantize.parallel.ranks import Ranks
from quantize.version import __version__


def shared_windows(ranks: Ranks, load: Callable[[], Windows]) -> Windows:
    """The text, which the first rank reads and cuts."""
    mine = load() if ranks.first else None
    facts = ranks.tell(
        None if mine is None else [mine.source, mine.sha256, mine.words, mine.utf8_bytes]
    )
    tensors = ranks.tensors(
        None if mine is None else {"inputs": mine.inputs, "targets": mine.targets}
    )
    return mine or Windows(tensors["inputs"], tensors["targets"], *facts)


def require_alike(
    ranks: Ranks,
    device: torch.device,
    folders: Sequence[Path],
    settings: dict[str, Any],
    *more: str,
) -> None:
    """UsageError unless all ranks measure equal models, in the same way and with
    equal software and machines.

    settings: JSON data by name. more: libraries beside torch and transformers.
    """
    if ranks.size == 1:
        return
    facts = {
        "pq": __version__,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", *more)
        },
        "device": device.type,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "models": [called(folder) for folder in folders],
        "sizes of the models": [_sizes(folder) for folder in folders],
    }
    require_equal(ranks, facts | settings)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        name: (folder / name).stat().st_size
        for name in ("config.json", *open_source(folder).shards)
    }
