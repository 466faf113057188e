"""Linears that transformers keeps as `Conv1D` (GPT-2), whose weight is [inputs, outputs].

In pq's models a linear stands in the place of each; weights are turned when they are read, and turned
back where they are written as they are. Packed ones are written as of any other linear.
"""

from __future__ import annotations

from torch import nn

from quantize.model.transformers_api import is_conv1d


class FromConv1D(nn.Linear):
    """A linear in the place of a `Conv1D`, of which stock transformers knows no packed form."""


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Full names of the weights that are stored [inputs, outputs], of a model as transformers builds
    it."""
    return frozenset(f"{name}.weight" for name, m in model.named_modules() if is_conv1d(m))


def place_linears(model: nn.Module) -> None:
    """Put linears in the places of all `Conv1D`, on the meta device; biases stay the same tensors."""
    for name, module in list(model.named_modules()):
        if is_conv1d(module):
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            inputs, outputs = weight.shape
            linear = FromConv1D(inputs, outputs, device="meta", dtype=weight.dtype)
            linear.bias = bias
            linear.requires_grad_(False)
            model.set_submodule(name, linear.train(module.training))
