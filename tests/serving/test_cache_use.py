"""A model takes its 4-bit cache under any name that transformers had for it, and never works without it in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from kv_models import cache_of, given, kv_model, logits, some_ids
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from quantize.errors import ModelError, UsageError
from quantize.model import transformers_api
from quantize.model.transformers_api import DecoderArguments, returned_cache
from quantize.serving.kv_cache import Int4Layer, int4_cache, use_int4_cache

NOT_USED = (
    "LlamaModel of transformers .* did not use the INT4 KV cache .*; install an earlier release"
)
OLD_NAME = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")


def before_call(module: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Let `module` see other arguments than it is given, by name."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, change(kwargs)), with_kwargs=True
    )


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: kwargs | {name: None}


@OLD_NAME
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("part", ["whole", "decoder"])
def test_a_cache_is_used_under_either_name(tiny: ModelMaker, name: str, part: str):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    called = model if part == "whole" else model.model
    for cache in (int4_cache(model), DynamicCache(config=model.config)):
        assert cache_of(called(ids, **{name: cache})) is cache
        assert {type(layer) for layer in cache.layers} == {Int4Layer}
        assert cache.get_seq_length() == 8


@OLD_NAME
def test_none_under_the_other_name_is_no_cache(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    cache = int4_cache(model)
    model.model(ids, **{"cache": None, "past_key_values": None} | given(model, cache))
    assert cache.get_seq_length() == 8
    assert isinstance(
        cache_of(model.model(ids, cache=None, past_key_values=None)).layers[0], Int4Layer
    )


def test_two_caches_are_refused(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    with pytest.raises(UsageError, match="cache and past_key_values are two caches for one call"):
        model.model(ids, cache=int4_cache(model), past_key_values=int4_cache(model))


def test_tuples_hold_the_cache_too(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    assert isinstance(cache_of(model(ids, return_dict=False)).layers[0], Int4Layer)
    assert returned_cache(model(ids, return_dict=False, use_cache=False)) is None


def test_a_given_cache_is_filled_without_use_cache(tiny: ModelMaker):
    model = kv_model(tiny, "llama")
    cache = int4_cache(model)
    logits(model, some_ids(1, 8), use_cache=False, **given(model, cache))
    assert cache.get_seq_length() == 8


def test_a_name_that_is_yet_to_come_is_refused(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch):
    model = kv_model(tiny, "llama")
    monkeypatch.setattr(transformers_api, "_CACHE_NAMES", ("store",))
    with pytest.raises(
        ModelError,
        match=r"LlamaModel of transformers \S+ takes no argument store, so that pq cannot",
    ):
        use_int4_cache(model)


class Decoder(nn.Module):
    def forward(self, input_ids: object = None, memory: object = None, **kwargs: object) -> None:
        """A decoder that takes its cache under a name of its own."""


def test_a_decoder_without_a_known_name_is_refused():
    with pytest.raises(
        ModelError, match=r"Decoder of .* takes no argument cache or past_key_values, "
    ):
        DecoderArguments.of(Decoder())


def the_decoder(model: Any) -> nn.Module:
    return model.model


def one_layer(model: Any) -> nn.Module:
    return model.model.layers[1]


def one_attention(model: Any) -> nn.Module:
    return model.model.layers[1].self_attn


@pytest.mark.parametrize("place", [the_decoder, one_layer, one_attention])
@pytest.mark.parametrize("in_copy", [False, True])
def test_a_cache_that_is_not_handed_on_is_an_error(
    tiny: ModelMaker, place: Callable[..., nn.Module], in_copy: bool
):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    before_call(place(model), without(*given(model, DynamicCache())))
    model = copy.deepcopy(model) if in_copy else model
    ways: list[Callable[[], Any]] = [
        lambda: model(ids),
        lambda: model.model(ids),
        lambda: model(ids, return_dict=False),
        lambda: model(ids, **given(model, int4_cache(model))),
        lambda: model.generate(ids, max_new_tokens=2, pad_token_id=0),
        lambda: model.generate(ids, max_new_tokens=2, pad_token_id=0, num_beams=2),
    ]
    for run in ways:
        with pytest.raises(ModelError, match=NOT_USED) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert logits(model, ids, use_cache=False).isfinite().all()  # needs none


def test_a_cache_of_the_decoders_own_is_an_error(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)

    def replace(_: nn.Module, args: object, kwargs: object, output: Any) -> tuple[object, ...]:
        others = tuple(value for value in output.values() if not isinstance(value, Cache))
        return (*others, DynamicCache(config=model.config))

    model.model.register_forward_hook(replace, with_kwargs=True, prepend=True)
    with pytest.raises(ModelError, match=NOT_USED):
        model.model(ids)


def test_other_attention_may_go_without(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    before_call(the_decoder(model), without(*given(model, DynamicCache())))
    model.set_attn_implementation("sdpa")
    assert isinstance(cache_of(model(ids)).layers[0], DynamicLayer)


def test_gradient_checkpointing_drops_caches_as_it_says(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    expected = logits(model.eval(), ids, use_cache=False)
    cache = int4_cache(model)
    out = model.train()(ids, **given(model, cache))
    torch.testing.assert_close(out.logits.detach(), expected)
    out.logits.sum().backward()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        # Whether nothing is kept here depends on the release; what is kept is in 4 bits.
        made = returned_cache(model(ids))
    assert made is None or {type(layer) for layer in made.layers} == {Int4Layer}


@pytest.mark.slow
def test_compiled_models_use_it(tiny: ModelMaker):
    model, ids = kv_model(tiny, "llama"), some_ids(1, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(ids, use_cache=True)
        assert torch.equal(out.logits, logits(model, ids))
        assert isinstance(cache_of(out).layers[0], Int4Layer)
        compiled(ids[:, :1], **given(model, cache_of(out)))
    assert cache_of(out).get_seq_length() == 9


def test_commands_name_no_argument_of_the_past(
    pq: Callable[..., tuple[int, str, str]], tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    """With warnings of transformers as errors (pyproject.toml), converting, evaluating and verifying go on."""
    data = ["--dataset", text_file, "--device", "cpu"]
    convert = [
        "convert",
        "--model",
        tiny("llama"),
        "--recipe",
        "fireq-kv",
        "--output",
        tmp_path / "out",
    ]
    for line in (
        [*convert, *data, "--nsamples", 4, "--seqlen", 32],
        ["eval", tmp_path / "out", *data, "--baseline", tiny("llama"), "--seqlen", 32],
        ["verify", tmp_path / "out", "--parent", tiny("llama")],
    ):
        code, _, err = pq(*line)
        assert code == 0, err
        assert "Warning" not in err
