"""Tensors that text does not pass (towers, projectors), and modules that the model has no place for
(MTP heads): copied bit for bit, some at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from quantize.conversion.plan import Plan
from quantize.files.headers import tensor_headers

_PART_BYTES = 1 << 28
"""Of tensors that are written together: they are in memory at once, and a block of the models that
have towers takes more."""


def part_sizes(plan: Plan) -> list[int]:
    """Bytes of every part."""
    sizes = _sizes(plan)
    return [sum(sizes[name] for name in part) for part in _parts(plan)]


def tensors_beside(plan: Plan) -> Iterator[dict[str, Tensor]]:
    """The tensors of every part by their names in the output, as they are stored."""
    for part in _parts(plan):
        yield {written: plan.source.stored.tensor(name) for name, written in part.items()}


def _parts(plan: Plan) -> list[dict[str, str]]:
    """What is copied, in parts that fit into memory: names on the disk → names in the output."""
    parts: list[dict[str, str]] = []
    sizes, size = _sizes(plan), _PART_BYTES
    for name, written in plan.source.kept_names(plan.arch.beside).items():
        if size >= _PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = written
        size += sizes[name]
    return parts


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes of every stored tensor; none are looked up where nothing is copied."""
    copied = plan.arch.beside or plan.source.leftovers.carried
    headers = tensor_headers(plan.source.stored) if copied else {}
    return {name: header.bytes for name, header in headers.items()}
