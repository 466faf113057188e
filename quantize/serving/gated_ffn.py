"""A gated FFN whose gate and up projections are packed INT4: one kernel reads
the inputs once for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantize.kernels.int4.api import multiply_gated, takes
from quantize.model.hooks import is_hooked
from quantize.model.transformers_api import is_silu
from quantize.serving.int_linear import IntLinear

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedFfn(nn.Module):
    """y = (silu(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ, parts named as in the FFN it stands for."""

    gate_proj: IntLinear
    up_proj: IntLinear
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        for name, part in ffn.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D] in x's dtype; by one kernel, what gate and up give
        is not rounded in between."""
        gate, up = self.gate_proj, self.up_proj
        if self._fits(x):
            h = multiply_gated(
                x,
                gate.kernel_weight(),
                up.kernel_weight(),
                fp8_activations=gate.scheme.fp8_activations,
            )
        else:
            h = self.act_fn(gate(x)) * up(x)
        y: Tensor = self.down_proj(h)
        return y

    def _fits(self, x: Tensor) -> bool:
        gate, up = self.gate_proj, self.up_proj
        learns = x.requires_grad and torch.is_grad_enabled()
        if learns or gate.scheme != up.scheme or not all(map(_is_plain, (gate, up))):
            return False
        group_size = gate.scheme.group(gate.in_features)
        return takes(gate.scheme.bits, group_size, x, gate.scheme.fp8_activations)


def place_gated_ffns(model: nn.Module) -> None:
    """Put a `GatedFfn` in the place of every FFN of `model` that it can stand for."""
    for name, ffn in [*model.named_modules()]:
        parts = dict(ffn.named_children())
        if set(parts) != _PARTS or not is_silu(parts["act_fn"]):
            continue
        if all(isinstance(parts[part], IntLinear) for part in ("gate_proj", "up_proj")):
            model.set_submodule(name, GatedFfn(ffn))


def _is_plain(linear: IntLinear) -> bool:
    # loaders that keep weights elsewhere hook it
    return linear.bias is None and not is_hooked(linear)
