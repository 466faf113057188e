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

from quantize.errors import ModelError, UsageError

__all__ = ["Cache", "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"]

_CACHE_NAMES = ("cache", "past_key_values")
"""What releases call the cache among the arguments of a decoder, newest first."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a call is given by position and by name."""

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
"""(attention module, query [B, H, T, d], key and value [B, Hkv, S, d], mask, scaling) → mixed
values [B, H, T, d]; None leaves them to SDPA."""


# Models


def read_config(folder: Path) -> Any:
    """Parse config.json by transformers, without what it says of quantization."""
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def rope_types() -> list[str]:
    """The values of `rope_type` that transformers knows."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return sorted({"default", *ROPE_INIT_FUNCTIONS})


def build_model(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """The causal language model of a config, its weights not initialized by any checkpoint."""
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention
    )


def load_pretrained(folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load a causal language model by transformers → (model, names of
    tensors that were missing)."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
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


def silence() -> None:
    """Keep progress bars and advice of transformers off the terminal; errors still raise."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """tokens [B, T] → logits [B, T, V] of one pass that keeps no keys and values."""
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def place_rotary_tables(decoder: nn.Module, config: Any, device: torch.device) -> None:
    """Compute a decoder's rotary tables: buffers absent from checkpoints
    and from the meta device."""
    decoder._modules["rotary_emb"] = type(decoder.get_submodule("rotary_emb"))(config=config).to(
        device
    )


def activation(name: str) -> nn.Module:
    """The activation function that config.json calls by this name; KeyError for none."""
    module: nn.Module = ACT2FN[name]
    return module


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
        alone or first of a tuple."""
        out = layer(hidden, *self.args, **self.kwargs)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states


class _Recorder(nn.Module):
    """Stands in for a decoder layer: passes hidden states on and keeps what else it was given."""

    call: LayerCall

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Earlier releases choose a mask (sliding window or full) by this attribute of the layer.
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ModelError(
                f"{_release()} gives layers a cache where none was asked for, which pq cannot "
                "replay; install an earlier release"
            )
        self.call = LayerCall(args, kwargs)
        return hidden_states


def layer_calls(
    decoder: nn.Module,
    layers: str,
    final_norm: str,
    hidden: Tensor,
    config: Any,
) -> tuple[Tensor, list[LayerCall]]:
    """Run a decoder's own forward without its layers → (input of the first one, calls of all).

    layers, final_norm: names of these children. hidden: embedded tokens [B, T, D]. The decoder,
    which may be on the meta device, stays as it is.
    """
    shell = copy.copy(decoder)
    shell._modules = dict(shell._modules)
    recorders = [_Recorder(layer) for layer in decoder.get_submodule(layers).children()]
    shell._modules[layers] = nn.ModuleList(recorders)
    shell._modules[final_norm] = nn.Identity()
    place_rotary_tables(shell, config, hidden.device)
    with torch.no_grad():
        out = shell(inputs_embeds=hidden, use_cache=False)
    return out.last_hidden_state, [recorder.call for recorder in recorders]


# Attention


def register_attention(name: str, attend: Attend) -> None:
    """Make `name` an attention implementation: what `attend` gives, SDPA where that is None."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mixed = attend(module, query, key, value, attention_mask, scaling)
        if mixed is None:
            out: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
            return out
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)


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
                f"{type(decoder).__name__} of {_release()} takes no argument "
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
        f"{type(decoder).__name__} of {_release()} did not use the INT4 KV cache that pq gave it: "
        "keys and values would take 16 bits; install an earlier release of transformers"
    )


def _release() -> str:
    return f"transformers {transformers.__version__}"
