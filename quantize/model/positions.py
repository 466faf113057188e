"""How many tokens a model can read at once where its code sets a bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quantize.errors import UsageError
from quantize.model.transformers_api import sizes_of

_OFFSET = 8
"""Rows that a table of positions may have before the first: OPT and BioGPT have 2."""


def most_positions(model: Any) -> int | None:
    """Positions beyond which a model fails: rows of a table of positions, learned or made in advance
    (GPT-J), and the length for which MPT makes its biases; None where positions are computed for
    any length."""
    config = model.config.get_text_config(decoder=True)
    if getattr(getattr(config, "attn_config", None), "alibi", False):
        return int(config.max_seq_len)
    context = sizes_of(model.config)["max_position_embeddings"]
    if not isinstance(context, int) or context < 1:  # -1 in XLNet
        return None
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            rows = 0 if module is tokens else module.num_embeddings
            if context <= rows <= context + _OFFSET:
                return context
        elif any(table.ndim == 2 and len(table) == context for table in _constants(module)):
            return context
    return None


def _constants(module: nn.Module) -> list[Tensor]:
    """Tensors of a module, not of its parts, that are no parameters."""
    held = [*vars(module).values(), *module.buffers(recurse=False)]
    return [value for value in held if isinstance(value, Tensor)]


def require_positions(model: Any, length: int) -> None:
    """UsageError for windows of more tokens than a model can read."""
    most = most_positions(model)
    if most is not None and length > most:
        raise UsageError(
            f"windows of {length} tokens: {type(model).__name__} has {most} positions and no more; "
            f"lower seqlen to {most}"
        )
