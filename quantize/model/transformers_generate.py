"""Text that a model writes by itself, whole sequences of equal length at a time.

transformers' own `generate` pads prompts of unequal length and takes settings from files beside the
weights; what is measured here must depend on weights and prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from quantize.errors import ModelError
from quantize.model.transformers_api import (
    DecoderArguments,
    release,
    returned_cache,
    text_model,
)


@torch.no_grad()
def continuation(
    model: Any,
    prompts: Tensor,
    count: int,
    temperature: float,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
    vocab: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """What a causal model writes after prompts [B, T] of equal length → tokens [B, `count`] int64.

    temperature: 0 takes the likeliest token, above it one is drawn from softmax(logits / temperature)
    by `generator`. stop: tokens that end a sequence; what stands behind the first of them is −1.
    vocab: only tokens below it are written. tick: called after each token.
    ModelError for a model that keeps no cache, and for logits that are not finite.
    """
    body = text_model(model)
    arguments = DecoderArguments.of(body)
    cache, step, out = None, prompts, []
    over = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=prompts.device)
    for _ in range(count):
        given: dict[str, Any] = {} if cache is None else {arguments.cache: cache}
        output = body(step, use_cache=True, **given)
        cache = returned_cache(output)
        if cache is None:
            raise ModelError(
                f"{type(body).__name__} of {release()} gives no cache of keys and values, without "
                "which pq does not let a model write"
            )
        logits = output.logits[:, -1, :vocab].float()
        if not bool(torch.isfinite(logits).all(-1)[~over].all()):
            raise ModelError(f"{type(body).__name__}: its logits are not finite")
        if temperature > 0:
            chosen = torch.multinomial(
                torch.softmax(logits / temperature, -1), 1, generator=generator
            )
        else:
            chosen = logits.argmax(-1, keepdim=True)
        out.append(chosen[:, 0].masked_fill(over, -1))
        over = over | torch.isin(chosen[:, 0], ends)
        tick()
        if bool(over.all()):
            break
        step = chosen
    written = torch.stack(out, 1)
    missing = count - written.shape[1]
    return torch.nn.functional.pad(written, (0, missing), value=-1)


def stop_tokens(folder: Path, eos: int | None) -> tuple[int, ...]:
    """Tokens that end a text: those of generation_config.json, else the tokenizer's `eos`."""
    try:
        config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        found = config.eos_token_id
    except (OSError, ValueError):
        found = None
    if found is None:
        found = eos
    many = found if isinstance(found, list | tuple) else [found]
    return tuple(int(token) for token in many if token is not None)
