"""Modules in the place of others for a while: trials of what linears or an FFN could become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from quantize.model.hadamard import rotate_inputs, rotates_inputs


@contextmanager
def stand_in(layer: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let modules compute in the places of submodules of a decoder layer. modules: by the name of
    the submodule.

    Where a linear rotates its inputs, so does its stand-in. When the context ends, however it does,
    the layer is as it was.
    """
    own = {name: layer.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            if rotates_inputs(own[name]) and not rotates_inputs(module):
                module.register_forward_pre_hook(rotate_inputs)
            layer.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            layer.set_submodule(name, module)
