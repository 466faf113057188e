"""What an engine in this process holds, for tests."""

from __future__ import annotations

from typing import Any


def facts(engine: Any) -> dict[str, Any]:
    """Bytes that a token takes in each layer's cache, and how often a request was thrown out."""
    core = engine.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
    bytes_of_token = [c[0].numel() * c.element_size() // c.shape[2] for c in caches]
    preemptions = {
        m.name: m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions"
    }
    return {
        "bytes_of_token": bytes_of_token,
        "preemptions": preemptions.get("vllm:num_preemptions"),
    }
