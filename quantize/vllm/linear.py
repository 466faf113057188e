"""Linears of vLLM whose weights are packed in pq's own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from quantize.formats.scheme import AnyScheme
from quantize.serving.native_linear import constant
from quantize.vllm import ops
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
        names = [*self.schemes]
        if get_tensor_model_parallel_world_size() > 1:
            raise ValueError(
                f"{names[0]}: pq-vllm cannot slice packed linears yet; serve with --tensor-parallel-size 1"
            )
        sizes = _rows(layer, output_partition_sizes, len(names))
        try:
            parts = [
                part_of(name, (N, input_size), self.schemes[name], params_dtype)
                for name, N in zip(names, sizes, strict=True)
            ]
        except ValueError as err:
            raise ValueError(f"{', '.join(names)}: {err}") from None
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
            place = constant(torch.empty(0, dtype=held.get_parameter(suffix).dtype))
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
            x = ops.rotate_inputs(x)
        parts: Sequence[Part] = layer.pq_parts
        sizes = [part.shape[0] for part in parts]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        out = [part.multiply(x, b) for part, b in zip(parts, biases, strict=True)]
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
        y: Tensor = super().apply(layer, ops.rotate_inputs(x), bias)
        return y


def _rows(layer: Any, partitions: Sequence[int], parts: int) -> list[int]:
    # vLLM pads a vocabulary; what it pads with is cut off the logits again.
    if isinstance(layer, ParallelLMHead):
        return [layer.org_vocab_size]
    return [*partitions] if len(partitions) == parts else [sum(partitions)]


def _loader(suffix: str, parts: Mapping[Any, Part]) -> Any:
    def load(param: Tensor, loaded: Tensor, shard_id: Any = None) -> None:
        if shard_id not in parts:
            names = ", ".join(part.name for part in parts.values())
            raise ValueError(
                f"vLLM asks for part {shard_id!r} of {names}, which pq-vllm cannot place"
            )
        parts[shard_id].load(suffix, loaded)

    return load
