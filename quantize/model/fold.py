"""A diagonal scale on its way from the outputs of one module into the inputs of others."""

from __future__ import annotations

from torch import Tensor, nn

from quantize.model.arch import Edge, Heads


def head_columns(scale: Tensor, heads: Heads) -> Tensor:
    """λ [Hkv·d] per channel of the values → [H·d] per channel of attention's output: query heads
    of a group read the same values."""
    of_head = scale.view(heads.n_kv_heads, heads.head_dim)
    return of_head.repeat_interleave(heads.n_heads // heads.n_kv_heads, dim=0).flatten()


def scale_edge(
    module: nn.Module, edge: Edge, scale: Tensor, columns: Tensor, offset: float = 0.0
) -> None:
    """Divide the source's outputs by λ [C], multiply the sinks' columns by it, in their dtypes.

    columns: λ by the sinks' input. offset: what a norm adds to its weight.
    """
    first, end = edge.rows or (0, len(scale))
    scale_outputs(module.get_submodule(edge.source), 1 / scale, first, end, offset)
    for sink in edge.sinks:
        weight = module.get_submodule(sink).get_parameter("weight")
        weight.data = weight.data * columns.to(weight.dtype)


def scale_outputs(
    module: nn.Module, scale: Tensor, first: int, end: int, offset: float = 0.0
) -> None:
    """Multiply outputs [first, end) of a linear or norm by scale [end − first], its bias too.

    offset: what a norm adds to its weight.
    """
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        added = offset if name == "weight" else 0.0
        rows = scale.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype)
        whole = parameter.data.clone()
        whole[first:end] = (whole[first:end] + added) * rows - added
        parameter.data = whole
