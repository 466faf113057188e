"""The 4-bit cache holds what one full pass computes, whatever it goes through, and refuses what is not its own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import ModelMaker
from kv_models import (
    UNEVEN,
    assert_once_equal,
    cache_of,
    given,
    in_pieces,
    kv_model,
    logits,
    some_ids,
    takes_tokens_back,
)
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from quantize.errors import ModelError, UsageError
from quantize.formats.kv4 import KvScheme, fake_quantize
from quantize.model.attention import ATTENTION
from quantize.model.transformers_api import returned_cache
from quantize.serving.kv_cache import (
    Int4Layer,
    Int4SlidingLayer,
    cache_bytes,
    int4_cache,
    use_int4_cache,
)


@pytest.mark.parametrize(
    ("sizes", "scheme"),
    [
        ([1] * 20, KvScheme()),
        ([7, 1, 9, 3], KvScheme()),
        ([20], KvScheme()),
        ([7, 1, 9, 3], UNEVEN),
    ],
    ids=["tokens", "chunks", "whole", "asymmetric"],
)
def test_pieces_give_the_logits_of_one_pass(
    tiny: ModelMaker, model_type: str, scheme: KvScheme, sizes: list[int]
):
    model = kv_model(tiny, model_type, scheme)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(2, 20, seed=seed)
        return in_pieces(model, ids, sizes, int4_cache(model)), logits(model, ids, use_cache=False)

    assert_once_equal(run)


@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 9, 3]], ids=["tokens", "chunks"])
def test_padded_batches_give_the_logits_of_one_pass(
    tiny: ModelMaker, model_type: str, sizes: list[int]
):
    model = kv_model(tiny, model_type)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :5], mask[2, :11] = 0, 0

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(3, 20, seed=seed)
        got = in_pieces(model, ids, sizes, int4_cache(model), mask)
        alone = [
            logits(model, row[None, keep.bool()], use_cache=False)[0]
            for row, keep in zip(ids, mask, strict=True)
        ]
        return got[mask.bool()], torch.cat(alone)

    assert_once_equal(run)


def test_the_stored_scale_matters(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 20)
    plain = logits(model, ids, use_cache=False)
    for layer in model.model.layers:
        layer.self_attn.kv.scale.fill_(1)
    assert (logits(model, ids, use_cache=False) - plain).abs().max() > 1e-2
    assert (in_pieces(model, ids, [10, 10], int4_cache(model)) - plain).abs().max() > 1e-2


def test_bytes_are_a_quarter_of_16_bits(tiny: ModelMaker, model_type: str):
    model = kv_model(tiny, model_type).bfloat16()
    ids = some_ids(2, 40)
    packed, plain = int4_cache(model), DynamicCache(config=model.config)
    logits(model, ids, **given(model, packed))
    model.set_attn_implementation("sdpa")
    logits(model, ids, **given(model, plain))
    assert not any(isinstance(layer, (Int4Layer, Int4SlidingLayer)) for layer in plain.layers)
    assert cache_bytes(packed) / cache_bytes(plain) == 34 / 128
    assert cache_bytes(plain) >= 2 * 2 * 2 * model.config.num_key_value_heads * 64 * 2 * (
        7 if packed.is_sliding[0] else 40
    )
    kinds = {Int4SlidingLayer} if model_type == "mistral" else {Int4Layer}
    assert {type(layer) for layer in packed.layers} == kinds


def test_half_precision_models_read_back_what_they_stored(tiny: ModelMaker, model_type: str):
    model = kv_model(tiny, model_type).bfloat16()
    ids = some_ids(2, 20)
    got, expected = (
        in_pieces(model, ids, [1] * 20, int4_cache(model)),
        logits(model, ids, use_cache=False),
    )
    assert got.dtype == torch.bfloat16
    assert (got - expected).float().abs().mean() < 0.05 * expected.float().std()


def test_update_hands_out_rounded_keys_in_the_space_of_s(tiny: ModelMaker):
    model = kv_model(tiny, "llama")
    kv = model.model.layers[1].self_attn.kv
    key, value = torch.randn(2, 1, 2, 5, 64).unbind()
    keys, values = int4_cache(model).update(key, value, 1)
    assert keys.pq_stored
    assert torch.equal(keys, fake_quantize(key * kv.scale[:, None], kv.scheme))
    assert torch.equal(values, fake_quantize(value, kv.scheme))


SLIDES_BACK = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="a cropped sliding window loses count of its tokens there, whatever it stores",
)


@takes_tokens_back
@pytest.mark.parametrize("model_type", ["llama", pytest.param("mistral", marks=SLIDES_BACK)])
def test_cropped_tokens_leave_no_trace(tiny: ModelMaker, model_type: str):
    model = kv_model(tiny, model_type)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(2, 20, seed=seed)
        cache = int4_cache(model)
        cache.activate_past_recording()
        in_pieces(model, ids[:, :12], [12], cache)
        cache.crop(0)
        in_pieces(model, some_ids(2, 4, seed=99), [3, 1], cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 12
        return in_pieces(model, ids[:, 12:], [5, 3], cache), logits(model, ids, use_cache=False)[
            :, 12:
        ]

    assert_once_equal(run)


@takes_tokens_back
def test_past_recording_survives_the_change_to_4_bits(tiny: ModelMaker):
    model = kv_model(tiny, "mistral")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    logits(model, some_ids(1, 20), **given(model, cache))
    assert isinstance(cache.layers[0], Int4SlidingLayer)
    assert cache.layers[0].keys.shape[-2] == 20


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_reset_cache_is_empty(tiny: ModelMaker, model_type: str):
    model, ids = kv_model(tiny, model_type), some_ids(2, 12)
    cache = int4_cache(model)
    first = in_pieces(model, ids, [8, 4], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == 0
    assert torch.equal(in_pieces(model, ids, [8, 4], cache), first)
    cache.reset()
    assert in_pieces(model, ids[:1], [8, 4], cache).shape[0] == 1  # another batch size


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_rows_move_with_their_scales(tiny: ModelMaker, model_type: str):
    model = kv_model(tiny, model_type)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(3, 16, seed=seed)
        cache = int4_cache(model)
        in_pieces(model, ids[:, :12], [12], cache)
        cache.reorder_cache(torch.tensor([2, 0, 2]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 5]))
        now = ids[[2, 0, 2]]
        now[:, 12:] = ids[:, 12:]
        return in_pieces(model, now[:, 12:], [4], cache), logits(model, now, use_cache=False)[
            :, 12:
        ]

    assert_once_equal(run)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("which", ["lazy", "typed", "foreign"])
def test_an_empty_cache_becomes_the_models(tiny: ModelMaker, model_type: str, which: str):
    model, foreign = kv_model(tiny, model_type), kv_model(tiny, model_type, seed=1)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids = some_ids(2, 20, seed=seed)
        if which == "foreign":
            cache = int4_cache(foreign)
        else:
            cache = DynamicCache(config=model.config if which == "typed" else None)
            heads = model.config.num_key_value_heads
            cache.early_initialization(2, heads, 64, torch.bfloat16, torch.device("cpu"))
        got = in_pieces(model, ids, [12, 1, 7], cache)
        assert {type(layer) for layer in cache.layers} <= {Int4Layer, Int4SlidingLayer}
        assert cache.is_sliding[0] == (model_type == "mistral" and which != "lazy")
        return got, logits(model, ids, use_cache=False)

    assert_once_equal(run)


def test_memory_set_up_early_holds_bytes(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(2, 8)
    cache, late = int4_cache(model), int4_cache(model)
    cache.layers[0].lazy_initialization(torch.zeros(2, 2, 0, 64), torch.zeros(2, 2, 0, 64))
    assert torch.equal(in_pieces(model, ids, [8], cache), in_pieces(model, ids, [8], late))
    assert cache.layers[0].keys.dtype == torch.uint8


def test_a_forward_makes_its_cache_as_transformers_would(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    mask = torch.ones_like(ids)
    assert isinstance(cache_of(model(ids)).layers[0], Int4Layer)
    assert isinstance(
        cache_of(model.model(ids, mask, None, None)).layers[0], Int4Layer
    )  # by position
    assert returned_cache(model(ids, use_cache=False)) is None
    model.config.use_cache = False
    assert returned_cache(model(ids)) is None
    model.config.use_cache = True
    model.model.gradient_checkpointing = True
    assert returned_cache(model.train()(ids)) is None


def test_asking_twice_and_copying_change_nothing(tiny: ModelMaker):
    model = kv_model(tiny, "llama")
    use_int4_cache(model)
    use_int4_cache(model.model)
    assert len(model.model._forward_pre_hooks) == 1
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.kv.scale.fill_(3)
    assert torch.equal(cache_of(twin(some_ids(1, 4))).layers[0].scale, torch.full((2, 64), 3.0))


def test_layers_without_kv_stay_plain(tiny: ModelMaker):
    model = kv_model(tiny, "llama")
    del model.model.layers[1].self_attn.kv

    def run(seed: int) -> tuple[Tensor, Tensor]:
        ids, cache = some_ids(1, 10, seed=seed), int4_cache(model)
        assert [type(layer) for layer in cache.layers] == [Int4Layer, DynamicLayer]
        return in_pieces(model, ids, [6, 4], cache), logits(model, ids, use_cache=False)

    assert_once_equal(run)


def test_other_attention_stays_plain_and_cannot_read_4_bits(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 10)
    cache = int4_cache(model)
    in_pieces(model, ids, [10], cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        UsageError, match=r"needs attention 'pq', the model has 'sdpa'; call model\.set_attn_impl"
    ):
        model(ids[:, :1], **given(model, cache))
    with pytest.raises(UsageError, match="needs attention 'pq'"):
        int4_cache(model)
    assert cache.get_seq_length() == 10
    assert isinstance(cache_of(model(ids)).layers[0], DynamicLayer)
    model.set_attn_implementation(ATTENTION)
    assert model(ids[:, :1], **given(model, cache)).logits.isfinite().all()


def test_a_model_without_kv_is_refused(tiny: ModelMaker):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    for make in (int4_cache, use_int4_cache):
        with pytest.raises(ModelError, match="no attention module of the model carries `kv`"):
            make(model)


def test_a_wrong_cache_is_refused_and_left_as_it_was(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(2, 6)

    def filled(other: PreTrainedModel) -> Cache:
        cache: Cache = cache_of(other(ids))
        assert cache.get_seq_length() == 6
        return cache

    plain = kv_model(tiny, "llama")
    plain.set_attn_implementation("sdpa")
    deeper = kv_model(tiny, "llama", num_hidden_layers=3)
    wrong = {
        "it has 3 layers, the model 2": filled(deeper),
        "has 3 layers": DynamicCache(config=deeper.config),
        "its key scales differ": filled(kv_model(tiny, "llama", seed=1)),
        "key scales differ; pass an empty cache": filled(kv_model(tiny, "llama", head_dim=32)),
        "key scales differ": filled(kv_model(tiny, "llama", UNEVEN)),
        "6 tokens that are not in 4 bits": filled(plain),
        "layers of type StaticLayer": StaticCache(config=model.config, max_cache_len=32),
    }
    for words, cache in wrong.items():
        kinds, held = [type(layer) for layer in cache.layers], cache_bytes(cache)
        before = [layer.keys.clone() for layer in cache.layers if layer.keys is not None]
        for _ in range(2):
            with pytest.raises(UsageError, match=words):
                model(ids[:, :1], **given(model, cache))
        assert [type(layer) for layer in cache.layers] == kinds
        assert cache_bytes(cache) == held
        for layer, keys in zip(cache.layers, before, strict=False):
            assert torch.equal(layer.keys, keys)


def test_another_batch_size_is_refused_and_the_cache_goes_on(tiny: ModelMaker, model_type: str):
    model, ids = kv_model(tiny, model_type), some_ids(2, 12)
    whole = in_pieces(model, ids, [6, 6], int4_cache(model))
    cache = int4_cache(model)
    in_pieces(model, ids[:, :6], [6], cache)
    with pytest.raises(
        UsageError,
        match=r"holds a batch of 2, the input is a batch of 3; .*batch_repeat_interleave",
    ):
        model(some_ids(3, 1), **given(model, cache))
    assert torch.equal(in_pieces(model, ids[:, 6:], [6], cache), whole[:, 6:])
    with pytest.raises(UsageError, match=r"it holds . heads of 64 channels, the keys have 5 of 64"):
        cache.update(torch.zeros(2, 5, 1, 64), torch.zeros(2, 5, 1, 64), 0)
    assert cache.get_seq_length() == 12
