"""pq's own format in vLLM: a plugin, found by its entry point in the group `vllm.general_plugins`.

Written against vLLM 0.32. Importing this needs no vLLM; `register` does.
"""

from __future__ import annotations


def register() -> None:
    """Make `quant_method: pq` known to vLLM, and W4A8-FP8 checkpoints of `compressed-tensors` where it has no
    kernel for them; called in every process of an engine, and does nothing the second time."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from quantize.vllm import attention, compressed, dense_experts
    from quantize.vllm.config import NAME, PqConfig

    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(PqConfig)
        register_quantization_config(compressed.NAME)(compressed.PqCompressedTensorsConfig)
        attention.register_backends()
        dense_experts.register_classes()
