"""The blocks of a model, seen in one pass: members of a list of modules that take and give a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Record:
    """What one pass gave to and took from each block."""

    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = field(
        default_factory=list
    )

    def change(self, block: nn.Module) -> float:
        """‖out − in‖ / ‖in‖ of a block, the mean over its calls; NaN where they are of two shapes."""
        found = []
        for module, args, kwargs, out in self.calls:
            if module is block:
                before, after = stream(args, kwargs), first_tensor(out)
                if before is not None and after is not None and before.shape == after.shape:
                    found.append(float((after - before).norm() / before.norm()))
        return sum(found) / len(found) if found else float("nan")


@dataclass(frozen=True)
class Blocks:
    """Name and module of each block, in the order of their first calls."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @contextmanager
    def recorded(self) -> Iterator[Record]:
        """Record the calls of the blocks in the passes of this context."""
        record = Record()

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            before = stream(args, kwargs)
            if before is not None and not args:
                kwargs = dict(kwargs)
            record.calls.append((module, args, kwargs, out))

        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self.modules]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()


def find_blocks(model: nn.Module, run: Callable[[], object]) -> Blocks:
    """Members of the longest outermost list of modules of which all take and give hidden states in `run`."""
    candidates: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in candidates)
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) and not inside:
            # Lists of rotary embeddings, linears and the like are none of blocks.
            children = [(key, child) for key, child in module.named_children()]
            if children and all(is_block_like(child) for _, child in children):
                candidates[name] = [(f"{name}.{key}", child) for key, child in children]
    ran: list[nn.Module] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        before, after = stream(args, kwargs), first_tensor(out)
        if before is not None and after is not None and before.ndim >= 3 and module not in ran:
            ran.append(module)

    handles = [
        child.register_forward_hook(hook, with_kwargs=True)
        for children in candidates.values()
        for _, child in children
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    # Lists of lists (stacks that are called in turns) leave several; all that ran are blocks.
    called = [
        (child_name, child)
        for children in candidates.values()
        if any(child in ran for _, child in children)
        for child_name, child in children
        if child in ran
    ]
    called.sort(key=lambda entry: ran.index(entry[1]))
    return Blocks(tuple(name for name, _ in called), tuple(child for _, child in called))


def is_block_like(module: nn.Module) -> bool:
    """Whether a module has both parameters and modules in it."""
    return next(module.parameters(), None) is not None and next(module.children(), None) is not None


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states that a call is given: its first tensor of floating point."""
    for value in (*args, kwargs.get("hidden_states"), kwargs.get("x")):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def first_tensor(out: Any) -> Tensor | None:
    """A tensor, or the first one of a tuple or mapping."""
    if isinstance(out, Tensor):
        return out
    values = (
        out.values() if hasattr(out, "values") else out if isinstance(out, tuple | list) else ()
    )
    return next((value for value in values if isinstance(value, Tensor)), None)
