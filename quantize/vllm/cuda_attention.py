"""Attention on pq's INT4 KV cache with Triton, on NVIDIA GPUs that know E4M3 (Ada, Hopper and newer).

Chosen by `--attention-backend CUSTOM`. What it is told of a batch is what vLLM's own Triton backend is told, whose
metadata CUDA graphs hold.
"""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from quantize.kernels.attention.checks import HEAD_DIMS
from quantize.vllm.attention import Int4Attention


class PqTritonBackend(TritonAttentionBackend):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """vLLM's own, with records in its pages."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """As it is chosen."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """What computes attention."""
        return PqTritonImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Channels of heads that the kernels are tested with."""
        return [*HEAD_DIMS]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether the kernels are tested with such heads."""
        return head_size in HEAD_DIMS

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Whether tensor cores multiply E4M3 there."""
        return tuple(capability) >= (8, 9)


class PqTritonImpl(Int4Attention, TritonAttentionImpl):  # type: ignore[misc]
    """By paged kernels."""
