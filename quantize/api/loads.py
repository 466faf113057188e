"""`quantize.load`: a checkpoint and its tokenizer, ready to generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.api.html import table
from quantize.api.places import (
    Say,
    local_model,
    pick_device,
    pick_dtype,
    quiet_libraries,
    silent,
)
from quantize.files.hub_origin import called
from quantize.formats.engines import TRANSFORMERS
from quantize.inspect.engines import loadings
from quantize.model.dequantized import open_source
from quantize.model.load import load_model
from quantize.model.load_others import load_others, of_others
from quantize.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model in memory; `model, tokenizer = quantize.load(…)` takes it apart."""

    name: str
    model: Any = field(repr=False)
    """A torch module: transformers' own, its packed linears computing from their packed form."""
    tokenizer: Any = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    """Of activations."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    @property
    def memory_bytes(self) -> int:
        """Bytes of all its tensors, each counted once."""
        held = (*self.model.parameters(), *self.model.buffers())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    def _repr_html_(self) -> str:
        rows = [
            ["class", type(self.model).__name__],
            ["in memory", f"{self.memory_bytes / 1e6:.1f} MB"],
            ["device", str(self.device)],
            ["dtype", str(self.dtype).removeprefix("torch.")],
        ]
        return table(self.name, rows)


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    say: Say = silent,
) -> Loaded:
    """Load a model, packed or not, as transformers serves it, and its tokenizer.

    model: a folder, or a Hub id (`org/name`, `org/name@REVISION`). dtype: that of activations; auto:
    float32 on a CPU, bfloat16 on an accelerator. What transformers cannot load as it is (GGUF) is
    dequantized. Raises subclasses of `quantize.errors.PqError`.
    """
    quiet_libraries()
    place = pick_device(device)
    computing = pick_dtype(dtype, place)
    folder = local_model(model, revision, say)
    tokenizer = load_tokenizer(folder)
    found = _served(folder, place, computing)
    return Loaded(called(folder), found, tokenizer, place, computing)


def is_served(folder: Path) -> bool:
    """Whether transformers loads a checkpoint as it is, as far as pq knows; it is taken to load what
    others quantized and pq does not read."""
    if of_others(open_source(folder)):
        return True
    found = loadings(folder).engines
    return any(one.loads for one in found if one.engine == str(TRANSFORMERS))


def _served(folder: Path, place: torch.device, dtype: torch.dtype) -> Any:
    if is_served(folder):
        return load_others(folder, place, dtype)
    return load_model(folder, place, dtype, "stock")
