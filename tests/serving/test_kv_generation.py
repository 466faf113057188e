"""generate() on the 4-bit cache says what it says without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from kv_models import assert_once_equal, cache_of, given, kv_model, some_ids, takes_tokens_back
from torch import Tensor

from quantize.errors import UsageError
from quantize.serving.kv_cache import Int4Layer, Int4SlidingLayer

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "min_new_tokens": 8,
    "max_new_tokens": 8,
    "pad_token_id": 0,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 50},
    "beam": {"num_beams": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_equals_generation_without_a_cache(tiny: ModelMaker, model_type: str, mode: str):
    model = kv_model(tiny, model_type)

    def generate(ids: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        torch.manual_seed(3)
        settings = GREEDY | MODES[mode] | kwargs
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(2, 15, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, :6], ids[0, :6] = 0, 0
        out = generate(ids, mask)
        assert {type(layer) for layer in cache_of(out).layers} <= {Int4Layer, Int4SlidingLayer}
        assert cache_of(out).get_seq_length() == ids.shape[1] + 7
        if mode == "sampling":
            assert torch.equal(generate(ids, mask).sequences, out.sequences)
        return out.sequences, generate(ids, mask, use_cache=False).sequences

    assert_once_equal(run)


@takes_tokens_back
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize(
    "settings", [{"prefill_chunk_size": 6}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_chunked_prefill_and_prompt_lookup_equal_greedy(
    tiny: ModelMaker, model_type: str, settings: dict[str, int]
):
    model = kv_model(tiny, model_type)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(1, 5, seed=seed).repeat(1, 4)
        common = GREEDY | {"attention_mask": torch.ones_like(ids)}
        return model.generate(ids, **common, **settings), model.generate(ids, **common)

    assert_once_equal(run)


@takes_tokens_back
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("right", [False, True])
def test_an_assistant_model_changes_nothing(tiny: ModelMaker, model_type: str, right: bool):
    model = kv_model(tiny, model_type)
    assistant = model if right else kv_model(tiny, model_type, num_hidden_layers=1)
    assistant = copy.deepcopy(assistant)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(1, 15, seed=seed)
        common = GREEDY | {"attention_mask": torch.ones_like(ids)}
        return model.generate(ids, assistant_model=assistant, **common), model.generate(
            ids, **common
        )

    assert_once_equal(run)


def test_a_returned_cache_goes_on(tiny: ModelMaker, model_type: str):
    model, ids = kv_model(tiny, model_type), some_ids(2, 15)
    settings = GREEDY | {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    whole = model.generate(ids, **settings)
    half = model.generate(ids, **settings | {"min_new_tokens": 3, "max_new_tokens": 3})
    kept = copy.deepcopy(cache_of(half))
    for cache in (cache_of(half), kept):
        rest = settings | {"min_new_tokens": 5, "max_new_tokens": 5} | given(model, cache)
        rest["attention_mask"] = torch.ones_like(half.sequences)
        assert torch.equal(model.generate(half.sequences, **rest).sequences, whole.sequences)
        assert cache.layers[0].scale is model.model.layers[0].self_attn.kv.scale


def test_generate_with_a_static_cache_is_refused(tiny: ModelMaker):
    with pytest.raises(UsageError, match=r"generate\(\) no cache_implementation"):
        kv_model(tiny, "llama").generate(some_ids(1, 5), cache_implementation="static", **GREEDY)
