"""The one place that names what models and layers of transformers take and return.

transformers renames arguments: in 5.24 the `past_key_values` of models and layers became `cache`.
Names are therefore read off signatures, never concluded from a version, and what no signature names
is an error, so that nothing is lost in silence.

This module is imported while transformers is still importing itself
(`quantize.serving.register`): what leads to models is imported where it is used. Methods of
quantization are in `transformers_quantizer`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from quantize.errors import ModelError, UnderivedError, UsageError
from quantize.formats.native import WEIGHTS_FIELD

__all__ = ["Cache", "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"]

_CACHE_NAMES = ("cache", "past_key_values")
"""What releases call the cache among the arguments of a decoder, newest first."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a call is given by position and by name."""

Attend = Callable[
    [nn.Module, Tensor, Tensor, Tensor, Tensor | None, float, Mapping[str, Any]], Tensor | None
]
"""(attention module, query [B, H, T, d], key and value [B, Hkv, S, d], mask, scaling, what is asked
for of ATTENTION_OPTIONS) → mixed values [B, H, T, d]; None leaves them to SDPA."""

ATTENTION_OPTIONS = ("softcap", "s_aux")
"""What layers may ask of attention that SDPA cannot do: capped scores and sinks."""


# Models


def require_known_type(folder: Path, facts: Mapping[str, Any]) -> None:
    """UnderivedError for a config.json whose model is no class of this release of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = facts.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if own := facts.get("auto_map"):
        values = own.values() if isinstance(own, dict) else ()
        files = sorted({v.partition("--")[2] or v for v in values if isinstance(v, str)})
        code = f"{files[0].partition('.')[0]}.py" if files else "auto_map"
        raise UnderivedError(
            f"{folder}/config.json: model_type {kind!r} is no model of {release()}: it needs code of "
            f"its own ({code}, which auto_map names), and pq runs no code that comes with a model; "
            "take its copy in transformers' own form (often published as NAME-hf), or a release of "
            f"transformers that knows {kind!r}"
        )
    raise UnderivedError(
        f"{folder}/config.json: model_type {kind!r} is not supported: {release()} knows no such "
        "model; a newer release may"
    )


def read_config(folder: Path) -> Any:
    """Parse config.json by transformers, without what it says of quantization."""
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return _forget_packing(config)


def plain_config(config: Any) -> Any:
    """A copy of a config that says nothing of quantization."""
    return _forget_packing(copy.deepcopy(config))


def _forget_packing(config: Any) -> Any:
    for field in ("quantization_config", WEIGHTS_FIELD):
        if hasattr(config, field):
            delattr(config, field)
    return config


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def decoder_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the text decoder under the names that most models use, also where config.json calls
    them otherwise, keeps them in a section of its own or leaves them to its class.

    facts: config.json as it is; what it says under these names goes before.
    """
    try:
        config = read_config(folder)
        found = sizes_of(config)
        if config.get_text_config(decoder=True) is not config:
            return found  # names outside the section may be of a tower
    except Exception:
        found = {}
    return found | {k: v for k, v in facts.items() if k in _SIZES and not isinstance(v, list)}


def text_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the text decoder's config, those that its class fills in among them (which
    layers slide, for instance), as plain data.

    facts: config.json as it is, whose own fields it is where transformers does not know the model.
    """
    section = facts.get("text_config")
    raw = {**facts, **section} if isinstance(section, dict) else dict(facts)
    try:
        text = read_config(folder).get_text_config(decoder=True)
        return raw | {k: v for k, v in text.to_dict().items() if v is not None}
    except Exception:
        return raw


def sizes_of(config: Any) -> dict[str, Any]:
    """Sizes of the text decoder of a config as `decoder_facts` calls them."""
    text = config.get_text_config(decoder=True)
    found: dict[str, Any] = {}
    for name in _SIZES:
        value = _field(text, name)
        # Layers of several sizes: each block's own are derived.
        found[name] = max(value) if isinstance(value, list | tuple) and value else value
    if found["num_attention_heads"] is None:
        found["num_attention_heads"] = 1  # of a model without attention (Mamba); nobody asks
    if text is not config:
        # Whether the head is tied is the whole model's to say; its class knows older files that say
        # it in the section.
        tied = getattr(config, "tie_word_embeddings", found["tie_word_embeddings"])
        found["tie_word_embeddings"] = tied
    return found


def _field(config: Any, name: str) -> Any:
    """A field of a config; of one that layers have each for themselves, which configs refuse to give
    as one (Gemma 4: `head_dim`), all values."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        layers = range(config.num_hidden_layers)
        return [getattr(config.per_layer_config[index], name) for index in layers]


def rope_types() -> list[str]:
    """The values of `rope_type` that transformers knows."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return sorted({"default", *ROPE_INIT_FUNCTIONS})


def build_model(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """The causal language model of a config, its weights not initialized by any checkpoint."""
    auto = _loader_of(config)
    plain = copy.deepcopy(config)  # which building a model writes to
    try:
        model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    except KeyError:  # a table of its own of the attention that it knows
        return auto.from_config(plain, dtype=dtype)
    if _reads_attention_name(model) or not (
        model._supports_sdpa or model._supports_attention_backend
    ):
        return auto.from_config(plain, dtype=dtype)
    if not model._supports_sdpa:
        # Such models add a mask themselves, which is left out where SDPA would know it to be causal.
        model.set_attn_implementation(f"{attention}{MASKED}")
    return model


class _OneClass:
    """Makes models of one class as the automatic ones do."""

    def __init__(self, kind: Any) -> None:
        self.from_config, self.from_pretrained = kind._from_config, kind.from_pretrained


def _loader_of(config: Any) -> Any:
    """What makes the model of a config: the automatic class that makes the one that `architectures`
    names; without it, and where both know a type, that of causal models; where none does (the text
    decoder of Emu3 saved alone), the class itself."""
    causal, image_text = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    known = [auto for auto in (causal, image_text) if type(config) in auto._model_mapping]
    named = getattr(config, "architectures", None) or ()
    fitting = (a for a in known if a._model_mapping[type(config)].__name__ in named)
    found = next(fitting, known[0] if known else None)
    if found is None:
        kinds = (getattr(transformers, name, None) for name in named if isinstance(name, str))
        own = (k for k in kinds if getattr(k, "config_class", None) is type(config))
        found = next((_OneClass(k) for k in own if hasattr(k, "get_output_embeddings")), causal)
    return found


_TEXT_MODEL = {
    # Its forward reads `image_outputs` of its decoder's output, which has none in transformers 5.24.
    "Llama4ForConditionalGeneration": "language_model",
}
"""Classes that fail on text alone → the part of them that does what they would do."""


def text_model(model: Any) -> Any:
    """What of a model to give text to: the model, or where that fails on text alone its decoder
    with its head."""
    part = _TEXT_MODEL.get(type(model).__name__)
    return model if part is None else model.get_submodule(part)


MASKED = "-masked"
"""Behind the name of an attention implementation: the same, always given a mask of numbers."""

_READS_NAME = re.compile(
    r"""_attn_implementation\s*(?:[!=]=|in\b|not in\b)[^\n]*["'](?:sdpa|eager)["']"""
)


def _reads_attention_name(model: Any) -> bool:
    """Whether a model's code does otherwise for attention that is called otherwise."""
    module = inspect.getmodule(type(model))
    return module is not None and bool(_READS_NAME.search(inspect.getsource(module)))


def load_pretrained(folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load a model by transformers → (model, names of
    tensors that were missing)."""
    model, info = _loader_of(read_config(folder)).from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return model, sorted(info["missing_keys"])


def load_tensors(
    folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Load the causal language model of a folder's config.json from tensors in memory, by the
    names that its checkpoint has for them → (model, names that were missing)."""
    config = read_config(folder)
    cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    model, info = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    return model, sorted(info["missing_keys"])


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; a broken one raises plain Exception or any other class."""
    return transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )


def silence(warnings: bool = False) -> None:
    """Keep progress bars and advice of transformers off the terminal; errors still raise, and
    warnings are shown where asked for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    (logging.set_verbosity_warning if warnings else logging.set_verbosity_error)()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """tokens [B, T] → logits [B, T, V] of one pass that keeps no keys and values."""
    logits: Tensor = text_model(model)(tokens, use_cache=False).logits
    return logits


def activation(name: str) -> nn.Module:
    """The activation function that config.json calls by this name; KeyError for none."""
    module: nn.Module = ACT2FN[name]
    return module


def is_conv1d(module: object) -> bool:
    """Whether a module is a linear with its weight [inputs, outputs] (GPT-2)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_silu(module: object) -> bool:
    """Whether an activation is x·σ(x), by torch's class or transformers'."""
    return isinstance(module, nn.SiLU | type(ACT2FN["silu"]))


# Decoder layers


@dataclass(frozen=True)
class LayerCall:
    """What a model gives one of its decoder layers beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call a layer on hidden states [B, T, D], which releases return
        alone or first of several."""
        out = layer(hidden, *self.args, **self.kwargs)
        states: Tensor = out[0] if isinstance(out, tuple | list) else out
        return states


# Attention


def register_attention(name: str, attend: Attend) -> None:
    """Make `name` an attention implementation: what `attend` gives, SDPA where that is None."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        options = {n: kwargs[n] for n in ATTENTION_OPTIONS if kwargs.get(n) is not None}
        mixed = attend(module, query, key, value, attention_mask, scaling, options)
        if mixed is None:
            out: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
            return out
        return mixed.transpose(1, 2).contiguous(), None

    for called, mask in ((name, sdpa_mask), (f"{name}{MASKED}", eager_mask)):
        AttentionInterface.register(called, forward)
        AttentionMaskInterface.register(called, mask)


def attention_name(model: Any) -> str:
    """What the attention implementation of a model is called."""
    return str(model.config._attn_implementation)


# Caches of keys and values


@dataclass(frozen=True)
class DecoderArguments:
    """Arguments of a decoder's `forward`: where its cache goes."""

    names: tuple[str, ...]
    """All that can be given by position, in order."""
    cache: str
    """What this release calls the cache."""

    @classmethod
    def of(cls, decoder: nn.Module) -> DecoderArguments:
        """Read them off the signature; ModelError where no argument is known to be the cache."""
        names = tuple(inspect.signature(decoder.forward).parameters)
        cache = next((name for name in _CACHE_NAMES if name in names), None)
        if cache is None:
            raise ModelError(
                f"{type(decoder).__name__} of {release()} takes no argument "
                f"{' or '.join(_CACHE_NAMES)}, so that pq cannot give it an INT4 KV cache; "
                "install an earlier release of transformers"
            )
        return cls(names, cache)

    def given_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The cache in a call, under whatever name; None without one, UsageError for two."""
        given = self._by_name(args, kwargs)
        caches = [given[name] for name in _CACHE_NAMES if given.get(name) is not None]
        if any(cache is not caches[0] for cache in caches):
            raise UsageError(f"{' and '.join(_CACHE_NAMES)} are two caches for one call; pass one")
        return caches[0] if caches else None

    def with_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any) -> Arguments:
        """The same call with `cache`, under the name that this release knows."""
        others = {name: value for name, value in kwargs.items() if name not in _CACHE_NAMES}
        place = self.names.index(self.cache)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), others
        return args, others | {self.cache: cache}

    def makes_cache(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether the decoder makes a cache of its own in a call that gives it none."""
        asked = self._by_name(args, kwargs).get("use_cache")
        return bool(_settled_use_cache(decoder, asked))

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**kwargs, **dict(zip(self.names, args, strict=False))}


def _settled_use_cache(decoder: Any, asked: bool | None) -> bool | None:
    """What a call of the decoder makes of its `use_cache`, by the very rule of this release."""
    from transformers.utils.generic import merge_with_config_defaults

    def use_cache_of(self: Any, use_cache: bool | None = None, **kwargs: Any) -> bool | None:
        return use_cache

    settled: bool | None = merge_with_config_defaults(use_cache_of)(decoder, use_cache=asked)
    return settled


def returned_cache(output: Any) -> Cache | None:
    """The cache in what a model or decoder returned; None without one."""
    values = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Cache)), None)


def recomputes_layers(decoder: Any) -> bool:
    """Whether gradients may need layers to run twice (gradient checkpointing).

    transformers then warns and drops caches.
    """
    return bool(decoder.training and getattr(decoder, "gradient_checkpointing", False))


def unused_cache(decoder: nn.Module) -> ModelError:
    """The error for a decoder that took a cache and went on without it."""
    return ModelError(
        f"{type(decoder).__name__} of {release()} did not use the INT4 KV cache that pq gave it: "
        "keys and values would take 16 bits; install an earlier release of transformers"
    )


def release() -> str:
    """What to call the library in a message."""
    return f"transformers {transformers.__version__}"
