"""Models that are published small (FP8, MXFP4), read as the 16-bit models they stand for.

`open_source` gives a checkpoint whose tensors have the names, shapes and dtypes of a plain one;
each is dequantized when it is asked for, a few rows at a time. What the formats are stands in
`quantize/formats/sources/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.files.small import Dequantized
from quantize.formats.registry import open_checkpoint
from quantize.formats.sources.registry import SOURCE_FORMATS, described, source_format_in
from quantize.formats.sources.source import SmallTensor, Stored

_STRIP = 1 << 22
"""Weights that are dequantized at once, as far as rows allow: 16 MB in float32, a few times."""
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def open_source(folder: Path) -> Checkpoint:
    """A checkpoint; one that is stored small in a way that pq reads, as the 16-bit one it stands
    for. Any other quantized one comes as it is, its quantization_config within.

    ModelError as `Checkpoint`, and for tensors that do not fit quantization_config.
    """
    stored = open_checkpoint(folder)
    section: Any = stored.config.get("quantization_config")
    form = source_format_in(section)
    if form is None:
        return stored
    kinds = {name: (stored.dtypes[name], stored.shapes[name]) for name in stored.shapes}
    try:
        return DequantizedCheckpoint(stored, form.stored(section, kinds))
    except ValueError as err:
        raise ModelError(f"{folder}: {form.name} source: {err}") from None


def require_source(source: Checkpoint) -> None:
    """ModelError for a checkpoint that `open_source` found quantized in a way that is not read, or
    FP8 without a word about its scales: it can be no parent."""
    if section := source.config.get("quantization_config"):
        read = ", ".join(form.name for form in SOURCE_FORMATS)
        raise ModelError(
            f"{source.folder}: is quantized already ({described(section)}); give its parent (of "
            f"quantized models pq reads {read})"
        )
    eights = (name for name, dtype in source.dtypes.items() if dtype.startswith("F8_"))
    if name := next(eights, None):
        raise ModelError(
            f"{source.folder}: {name} is {source.dtypes[name]}, but config.json has no "
            "quantization_config that says what it means; give the model's own config.json"
        )


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint as if its small tensors were stored in 16 bits. Hashes, shards and side files
    are those of what is stored.

    Reading raises ModelError for scales that are not positive and values that are not finite.
    """

    def __init__(self, stored: Checkpoint, found: Stored) -> None:
        self.stored = stored
        self.folder, self.shards = stored.folder, stored.shards
        self.notes, self.problems = stored.notes, stored.problems
        self.passed_over = stored.passed_over
        self.config = {k: v for k, v in stored.config.items() if k != "quantization_config"}
        dtype = _dtype_of(self.config)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._small = found.tensors
        parts = {part for tensor in found.tensors.values() for part in tensor.parts}
        hidden = parts | set(found.dropped)
        small = {name: tensor.shape for name, tensor in found.tensors.items()}
        self.shapes = {n: s for n, s in stored.shapes.items() if n not in hidden} | small
        kinds = {n: k for n, k in stored.dtypes.items() if n not in hidden}
        self.dtypes = kinds | dict.fromkeys(small, _DTYPES[dtype])
        places = {n: next(iter(tensor.parts)) for n, tensor in found.tensors.items()}
        self._where = {n: stored._where[places.get(n, n)] for n in self.shapes}
        size = sum((self.folder / shard).stat().st_size for shard in self.shards)
        self.dequantized = Dequantized(found.form, len(small), dtype, len(found.dropped), size)

    def bytes_of(self, name: str) -> float:
        """As `Checkpoint.bytes_of`: of a small tensor, its codes and scales."""
        small = self._small.get(name)
        return sum(map(self.stored.bytes_of, (name,) if small is None else small.parts))

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """As `Checkpoint.rows`; nothing but these entries is dequantized."""
        if name not in self._small:
            self._place(name)  # what is hidden is not there
            return self.stored.rows(name, first, end)
        shape = self.shapes[name]
        if not 0 <= first < end <= shape[0]:
            raise ModelError(
                f"{self.folder}: {name} is {list(shape)} and has no entries {first} to {end}"
            )
        return self._dequantize(name, first, end)

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            self._place(name)
            if name in self._small:
                yield name, self._dequantize(name, 0, self.shapes[name][0])
            else:
                yield name, self.stored.tensor(name)

    def _dequantize(self, name: str, first: int, end: int) -> Tensor:
        small: SmallTensor = self._small[name]
        out = torch.empty((end - first, *small.shape[1:]), dtype=self._dtype)
        at_once = max(1, _STRIP // max(1, math.prod(small.shape[1:])))
        for start in range(first, end, at_once):
            stop = min(start + at_once, end)
            try:
                values = small.values(start, stop, self.stored).to(self._dtype)
            except ValueError as err:
                raise ModelError(f"{self.folder}: {name}: {err}") from None
            if not torch.isfinite(values).all():
                raise ModelError(
                    f"{self.folder}: {name}: codes times scales are more than {self._dtype} holds; "
                    "the source checkpoint is broken"
                )
            out[start - first : stop - first] = values
        return out


def _dtype_of(config: dict[str, Any]) -> str:
    """The dtype that config.json says weights have in 16 bits; bfloat16 where it says none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(said := part.get(key), str) and said.removeprefix("torch.") in _DTYPES:
                return said.removeprefix("torch.")
    return "bfloat16"
