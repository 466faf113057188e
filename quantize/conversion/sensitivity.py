"""What rounding one linear alone does to the output of its block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantize.block.standin import stand_in
from quantize.errors import ModelError
from quantize.formats.packed_int import IntScheme
from quantize.model.linear import PackedLinear
from quantize.solvers.grid import Grid

if TYPE_CHECKING:
    from torch import nn

    from quantize.block.block import Block


def sensitivities(
    block: Block, schemes: Mapping[str, Sequence[IntScheme]]
) -> dict[str, dict[int, float]]:
    """Error at the block's output from rounding one linear alone, by
    linear (relative name) and bits.

    It is the mean over tokens of ‖y' − y‖² / ‖y‖² with y the output of the block as it is: relative
    to each token, because norms further on take a token's length away. The block is left as it was.
    ModelError where no token has a finite output.
    """
    outputs = [block.states_of(block.forward(block.module, hidden)) for hidden in block.inputs]
    trials = [(name, scheme) for name, choices in schemes.items() for scheme in choices]
    errors = block.ranks.numbers([partial(_error, block, outputs, *trial) for trial in trials])
    out: dict[str, dict[int, float]] = {name: {} for name in schemes}
    for (name, scheme), error in zip(trials, errors, strict=True):
        out[name][scheme.bits] = error
    return out


def _error(block: Block, outputs: Sequence[Tensor], name: str, scheme: IntScheme) -> float:
    """Mean error with one linear rounded. outputs: those of the block as it is."""
    linear = block.linear(name)
    trial = round_linear(linear, scheme)
    with stand_in(block.module, {name: trial}):
        pairs = zip(block.inputs, outputs, strict=True)
        found = ((block.states_of(block.forward(block.module, x)), y) for x, y in pairs)
        errors = torch.cat([_relative_errors(*pair) for pair in found])
    if not len(errors):
        raise ModelError(f"block {block.index}: none of its outputs is finite; try --dtype float32")
    return float(errors.double().mean())


def round_linear(linear: nn.Linear, scheme: IntScheme) -> PackedLinear:
    """The linear with its weight rounded to nearest under clipped scales,
    which needs no calibration."""
    fp8 = scheme.fp8_activations
    weight = linear.weight.float()
    group = scheme.group(linear.in_features)
    grid = Grid(scheme.bits, group, product=fp8, fp8_scales=fp8)
    scale, factor = grid.fit_scale(weight)
    packed = grid.pack(grid.round(weight, scale, factor)[0], scale)
    module = PackedLinear(packed, linear.bias, fp8, linear.weight.dtype, "kernel")
    return module.to(linear.weight.device)


def _relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """‖found − wanted‖² / ‖wanted‖² of every token with a finite target; a token that
    overflowed counts as lost: 1."""
    found, wanted = found.flatten(0, -2).float(), wanted.flatten(0, -2).float()
    usable = wanted.isfinite().all(dim=1)
    size = wanted[usable].square().sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    errors = (found[usable] - wanted[usable]).square().sum(dim=1) / size
    return errors.nan_to_num(nan=1.0, posinf=1.0)
