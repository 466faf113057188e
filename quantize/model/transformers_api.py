"""The one place that names what models and layers of transformers take and return.

transformers renames arguments: in 5.24 the `past_key_values` of models and layers became `cache`. Names are therefore
read off signatures, never concluded from a version, and what no signature names is an error, so that nothing is lost
in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

# Imported while transformers is still importing itself: it must not lead to any model.
from transformers.cache_utils import Cache

from quantize.errors import ModelError, UsageError

_CACHE_NAMES = ("cache", "past_key_values")
"""What releases call the cache among the arguments of a decoder, newest first."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a call is given by position and by name."""


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
                f"{type(decoder).__name__} of {_release()} takes no argument {' or '.join(_CACHE_NAMES)}, "
                "so that pq cannot give it an INT4 KV cache; install an earlier release of transformers"
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

    def makes_cache(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the decoder makes a cache of its own in a call that gives it none."""
        return bool(_settled_use_cache(decoder, self._by_name(args, kwargs).get("use_cache")))

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
    """Whether layers may run twice for gradients (gradient checkpointing); transformers then warns and drops caches."""
    return bool(decoder.training and getattr(decoder, "gradient_checkpointing", False))


def _release() -> str:
    return f"transformers {transformers.__version__}"


def unused_cache(decoder: nn.Module) -> ModelError:
    """The error for a decoder that took a cache and went on without it."""
    return ModelError(
        f"{type(decoder).__name__} of {_release()} did not use the INT4 KV cache that pq gave it: "
        "keys and values would take 16 bits; install an earlier release of transformers"
    )
