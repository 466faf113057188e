"""Ways to attend on a cache of 4 bits."""

from __future__ import annotations

from quantize.formats.kv4 import KvNumerics
from quantize.formats.vllm_kv4 import VllmInt4

CacheNumerics = KvNumerics | VllmInt4
"""pq's own INT4 cache, or vLLM's."""
