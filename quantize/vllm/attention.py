"""Attention of vLLM on pq's INT4 KV cache: pages hold records of `quantize/formats/kv4.py`, and nothing else.

The checkpoint decides, not a flag: vLLM's list of cache dtypes is closed (its issues 51751 and 52670 are
about opening it). A page is [kv heads, tokens, C] with C bytes for a token's two records, of K·S and of V.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from quantize.formats.kv4 import AFFINE_TENSORS, KvNumerics, KvScheme
from quantize.formats.shards import kv_heads
from quantize.kernels.attention.affine import Affine
from quantize.kernels.attention.paged import attend_pages, store_pages


def register_backends() -> None:
    """Make vLLM find them."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.PqCpuBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "quantize.vllm.cuda_attention.PqTritonBackend")


class PqKvMethod(BaseKVCacheMethod):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Holds the post-RoPE scale S of an attention layer, and shifts and rotations;
    makes its pages those of packed records."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.numerics = KvNumerics.from_json(facts)

    def create_weights(self, layer: Any) -> None:
        """A place for S, and a backend that knows the layout; ValueError for attention that is not softmax
        over earlier tokens alone, and where the backend is another one."""
        name, impl = layer.layer_name, layer.impl
        if not isinstance(impl, Int4Attention):
            raise ValueError(
                f"{name} works on an INT4 KV cache, which backend {layer.attn_backend.get_name()} does not "
                "know; serve with --attention-backend CUSTOM on a GPU, and without the option on a CPU"
            )
        self.numerics.scheme.group(layer.head_size)
        impl.require_plain(name)
        impl.numerics = self.numerics
        layer.attn_backend = _packed_backend(layer.attn_backend, self.numerics.scheme)
        for name, shape in self._tensors(layer).items():
            held = nn.Parameter(torch.ones(shape), requires_grad=False)
            held.data = held.data.float()
            set_weight_attrs(held, {"weight_loader": _load_heads, "is_loaded": False})
            layer.register_parameter(_place(name), held)

    def process_weights_after_loading(self, layer: Any) -> None:
        """ValueError where the checkpoint lacks S, or shifts and rotations that it speaks of."""
        for name in self._tensors(layer):
            if not getattr(layer, _place(name)).is_loaded:
                raise ValueError(
                    f"{layer.layer_name} works on an INT4 KV cache, but its {name} is missing from the "
                    "checkpoint; download it again"
                )

    def _tensors(self, layer: Any) -> dict[str, tuple[int, ...]]:
        return self.numerics.tensors(layer.num_kv_heads, layer.head_size)


def _place(name: str) -> str:
    """Name in vLLM's attention layer of a tensor of `KV_TENSORS`."""
    return f"pq_{name.removeprefix('kv.')}"


def _load_heads(param: nn.Parameter, loaded: Tensor) -> None:
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    if loaded.ndim == param.ndim and ranks > 1:
        loaded = loaded[kv_heads(len(loaded), rank, ranks)]
    if param.shape != loaded.shape:
        raise ValueError(
            f"a tensor of the KV cache is {tuple(loaded.shape)}, the model has {tuple(param.shape)} heads and channels"
        )
    param.data.copy_(loaded)
    param.is_loaded = True  # type: ignore[attr-defined]


@functools.cache
def _packed_backend(backend: type, scheme: KvScheme) -> type:
    """`backend` with pages of records: vLLM asks the class, and nothing else, how large they are."""

    def customize_spec(cls: type, spec: Any) -> Any:
        bytes_of_state = 2 * scheme.record_bytes(spec.head_size)
        # Pages are allocated in the model's dtype.
        unit = torch.empty(0, dtype=spec.dtype).element_size()
        return replace(spec, state_content_bytes=-(-bytes_of_state // unit) * unit)

    return type(
        f"{backend.__name__}Int4", (backend,), {"customize_spec": classmethod(customize_spec)}
    )


class PqCpuBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's own for CPUs; where the checkpoint asks for the INT4 cache, with records in its pages."""

    @staticmethod
    def get_impl_cls() -> Any:
        """What computes attention of the model that is being made."""
        config = get_current_vllm_config().quant_config
        return PqCpuImpl if getattr(config, "attention", None) else CPUAttentionBackendImpl


class Int4Attention:
    """What attention of vLLM, which this precedes, does on packed records."""

    numerics: KvNumerics
    scale: float
    sliding_window: Any
    """Tokens that a query sees, or those before its own and none behind; −1: all."""

    def require_plain(self, name: str) -> None:
        """ValueError for what an INT4 cache of pq was never made for."""
        held: Any = self
        odd = {
            "ALiBi": held.alibi_slopes is not None,
            "a soft cap": bool(held.logits_soft_cap),
            "sinks": held.sinks is not None,
            f"type {held.attn_type}": held.attn_type != "decoder",
            "a cache shared between layers": held.kv_sharing_target_layer_name is not None,
            f"--kv-cache-dtype {held.kv_cache_dtype}": held.kv_cache_dtype
            not in ("auto", "float16", "bfloat16"),
        }
        if found := [what for what, is_so in odd.items() if is_so]:
            raise ValueError(f"{name}: an INT4 KV cache of pq does not go with {', '.join(found)}")

    def fused_rope_kvcache_supported(self) -> bool:
        """False: keys are rounded after their positions are in them."""
        return False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """False: what comes next rounds its inputs itself."""
        return False

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, its own included; None: all."""
        size = self.sliding_window
        if isinstance(size, tuple):
            return None if size[0] < 0 else size[0] + 1
        return None if size < 0 else size

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store key and value [T, Hkv, d] of tokens in their slots, page · size + place; −1: in none."""
        pages, S, maps = kv_cache.view(torch.uint8), layer.pq_scale, self._maps(layer)
        if maps is not None:
            key, value = (
                entering(x.transpose(0, 1)).transpose(0, 1).contiguous()
                for entering, x in ((maps.keys, key), (maps.values, value))
            )
            S = torch.ones_like(S)
        store_pages(key, value, S, self.numerics.scheme, pages, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [T, H, d] of all requests to their pages, into output [T, H, d]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("pq's attention does not quantize its output")
        if attn_metadata is None:  # a run that only measures memory
            return output
        query, S, maps = query[: attn_metadata.num_actual_tokens], layer.pq_scale, self._maps(layer)
        out = output
        if maps is not None:
            query = maps.queries(query.transpose(0, 1)).transpose(0, 1).contiguous()
            out, S = torch.zeros_like(query), torch.ones_like(S)
        mixed = attend_pages(
            query,
            kv_cache.view(torch.uint8),
            S,
            self.numerics,
            self.scale,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            out,
            window=self.window,
            most_new=attn_metadata.max_query_len,
            most_tokens=attn_metadata.max_seq_len,
        )
        if maps is not None:
            output[: len(mixed)] = maps.output(mixed.transpose(0, 1), output.dtype).transpose(0, 1)
        return output

    def _maps(self, layer: Any) -> Affine | None:
        """Shifts and rotations of a layer; None where the checkpoint has none."""
        if not self.numerics.affine:
            return None
        tensors = {name: getattr(layer, _place(name)) for name in AFFINE_TENSORS}
        return Affine.of(layer.pq_scale, tensors)


class PqCpuImpl(Int4Attention, CPUAttentionBackendImpl):  # type: ignore[misc]
    """By the kernels' plain-torch twins."""
