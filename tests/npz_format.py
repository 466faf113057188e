"""An output format that pq does not have, with an encoding of its own: one NumPy archive.

All of it is in this file: what it holds, its tensors, its part of config.json, its files and its
reader. Tests add it to the registry; nothing else of the project knows of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.errors import VerifyError
from quantize.files.encoding import Encoding
from quantize.files.transaction import Transaction
from quantize.formats.output import Asking, Finished, OutputFormat, Section
from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import AnyScheme, Packed

WEIGHTS = "weights.npz"


class Npz(OutputFormat):
    name = "npz"
    about = "loads in NumPy"

    def problems(self, stages: Sequence[Asking]) -> Iterator[tuple[int, str, str]]:
        yield from super().problems(stages)
        for index, stage in enumerate(stages):
            if getattr(stage, "bits", 4) > 4:
                yield index, "bits", "has no place in 'format: npz'; take 4 or less"

    def losses(
        self,
        attention: bool,
        experts: Collection[AnyScheme | None],
        unloadable: Sequence[str] = (),
    ) -> list[str]:
        return ["NumPy has no INT4 cache"] if attention else []

    def tensors(
        self,
        packed: Mapping[str, Packed],
        plain: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        out = {name: tensor.float() for name, tensor in plain.items()}
        for name, weight in packed.items():
            out |= {f"{name}.codes.{part}": tensor for part, tensor in weight.tensors().items()}
        return out

    def config_section(self, model: Finished) -> dict[str, Any] | None:
        linears = {name: [scheme.bits, scheme.group_size] for name, scheme in model.schemes.items()}
        return {"quant_method": self.name, "linears": linears}

    def side_files(self, found: Sequence[Path]) -> Sequence[Path]:
        return [path for path in found if path.name.startswith("tokenizer")]

    def encoding(self, parts: int) -> Encoding:
        return Archive(parts)

    def schemes(self, section: Section, linears: Sequence[str]) -> dict[str, AnyScheme]:
        found = {name: IntScheme(*size, False) for name, size in section["linears"].items()}
        return {name: scheme for name, scheme in found.items() if name in linears}


class Archive:
    """Parts wait in files of their own until the last one is there."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._written: list[str] = []
        self._total = 0

    @property
    def total_size(self) -> int:
        return self._total

    @property
    def progress(self) -> dict[str, Any]:
        return {"parts": self._written, "total": self._total}

    def restore(self, written: Mapping[str, Any]) -> None:
        self._written, self._total = list(written["parts"]), written["total"]

    def add(self, files: Transaction, tensors: Mapping[str, Tensor]) -> None:
        name = f"part-{len(self._written)}.npz"
        _save(files, name, {key: _array(tensor) for key, tensor in tensors.items()})
        self._written.append(name)
        self._total += sum(tensor.nbytes for tensor in tensors.values())

    def finish(
        self, files: Transaction, config: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        assert len(self._written) == self._parts
        whole = {"model_type": np.array(config["model_type"])}
        for name in self._written:
            whole |= dict(np.load(files.folder / name))
        _save(files, WEIGHTS, whole)
        for name in self._written:
            files.discard(name)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu().contiguous()
    return np.asarray(tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor)


def _save(files: Transaction, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    def check(path: Path) -> None:
        back = np.load(path)
        same = all(np.array_equal(back[key], arrays[key]) for key in arrays)
        if set(back) != set(arrays) or not same:
            raise VerifyError(f"{path}: reads back differently from what was written")

    files.write(name, lambda path: np.savez(path, **arrays), check)


def read_weights(folder: Path, schemes: Mapping[str, AnyScheme]) -> dict[str, Tensor]:
    """Every tensor in float32, packed linears as their codes make them."""
    arrays = dict(np.load(folder / WEIGHTS))
    arrays.pop("model_type")
    held = {name: torch.from_numpy(array) for name, array in arrays.items()}
    out = {name: tensor for name, tensor in held.items() if ".codes." not in name}
    for name, scheme in schemes.items():
        parts = {suffix: held[f"{name}.codes.{suffix}"] for suffix in scheme.suffixes}
        parts["weight_scale"] = parts["weight_scale"].view(torch.bfloat16)
        out[f"{name}.weight"] = scheme.read(parts).unpack()
    return out
