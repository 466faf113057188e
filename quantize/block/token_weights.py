"""What depends on a token: the attention that others pay to it (RSQ, arXiv 2503.01820).

The mean over tokens that second moments are counts each of them the same, but an error at the token
that all later ones look at, such as BOS, reaches every one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.model.attention import watch_attention
from quantize.model.attention_received import attention_received

TokenWeights = Literal["attention", "sinks", "equal"]
"""`attention`: what the layer's own attention gives a token, mean over heads, summed over queries;
`sinks`: that where it is a good part of all there is, and 1 elsewhere; `equal`: 1."""

_SHARE = 1 / 16
"""Of all attention in a window, what makes a token a sink: BOS of a pretrained model receives a
third, a token that is merely read more often than others some times the mean."""
_TIMES = 8
"""Times the mean that it must receive in any case, where windows are short."""
_QUERIES = 64
"""Of a window, that are looked at for sinks: it is what all queries look at that makes one."""


def weights_of(block: Block, batch: int, kind: TokenWeights) -> Tensor | None:
    """Weights [B·T] of the tokens of a batch, float32 with the mean 1 in each window; None where
    all count the same, or the block has no attention probabilities.

    They are those of the parent's hidden states where these are carried along, and of the block as
    it is when they are first asked for: before any of its linears is encoded.
    """
    if kind == "equal":
        return None
    if (kind, batch) not in block.token_weights:
        found = _measured(block, batch, sampled=kind == "sinks")
        if found is None:
            block.note(
                block.arch.attention or "attention",
                equal_tokens="no attention probabilities in this kind of block",
            )
        block.token_weights[kind, batch] = found
    found = block.token_weights[kind, batch]
    if found is None or kind == "attention":
        return found
    windows = found.view(block.inputs[batch].shape[0], -1)
    sinks = windows > max(_TIMES, _SHARE * windows.shape[1])
    windows = torch.where(sinks, windows, 1)
    return (windows / windows.mean(dim=1, keepdim=True)).flatten()


class _Received(nn.Module):
    """Stands in for a layer's `kv`: what attention gives each token, instead of its outputs."""

    weights: Tensor | None = None

    def __init__(self, sampled: bool) -> None:
        super().__init__()
        self.sampled = sampled
        self.options: Mapping[str, Any] = {}

    def watch(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Any
    ) -> None:
        self.options = options

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        if query.shape[2] == key.shape[2]:
            every = max(1, query.shape[2] // _QUERIES) if self.sampled else 1
            self.weights = attention_received(
                query, key, mask, scaling, every=every, **self.options
            )
        raise _Seen


class _Seen(Exception):  # noqa: N818 - control flow, not an error
    """Ends a pass once attention was come to."""


def _measured(block: Block, batch: int, sampled: bool) -> Tensor | None:
    if not block.arch.attention:
        return None
    layer = block.frozen or block.module
    attention = layer.get_submodule(block.arch.attention)
    block.parent_passes.settle()  # through the same layer
    own, received = getattr(attention, "kv", None), _Received(sampled)
    attention.kv = received
    try:
        with watch_attention(received.watch), suppress(_Seen):
            block.forward(layer, block.parent_stream[batch].to(block.device))
    finally:
        del attention.kv
        if own is not None:
            attention.kv = own
    found = received.weights
    if found is None:
        return None
    # A window that overflowed counts as any other: its tokens are left out where they are summed.
    mean = found.mean(dim=1, keepdim=True)
    usable = mean.isfinite() & (mean > 0)
    return torch.where(usable, found / mean, torch.ones_like(found)).flatten()
