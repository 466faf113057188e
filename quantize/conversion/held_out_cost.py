"""Memory and time of the look at held-out windows, for `pq estimate`."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantize.calibration.tokens import TokenSet
from quantize.conversion.held_out import windows_of_look
from quantize.conversion.plan import Plan
from quantize.conversion.source import embed_windows, open_block, outside
from quantize.conversion.trial_fits import Clock
from quantize.cost.footprint import BlockSizes
from quantize.evaluation.run import LOGIT_BYTES
from quantize.evaluation.streamed import windows_of_a_pass

_LOGITS = 6
"""Arrays as large as the logits compared at once that a comparison holds: both models' in float32,
their log probabilities, and what is computed of these."""
_MODELS = 2
"""The output and the parent: both heads are there together, and both are run."""
_PROBED = 512
"""Tokens that a pass is timed with: as many as a usual window has."""
_PROBED_LOGITS = 64
"""Tokens whose logits are timed: enough for a product that is no single row."""


def room_of_look(plan: Plan, sizes: BlockSizes, tokens: TokenSet | None) -> int:
    """Bytes that a look takes at most beside what the process takes anyway; 0 where none is taken.

    sizes: of the largest block.
    """
    if not plan.request.check_windows:
        return 0
    N, T = windows_of_look(plan, tokens)
    item = plan.request.dtype.itemsize
    heads = _MODELS * plan.shape.vocab * plan.shape.hidden * item
    hidden = _MODELS * N * T * plan.skeleton.stream.width * item
    logits = _LOGITS * min(LOGIT_BYTES, 4 * N * T * plan.shape.vocab)
    batch = replace(sizes, window=T, batch=T * min(N, windows_of_a_pass(T)), itemsize=item)
    # Of a packed block there are codes as well while its values are made.
    block = 2 * item * sizes.weights + batch.forward()
    return heads + hidden + max(logits, block)


def seconds_of_passes(plan: Plan, index: int, tokens: TokenSet | None, clock: Clock) -> float:
    """What block `index` will take in a look: read and run, of both models."""
    N, T = windows_of_look(plan, tokens)
    probed = torch.zeros(1, min(T, _PROBED), dtype=torch.int64)
    (hidden,) = embed_windows(plan, probed)
    started = clock.now()
    block = open_block(plan, index, [hidden])
    reading = clock.now() - started
    with torch.no_grad():
        block.forward(block.module, hidden)  # makes masks and rotary tables
        started = clock.now()
        block.forward(block.module, hidden)
    once = clock.now() - started
    return _MODELS * (reading + once * N * T / probed.numel())


def seconds_of_logits(plan: Plan, tokens: TokenSet | None, clock: Clock) -> float:
    """What the heads will take in a look, and the comparison of their logits."""
    N, T = windows_of_look(plan, tokens)
    weights = outside(plan, *plan.arch.after)
    if f"{plan.arch.head}.weight" not in weights:
        weights |= outside(plan, plan.arch.embedding)
    tail = plan.skeleton.tail(weights)
    (hidden,) = embed_windows(plan, torch.zeros(1, _PROBED_LOGITS, dtype=torch.int64))
    with torch.no_grad():
        tail(hidden[:, :1])
        started = clock.now()
        tail(hidden).float().log_softmax(-1).exp()
    return _MODELS * (clock.now() - started) * N * T / _PROBED_LOGITS
