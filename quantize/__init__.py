"""pq: offline post-training quantization that ends in a checkpoint you can serve.

Importing the package lets transformers load pq's own format (`quant_method: pq`), in whatever order
the two are imported; it imports neither transformers nor torch.
"""

from __future__ import annotations

from importlib.util import find_spec

from quantize.import_hook import after_import

__version__ = "0.1.0"


def _register() -> None:
    # The plugin for vLLM ships without it.
    if find_spec("quantize.serving.register") is None:
        return
    from quantize.serving.register import register

    register()


after_import("transformers.quantizers.auto", _register)
