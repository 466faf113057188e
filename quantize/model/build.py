"""A transformers model without weights, as pq computes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from quantize.errors import ModelError, UnderivedError
from quantize.files.checkpoint import read_json
from quantize.formats.registry import format_in
from quantize.model.attention import ATTENTION
from quantize.model.dense_ffn import place_native_experts
from quantize.model.experts import split_experts
from quantize.model.moe import Policy, place_experts, set_routers_apart
from quantize.model.roles import is_router
from quantize.model.transformers_api import (
    build_model,
    read_config,
    require_known_type,
    rope_types,
)
from quantize.model.transformers_decoder import parts_of
from quantize.model.transposed import place_linears


def meta_model(folder: Path, dtype: torch.dtype) -> Any:
    """The full-precision model that config.json describes, without memory, with the experts of pq's
    own format in the places of its dense FFNs; ModelError for what transformers refuses."""
    facts = read_json(folder / "config.json")
    require_known_type(folder, facts)
    try:
        config = read_config(folder)
        _require_known_rope(folder, config)
        with torch.device("meta"):
            model = build_model(config, dtype, ATTENTION)
    except ModelError:
        raise
    except Exception as err:
        # A bad field gives KeyError, AttributeError, RuntimeError,
        # AssertionError or a validator's own class.
        reason = " ".join(f"{type(err).__name__}: {err}".split())[:300]
        raise ModelError(
            f"{folder}/config.json: transformers cannot build this model ({reason})"
        ) from None
    _require_own_weights(model)
    _place_experts_of(facts.get("quantization_config"), folder, model)
    return model.eval().requires_grad_(False)


def _require_own_weights(model: Any) -> None:
    """UnderivedError where two layers are partly one (Zamba): each would be calibrated and rounded for
    itself, and the output has one."""
    place = parts_of(model).blocks
    homes: dict[int, str] = {}
    for name, held in model.get_submodule(place).named_parameters(remove_duplicate=False):
        index, _, inner = name.partition(".")
        first = homes.setdefault(id(held), index)
        if first != index:
            raise UnderivedError(
                f"{type(model).__name__}: {place}.{first} and {place}.{index} share "
                f"{inner.rpartition('.')[0]}; pq takes decoders whose layers have weights of their own"
            )


def _place_experts_of(section: Any, folder: Path, model: nn.Module) -> None:
    form = format_in(section)
    if form is None:
        return
    try:
        if sizes := form.experts(section):
            place_native_experts(model, sizes, form.routing(section))
    except (ValueError, ModelError) as err:
        raise ModelError(f"{folder}/config.json: quantization_config: {err}") from None


_OTHER_TASK = re.compile(r"For(Sequence|Token)Classification$|ForQuestionAnswering$|RewardModel$")
"""Classes of models that do not write text."""


def require_text_class(folder: Path, model: Any) -> None:
    """ModelError where config.json names a class for another task: the checkpoint has no head for
    tokens, or a tied one, and an output would still say that it were of that class."""
    ours, named = type(model).__name__, list(model.config.architectures or ())
    if ours not in named and (other := next(filter(_OTHER_TASK.search, named), None)):
        raise ModelError(
            f"{folder}/config.json: names {other}, which has no head for tokens; give a model of "
            f"{ours}"
        )


def split_model(model: Any, routing: Mapping[str, Policy] = MappingProxyType({})) -> Any:
    """The same model with every linear of every expert a module of its own."""
    place_experts(model, parts_of(model).blocks, model.config.to_dict(), routing)
    split_experts(model)
    place_linears(model)
    set_routers_apart(model, is_router)
    return model


def _require_known_rope(folder: Path, config: Any) -> None:
    # transformers would say no more than KeyError.
    parameters = getattr(config, "rope_parameters", None)
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
    known = rope_types()
    if kind not in known:
        raise ModelError(
            f"{folder}/config.json: rope_type {kind!r} is not known (known: {', '.join(known)})"
        )
