"""A module in the place of another for a while: a trial of what a linear or an FFN could become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def stand_in(layer: nn.Module, name: str, module: nn.Module | None) -> Iterator[None]:
    """Let `module` compute in the place of the submodule `name` of a decoder layer; None: that itself.

    When the context ends, however it does, the layer is as it was.
    """
    own = layer.get_submodule(name)
    try:
        layer.set_submodule(name, own if module is None else module)
        yield
    finally:
        layer.set_submodule(name, own)
