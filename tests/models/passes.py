"""Passes over text through a model of the zoo, and what is read off them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.shrink_tables import FIRST_TOKEN, LAST_TOKEN
from models.stack import Blocks

TEXT_MODELS = {
    # Its own output asks for `image_outputs` of its decoder's, which has none in transformers 5.24.
    "Llama4ForConditionalGeneration": "language_model",
}
"""Class → the module in it that takes text, where the class cannot."""


def tokens(batch: int = 2, length: int = 48, seed: int = 0) -> Tensor:
    """Tokens [B, T] that are special in no model of the zoo."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of one pass over text alone, without a cache."""
    text = TEXT_MODELS.get(type(model).__name__)
    model = model.get_submodule(text) if text else model  # type: ignore[assignment]
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def entropy(scores: Tensor) -> float:
    """Mean entropy of softmax(scores [.., V]) in nats."""
    log = scores.float().log_softmax(-1)
    return float(-(log.exp() * log).sum(-1).mean())


def measure(model: PreTrainedModel, blocks: Blocks, ids: Tensor) -> tuple[list[float], Tensor]:
    """Each block's change of its stream in one pass, and the logits [B, T, V]."""
    with blocks.recorded() as record:
        scores = logits(model, ids)
    return [record.change(block) for block in blocks.modules], scores


def apart(first: Tensor, second: Tensor) -> float:
    """The greatest difference of logits, relative to the greatest logit."""
    return float((first - second).abs().max() / first.abs().max())


def causality(model: PreTrainedModel) -> tuple[float, float]:
    """How far logits change before and after the place from which on tokens change, relative."""
    ids = tokens(seed=8)
    other = ids.clone()
    cut = ids.shape[1] // 2
    other[:, cut:] = tokens(seed=9)[:, cut:]
    first, second = logits(model, ids), logits(model, other)
    return apart(first[:, :cut], second[:, :cut]), apart(first[:, cut:], second[:, cut:])
