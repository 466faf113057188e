"""A transformers cache that stores keys and values in 4 bits.

Each token of each head is one record of bytes (`KvCodes.records`), so that the layers grow, crop,
slide, reorder and repeat records by the very code that transformers uses for plain keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantize.errors import ModelError, UsageError
from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.api import quantize_records, takes
from quantize.kernels.attention.reference import read_reference, store_reference
from quantize.model.attention import ATTENTION, KvAttention
from quantize.model.transformers_api import (
    Cache,
    DecoderArguments,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    attention_name,
    recomputes_layers,
    returned_cache,
    unused_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "pass an empty cache, or none"


class _Records:
    """Stores records of K·S and V where the layer class it precedes stores keys and values."""

    # transformers would take a subclass that names one for every model's layers of that type
    _layer_type = None
    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool
    awaits_tokens = False
    """Whether the model was given this layer and has not stored anything in it yet."""

    def __init__(self, kv: KvAttention, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kv = kv

    @property
    def scheme(self) -> KvScheme:
        """Layout of the records."""
        return self.kv.scheme

    @property
    def scale(self) -> Tensor:
        """S [Hkv, d] of the model whose tokens these are."""
        return self.kv.scale

    def lazy_initialization(self, *states: Tensor) -> None:
        """Called with the first states or records: whatever their type, bytes are stored."""
        super().lazy_initialization(*(state[..., :0].to(torch.uint8) for state in states))  # type: ignore[misc]

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store key and value [B, Hkv, T, d]; return those of all tokens that the new
        ones may see, [B, Hkv, S, d].

        Both are float32 as they read back, keys times S and marked `pq_stored`; or the records
        themselves, uint8, where a kernel can read them. UsageError, before anything is stored,
        where shapes are not those of the model or batch that the cache holds.
        """
        self._check(key, value)
        self.awaits_tokens = False
        packed = takes(key, self.scheme)
        entering = self.kv.entering(key, value)
        stored = (quantize_records if packed else store_reference)(*entering, self.scheme)
        keys, values = super().update(*stored, *args, **kwargs)  # type: ignore[misc]
        if packed:
            return keys, values
        keys, values = (
            read_reference(records, self.scheme, key.shape[-1]) for records in (keys, values)
        )
        keys.pq_stored = True  # type: ignore[attr-defined]  # read by KvAttention
        return keys, values

    def belongs_to(self, kv: KvAttention) -> bool:
        """Whether records are those of `kv`: rounded alike, with the same S, shifts and rotations."""
        if self.kv is not kv and self.kv.is_like(kv):
            # Copies of a cache hold a copy of S; compared once, they share the model's again.
            self.kv = kv
        return self.kv is kv

    def _check(self, key: Tensor, value: Tensor) -> None:
        for name, states in (("keys", key), ("values", value)):
            if (states.shape[1], states.shape[3]) != tuple(self.scale.shape):
                H, d = self.scale.shape
                raise UsageError(
                    f"the cache is another model's: it holds {H} heads of {d} channels, "
                    f"the {name} have {states.shape[1]} of {states.shape[3]}; {_REMEDY}"
                )
        if (
            self.is_initialized
            and self.keys is not None
            and self.keys.numel()
            and len(self.keys) != len(key)
        ):
            raise UsageError(
                f"the cache holds a batch of {len(self.keys)}, the input is a batch of {len(key)}; "
                "give both the same size (batch_repeat_interleave), or pass an empty cache"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        # Early releases of transformers only overwrite them with zeros.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()  # type: ignore[misc]


class Int4Layer(_Records, DynamicLayer):  # type: ignore[misc]
    """All tokens of one attention layer."""


class Int4SlidingLayer(_Records, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The last `sliding_window` − 1 tokens of one attention layer."""


# Layer class that transformers makes, or ours → ours.
_PACKED: Mapping[type, type[Int4Layer] | type[Int4SlidingLayer]] = {
    DynamicLayer: Int4Layer,
    Int4Layer: Int4Layer,
    DynamicSlidingWindowLayer: Int4SlidingLayer,
    Int4SlidingLayer: Int4SlidingLayer,
}


def int4_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache for `model`, whose attention modules carry
    `kv`; ModelError where none does.

    UsageError when the model's attention is not "pq": no other one knows that
    stored keys are multiplied by S.
    """
    decoder = model.get_decoder()
    kv = _kv_modules(decoder)
    if not _understands(decoder):
        raise UsageError(f"an INT4 cache needs attention {ATTENTION!r}{_other_attention(decoder)}")
    cache = DynamicCache(config=decoder.config)
    _fit(cache, decoder, kv)
    return cache


def use_int4_cache(model: PreTrainedModel) -> None:
    """Make `model` store keys and values in 4 bits wherever it would make, or is given
    empty, a plain `DynamicCache`.

    This holds while its attention is "pq"; with another one nothing is rounded.
    Calling it again changes nothing.
    ModelError when no attention module carries `kv`, and for a release of transformers that takes
    its cache in a way that pq does not know. The model then raises UsageError for a cache that is
    not its own, and ModelError where a forward pass did not use the cache that it was given.
    """
    decoder = model.get_decoder()
    _kv_modules(decoder)
    hooks = _Hooks(DecoderArguments.of(decoder))
    before = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
    if not any(isinstance(owner, _Hooks) for owner in before):
        decoder.register_forward_pre_hook(hooks.provide, with_kwargs=True)
        decoder.register_forward_hook(hooks.require_use, with_kwargs=True)


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that the tokens in `cache` occupy, in 4 bits or plain;
    shared memory counts once."""
    states = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in states}
    return sum(storages.values())


@dataclass(frozen=True)
class _Hooks:
    """What `use_int4_cache` does before and after a decoder's forward pass.

    It holds nothing of the model, so that copies of a model stand alone.
    """

    arguments: DecoderArguments

    def provide(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the decoder a packed cache, or pack the one that it was given."""
        cache = self.arguments.given_cache(args, kwargs)
        if cache is None:
            if not (_understands(decoder) and self.arguments.makes_cache(decoder, args, kwargs)):
                return None
            cache = DynamicCache(config=decoder.config)
        elif not isinstance(getattr(cache, "layers", None), list):
            return None  # nothing that a decoder takes; it will say so itself
        if _understands(decoder):
            _fit(cache, decoder, _kv_modules(decoder))
        elif _packed_layers(cache):
            raise UsageError(
                f"an INT4 cache needs attention {ATTENTION!r}{_other_attention(decoder)}"
            )
        for layer in _packed_layers(cache):
            layer.awaits_tokens = True
        return self.arguments.with_cache(args, kwargs, cache)

    def require_use(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Raise ModelError unless the decoder stored its tokens in the cache of
        `provide`, and in no other."""
        if not _understands(decoder):
            return
        given, returned = self.arguments.given_cache(args, kwargs), returned_cache(output)
        ignored = given is not None and any(layer.awaits_tokens for layer in _packed_layers(given))
        replaced = returned is not None and returned is not given
        if replaced or (ignored and not recomputes_layers(decoder)):
            raise unused_cache(decoder)


def _packed_layers(cache: Cache) -> list[_Records]:
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, _Records)]


def _fit(cache: Cache, decoder: PreTrainedModel, modules: Mapping[int, KvAttention]) -> None:
    """Replace the empty layers of `cache` in place by packed ones; UsageError, before any
    change, where one cannot."""
    layers = cache.layers
    expected = decoder.config.num_hidden_layers
    if not layers and cache.layer_class_to_replicate is DynamicLayer:
        layers = [DynamicLayer() for _ in range(expected)]
    if len(layers) != expected:
        raise UsageError(
            f"the cache is another model's: it has {len(layers)} layers, the model {expected}; "
            f"{_REMEDY}"
        )
    fitted = [
        _fit_layer(layer, modules[i]) if i in modules else layer for i, layer in enumerate(layers)
    ]
    cache.layers[:] = fitted


def _fit_layer(layer: Any, kv: KvAttention) -> Any:
    """Return `layer` if it holds records of `kv`, a packed one in its place if it is
    empty, else raise UsageError."""
    packed = _PACKED.get(type(layer))
    if packed is None:
        raise UsageError(
            f"the cache has layers of type {type(layer).__name__}, which cannot hold 4-bit keys "
            "and values; pass a DynamicCache or none, and generate() no cache_implementation"
        )
    if not layer.get_seq_length():
        window = {"sliding_window": layer.sliding_window} if packed is Int4SlidingLayer else {}
        made = packed(kv, **window)
        if getattr(layer, "record_past", False):
            made.activate_past_recording()
        return made
    if not isinstance(layer, _Records):
        raise UsageError(
            f"the cache holds {layer.get_seq_length()} tokens that are not in 4 bits, as the "
            f"model stores them; {_REMEDY}"
        )
    if not layer.belongs_to(kv):
        raise UsageError(f"the cache is another model's: its key scales differ; {_REMEDY}")
    return layer


def _understands(decoder: PreTrainedModel) -> bool:
    return attention_name(decoder) == ATTENTION


def _other_attention(decoder: PreTrainedModel) -> str:
    return f", the model has {attention_name(decoder)!r}; call model.set_attn_implementation({ATTENTION!r})"


def _kv_modules(decoder: PreTrainedModel) -> dict[int, KvAttention]:
    """Index of the layer → `kv` of its attention; ModelError when there is none."""
    found = {
        m.layer_idx: m.kv
        for m in decoder.modules()
        if isinstance(m._modules.get("kv"), KvAttention)
    }
    if not found:
        raise ModelError(
            "no attention module of the model carries `kv`: nothing says how to store keys in 4 "
            "bits"
        )
    return found
