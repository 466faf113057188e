"""Linears of vLLM whose weights are packed in pq's own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from quantize.formats.scheme import AnyScheme
from quantize.serving.native_linear import constant
from quantize.vllm import ops
from quantize.vllm.cuts import Cut, inputs_cut, rows_cut
from quantize.vllm.parts import Part, joined, part_of

_SHARDS = ("q", "k", "v")


class PqLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Multiplies with each linear of the checkpoint that a linear of vLLM is made of, in their order.

    schemes: full name of each in the checkpoint → its scheme, None for one that stayed 16-bit.
    """

    def __init__(self, schemes: Mapping[str, AnyScheme | None], rotates: bool) -> None:
        self.schemes, self.rotates = schemes, rotates

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Put empty parts into `layer`, and a parameter for each suffix by which vLLM's loader finds them."""
        schemes = self.schemes
        cuts = _cuts(layer, output_partition_sizes, input_size, schemes)
        try:
            parts = [
                part_of(name, cut, schemes[name], params_dtype)
                for name, cut in zip(schemes, cuts, strict=True)
            ]
        except ValueError as err:
            raise ValueError(f"{', '.join(schemes)}: {err}") from None
        layer.pq_parts = nn.ModuleList(parts)
        layer.pq_dtype = params_dtype
        keys: Sequence[Any] = _SHARDS if len(parts) == len(_SHARDS) else range(len(parts))
        by_shard: dict[Any, Part] = dict(zip(keys, parts, strict=True))
        if len(parts) == 1:
            by_shard[None] = parts[0]
        layer.pq_suffixes = sorted({s for part in parts for s in part.missing})
        for suffix in layer.pq_suffixes:
            # vLLM warns of tensors whose dtype is not that of their place.
            held = next(part for part in parts if suffix in part.missing)
            place = constant(torch.empty(0, dtype=held.stored[suffix][0]))
            set_weight_attrs(place, {"weight_loader": _loader(suffix, by_shard)})
            layer.register_parameter(suffix, place)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what can be multiplied at once, and check that all was loaded."""
        for suffix in layer.pq_suffixes:
            delattr(layer, suffix)
        layer.pq_suffixes = []
        for part in layer.pq_parts:
            part.check()
        together = joined(layer.pq_parts)
        for part in together:
            part.prepare(layer.pq_dtype)
        layer.pq_parts = nn.ModuleList(together)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] → [..., N], the outputs of all parts side by side."""
        if self.rotates:
            x = _rotated(layer, x)
        parts: Sequence[Part] = layer.pq_parts
        sizes = [part.shape[0] for part in parts]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        out = [part.multiply(x, b) for part, b in zip(parts, biases, strict=True)]
        if isinstance(layer, ParallelLMHead) and layer.tp_size > 1:
            # What the GPUs' logits are put together from is as wide on each of them.
            out.append(x.new_zeros(*x.shape[:-1], layer.num_embeddings_per_partition - sum(sizes)))
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """ValueError: a packed head has no weight in common with the embedding."""
        raise ValueError(
            f"{', '.join(self.schemes)} is packed, but config.json ties it to the embedding; convert again"
        )


class RotatedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A 16-bit linear whose weight has columns rotated by H_K."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] → [..., N]."""
        y: Tensor = super().apply(layer, _rotated(layer, x), bias)
        return y


def _cuts(
    layer: Any, partitions: Sequence[int], K: int, schemes: Mapping[str, AnyScheme | None]
) -> list[Cut]:
    """What this GPU holds of each linear of the checkpoint."""
    rank, ranks, names = layer.tp_rank, layer.tp_size, [*schemes]
    if isinstance(layer, ParallelLMHead):
        # vLLM pads a vocabulary; what it pads with is cut off the logits again.
        here = layer.shard_indices
        rows = slice(here.org_vocab_start_index, here.org_vocab_end_index)
        return [Cut((layer.org_vocab_size, K), rows=rows)]
    sizes = [*partitions] if len(partitions) == len(names) else [sum(partitions)]
    if ranks > 1 and isinstance(layer, RowParallelLinear):
        return [
            inputs_cut(N, K, schemes[name], rank, ranks, name)
            for name, N in zip(names, sizes, strict=True)
        ]
    if ranks == 1 or not isinstance(layer, ColumnParallelLinear):
        return [Cut((N, K)) for N in sizes]
    if len(partitions) != len(names):
        raise ValueError(
            f"{names[0]} is one linear where vLLM divides {len(partitions)} among GPUs; serve with "
            "--tensor-parallel-size 1"
        )
    # With more GPUs than heads of keys and values several hold the same one.
    copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) else 1
    return [rows_cut(N, K, rank, ranks, copies if index else 1) for index, N in enumerate(sizes)]


def _rotated(layer: Any, x: Tensor) -> Tensor:
    """x @ H of what this GPU holds of x [..., K]: a rotation mixes all inputs, so that they come together."""
    if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
        return ops.rotate_inputs(x)  # type: ignore[no-any-return]
    whole = ops.rotate_inputs(tensor_model_parallel_all_gather(x))
    held: Tensor = whole.chunk(layer.tp_size, dim=-1)[layer.tp_rank].contiguous()
    return held


def _loader(suffix: str, parts: Mapping[Any, Part]) -> Any:
    def load(param: Tensor, loaded: Tensor, shard_id: Any = None) -> None:
        if shard_id not in parts:
            names = ", ".join(part.name for part in parts.values())
            raise ValueError(
                f"vLLM asks for part {shard_id!r} of {names}, which pq-vllm cannot place"
            )
        parts[shard_id].load(suffix, loaded)

    return load
