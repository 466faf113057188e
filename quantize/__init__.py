"""pq: offline post-training quantization that ends in a checkpoint you can serve.

Importing the package lets transformers load pq's own format (`quant_method: pq`), in whatever order
the two are imported; it imports neither transformers nor torch. `convert`, `evaluate` and
`compare` are the commands as functions, and take their arguments; `load` gives a model to run.
`quantize.assisted` is a policy of speculation lengths for transformers' assisted generation.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantize.import_hook import after_import
from quantize.version import __version__

if TYPE_CHECKING:
    from quantize.api.comparisons import compare
    from quantize.api.conversions import convert
    from quantize.api.evaluations import evaluate
    from quantize.api.loads import load
    from quantize.serving.speculation.policy import Policy
    from quantize.serving.transformers_assistant import Assisted

__all__ = ["__version__", "assisted", "compare", "convert", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    # When they are asked for: each of them needs torch.
    if name == "convert":
        from quantize.api import conversions

        return conversions.convert
    if name == "evaluate":
        from quantize.api import evaluations

        return evaluations.evaluate
    if name == "compare":
        from quantize.api import comparisons

        return comparisons.compare
    if name == "load":
        from quantize.api import loads

        return loads.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
