"""pq: offline post-training quantization that ends in a checkpoint you can serve.

Importing the package lets transformers load pq's own format (`quant_method: pq`), in whatever order
the two are imported; it imports neither transformers nor torch. `quantize.assisted` is a policy of
speculation lengths for transformers' assisted generation.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantize.import_hook import after_import

if TYPE_CHECKING:
    from quantize.serving.speculation.policy import Policy
    from quantize.serving.transformers_assistant import Assisted

__version__ = "0.1.0"


def _register() -> None:
    # The plugin for vLLM ships without it.
    if find_spec("quantize.serving.register") is None:
        return
    from quantize.serving.register import register

    register()


def assisted(draft: Any, policy: Policy | str = "dsde-paper") -> Assisted:
    """What `model.generate(custom_generate=...)` takes to draft with another model under a policy.

    draft: a model with the same tokenizer. policy: one of `quantize.serving.speculation`, or a name
    as `policy_named` knows them. UsageError for another.
    """
    from quantize.serving.speculation.names import policy_named
    from quantize.serving.transformers_assistant import Assisted

    return Assisted(draft, policy_named(policy) if isinstance(policy, str) else policy)


after_import("transformers.quantizers.auto", _register)
