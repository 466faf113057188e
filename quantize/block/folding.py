"""Moving a diagonal scale from the outputs of one module into the inputs of those that read
them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantize.model.arch import Edge


def fold_edge(
    module: nn.Module,
    edge: Edge,
    scale: Tensor,
    stored: torch.dtype,
    sink_columns: Callable[[Edge, Tensor], Tensor],
) -> None:
    """Move λ [channels of the source] over `edge` of a decoder layer: source output ÷ λ, sink
    columns × λ.

    stored: dtype of a norm in the checkpoint. The norm keeps to it; sinks see exactly the ratio
    that the rounded norm really changed by, so the function is preserved even where that is
    bfloat16.
    """
    source = module.get_submodule(edge.source)
    weight = source.get_parameter("weight")
    first, end = edge.rows or (0, len(weight))
    if edge.source_kind == "norm":
        before = weight.detach().float() + edge.offset
        after = (before / scale - edge.offset).to(stored)
        weight.data = after.to(weight.dtype)
        kept = after.float() + edge.offset
        scale = torch.where(kept == 0, scale, before / kept)
    else:
        changed = weight.detach().clone()
        changed[first:end] = (changed[first:end] / scale[:, None]).to(weight.dtype)
        weight.data = changed
    bias = dict(source.named_parameters()).get("bias")
    if bias is not None:
        moved = bias.detach().clone()
        moved[first:end] = (moved[first:end] / scale).to(bias.dtype)
        bias.data = moved
    columns = sink_columns(edge, scale)
    for sink in edge.sinks:
        linear = module.get_submodule(sink).get_parameter("weight")
        linear.data = (linear * columns).to(linear.dtype)
