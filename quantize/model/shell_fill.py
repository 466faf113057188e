"""Random tensors for a model that has none, which its modules get when they are called."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

_ROWS = 1 << 24
"""Rows of tables whose values do not matter: more than any position or token."""


class NoHead(nn.Identity):
    """Stands in for a head that is not needed; models ask for the dtype of its weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=dtype)


def note_used(root: nn.Module, used: list[str], without: Collection[str]) -> None:
    """From now on add to `used` the names of modules with parameters, but for those `without`, as they
    are called first."""

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            if name not in used:
                used.append(name)

        return note

    for name, module in root.named_modules():
        if name not in without and any(p is not None for p in module._parameters.values()):
            module.register_forward_hook(noting(name))


def filled(
    shell: Any,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    spoiled: Collection[str] = (),
) -> Any:
    """The same shell, whose modules get tensors of random values, or NaN, when they are called
    first."""
    draw = torch.Generator().manual_seed(seed)
    nan = {shell.get_submodule(name) for name in spoiled}

    def fill(module: nn.Module, args: Any) -> None:
        for name, held in module._parameters.items():
            if held is not None and held.is_meta:
                shape = list(held.shape)
                table = isinstance(module, nn.Embedding)
                if table:
                    module.padding_idx = None  # type: ignore[assignment]
                made = torch.randn([1, *shape[1:]] if table else shape, generator=draw)
                made = (made * float("nan") if module in nan else made).to(device, dtype)
                # All rows of a table are one, which takes no memory.
                made = made.expand(_ROWS, *shape[1:]) if table else made
                module._parameters[name] = nn.Parameter(made, requires_grad=False)

    for module in shell.modules():
        if module._parameters:
            module.register_forward_pre_hook(fill)
    return shell
