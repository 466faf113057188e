"""Tiny models that work on the 4-bit cache, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from rows import ARCHITECTURES
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache

from quantize.formats.kv4 import KvScheme
from quantize.model.attention import ATTENTION, KvAttention, KvNumerics
from quantize.model.transformers_api import DecoderArguments, returned_cache
from quantize.serving.kv_cache import use_int4_cache

takes_tokens_back = pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"),
    reason="early releases of transformers do not record what a crop takes back",
)
UNEVEN = KvScheme(group_size=32, symmetric=False, scale_dtype="e4m3")


def kv_model(
    tiny: ModelMaker, model_type: str, scheme: KvScheme | None = None, seed: int = 0, **changes: Any
) -> Any:
    """A tiny model with an uneven S in every attention module, working on the 4-bit cache.

    In float64: the last bit of a float32 product depends on how many tokens are multiplied at once, and now and then
    tips a key over to the next code.
    """
    # Stacked products of experts have no kernel for float64.
    kwargs = {"experts_implementation": "eager"} if ARCHITECTURES[model_type].experts else {}
    model = AutoModelForCausalLM.from_pretrained(
        tiny(model_type, **changes), dtype=torch.float64, **kwargs
    )
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        shape = (model.config.num_key_value_heads, model.config.head_dim)
        layer.self_attn.kv = KvAttention(KvNumerics(scheme or KvScheme()), *shape)
        layer.self_attn.kv.scale.copy_((0.7 * torch.randn(shape, generator=generator)).exp())
    model.set_attn_implementation(ATTENTION)
    use_int4_cache(model)
    return model.eval()


def given(model: Any, cache: Cache) -> dict[str, Any]:
    """The argument that hands `cache` to `model`, by the name that this release of transformers has for it."""
    return {DecoderArguments.of(model.get_decoder()).cache: cache}


def cache_of(output: Any) -> Cache:
    """The cache in what a model returned, which must be there."""
    cache = returned_cache(output)
    assert cache is not None
    return cache


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 290, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def in_pieces(
    model: Any, ids: Tensor, sizes: list[int], cache: Cache, mask: Tensor | None = None
) -> Tensor:
    """Logits [B, T, vocabulary] of `ids` given piece by piece."""
    out, done = [], cache.get_seq_length()
    for piece in ids.split(sizes, dim=1):
        done += piece.shape[1]
        kwargs = given(model, cache)
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            kwargs |= {
                "attention_mask": mask[:, :done],
                "position_ids": positions[:, done - piece.shape[1] : done],
            }
        out.append(logits(model, piece, **kwargs))
    return torch.cat(out, dim=1)


def assert_once_equal(run: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    """`run(seed)` gives two equal tensors, but for a code that tips over by chance: one in three seeds may not."""
    worst = []
    for seed in range(3):
        one, other = run(seed)
        assert one.shape == other.shape
        worst.append(float((one - other).abs().max()))
        if worst[-1] <= 1e-4:
            return
    raise AssertionError(f"differs by {worst}")
