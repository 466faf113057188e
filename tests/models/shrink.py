"""The configuration of any model type, shrunken by what its fields are called.

A type's own default configuration is kept in everything that says how the model computes: kinds of
layers, ratios of heads, biases, norms, caps. Only sizes shrink. The class makes the small
configuration itself from the changed fields, so that what it derives from them stays right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from models.shrink_tables import (
    CEILINGS,
    EXCEPTIONS,
    FIRST_TOKEN,
    HEAD_DIMS,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAST_TOKEN,
    LAYER_COUNTS,
    MOST_LAYERS,
    MULTIPLIERS,
    NEEDED,
    VOCABULARY,
    WITHOUT_DEFAULT,
)


def default_config(model_type: str) -> PretrainedConfig:
    """A type's configuration as its class makes it when told nothing."""
    return AutoConfig.for_model(model_type, **NEEDED.get(model_type, {}))


def shrunken(model_type: str, **changes: Any) -> PretrainedConfig:
    """The small configuration of a type; `changes` are fields that are to differ from it."""
    config = default_config(model_type)
    told = merged(NEEDED.get(model_type, {}), small_fields(config))
    return type(config)(**merged(merged(told, EXCEPTIONS.get(model_type, {})), changes))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `above` before `below`, and mappings in them alike; rotary parameters are one value."""
    out = dict(below)
    for name, value in above.items():
        inner = out.get(name)
        mix = isinstance(value, dict) and isinstance(inner, dict) and name != "rope_parameters"
        out[name] = merged(inner, value) if mix else value  # type: ignore[arg-type]
    return out


def read(config: PretrainedConfig, name: str) -> Any:
    """A field, also one that single layers override, which configurations refuse to read."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return config._getattr_without_heterogeneous_validation(name, None)


def small_fields(config: PretrainedConfig, inner: bool = False) -> dict[str, Any]:
    """What to tell a configuration's class so that it makes a small one: field → value.

    inner: it is a part of another, whose class may have set other defaults than its own class has.
    """
    raw = {field.name: field.default for field in fields(config)}  # type: ignore[arg-type]
    subs = getattr(config, "sub_configs", {})
    total = next((read(config, n) for n in LAYER_COUNTS if isinstance(raw.get(n), int)), None)
    kept = kept_layers(config, total) if total else []
    out: dict[str, Any] = {}
    spare = iter(range(VOCABULARY - 1, LAST_TOKEN, -1))
    for name, default in raw.items():
        value = read(config, name)
        if name in subs:
            if isinstance(value, PretrainedConfig):
                part = merged(small_fields(value, True), EXCEPTIONS.get(value.model_type, {}))
                out[name] = {"model_type": value.model_type} | part
        elif value is None:
            if name in WITHOUT_DEFAULT:
                out[name] = WITHOUT_DEFAULT[name]
            elif inner and isinstance(default, bool | int | float | str):
                out[name] = None
        elif name in MULTIPLIERS and value == 1:
            out[name] = MULTIPLIERS[name]
        elif name in LAYER_COUNTS and isinstance(value, int) and default is not None:
            out[name] = min(value, len(kept) or 2)
        elif name == "num_kv_shared_layers" and value == total:
            out[name] = len(kept)
        elif is_token(name):
            out[name] = token(name, value, spare)
        elif is_index_set(name, value, total):
            # Left to the class where it derives the set itself.
            if default is not None:
                out[name] = [kept.index(i) for i in value if i in kept]
        elif is_per_layer(value, total):
            out[name] = [small_entry(name, value[i], config) for i in kept]
        elif isinstance(value, int) and not isinstance(value, bool) and default is not None:
            small = size(name, value, config)
            if small != (default if inner else value):
                out[name] = small
        elif inner and isinstance(default, bool | float | str) and value != default:
            out[name] = value
    parameters = read(config, "rope_parameters")
    if "rope_parameters" in raw and isinstance(parameters, dict):
        small_rope = rope(parameters, out)
        if small_rope != parameters:
            out["rope_parameters"] = small_rope
    return out


def small_entry(name: str, value: Any, config: PretrainedConfig) -> Any:
    """One layer's entry of a list: a size where the list is named after one."""
    single = name.removesuffix("_per_layer")
    return value if single == name else size(single, value, config)


def size(name: str, value: int, config: PretrainedConfig) -> int:
    """A size by its field's name."""
    if name in KEY_HEADS:
        heads = next(filter(None, (read(config, n) for n in KEY_HEADS[name])), value)
        return HEADS if value >= heads else 1 if value == 1 else HEADS // 2
    if name in HEAD_DIMS:
        hidden = read(config, "hidden_size")
        ratio = value * (read(config, "num_attention_heads") or 1) / hidden if hidden else 1.0
        return 32 if 0.7 < ratio < 1.5 else 16 if ratio < 1 else 64
    if name == "image_size":
        return min(value, 4 * int(read(config, "patch_size") or 16))
    return min(value, CEILINGS.get(name, value))


def kept_layers(config: PretrainedConfig, total: int) -> list[int]:
    """Layers of the default configuration that show every kind of layer there is, 2 to 4 of them."""
    lists: list[list[Any]] = []
    for field in fields(config):  # type: ignore[arg-type]
        value = read(config, field.name)
        if is_index_set(field.name, value, total):
            lists.append([i in value for i in range(total)])
        elif is_per_layer(value, total):
            lists.append([repr(entry) for entry in value])
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        dense = read(config, name)
        if isinstance(dense, int):
            lists.append([i < dense for i in range(total)])
    kinds = list(zip(*lists, strict=True)) if lists else [()] * total
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) > MOST_LAYERS:
        # Every value of every list, if not every combination.
        chosen = sorted({values.index(value) for values in lists for value in values})[:MOST_LAYERS]
    spare = [i for i in range(total) if i not in chosen]
    return sorted(chosen + spare[: max(0, 2 - len(chosen))])


def is_per_layer(value: object, total: int | None) -> bool:
    return isinstance(value, list | tuple) and len(value) == total


def is_index_set(name: str, value: object, total: int | None) -> bool:
    """Whether a list names layers: its name says layers, and its integers rise."""
    return (
        isinstance(value, list | tuple)
        and re.search(r"(_layers|_layer_ids|_idxs|_indexes|_indices)$", name) is not None
        and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        and all(a < b for a, b in pairwise(value))
        and (not value or (total is not None and value[0] >= 0 and value[-1] < total))
    )


def is_token(name: str) -> bool:
    return bool(re.search(r"(_token_id|_token_index|_token_ids|_tokens?_ids?)$", name))


def token(name: str, value: Any, spare: Any) -> Any:
    """A special token inside the small vocabulary: those of the zoo's tokenizer, others at its end."""
    fixed = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name in fixed:
        return fixed[name]
    if isinstance(value, int):
        return value if 0 <= value < FIRST_TOKEN else next(spare)
    return [next(spare) for _ in value] if isinstance(value, list | tuple) else value


def rope(value: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters, also those by kind of layer, whose sections fill the small heads."""
    out = {
        name: rope(entry, small) if isinstance(entry, dict) else entry
        for name, entry in value.items()
    }
    if section := value.get("mrope_section"):
        width = small.get("head_dim") or HIDDEN // small.get("num_attention_heads", HEADS)
        pairs = int(width * value.get("partial_rotary_factor", 1.0)) // 2
        new = [entry * pairs // sum(section) for entry in section]
        out["mrope_section"] = [new[0] + pairs - sum(new), *new[1:]]
    return out
