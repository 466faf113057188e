"""What engines will not serve of any model under a recipe, told from the recipe alone."""

from __future__ import annotations

from quantize.formats.packed_int import IntScheme
from quantize.formats.registry import FORMATS
from quantize.formats.scheme import AnyScheme
from quantize.formats.vllm import Unserved
from quantize.methods.encode import IntEncode
from quantize.recipe.recipe import Recipe

_ATTENTION = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
_FFN = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
_OTHERS = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
"""Linears as most decoders call them."""


def unserved_by(recipe: Recipe) -> list[Unserved]:
    """What vLLM refuses whatever the model, its linears being called as in most of them.

    Sizes, which may make groups give way, and other names are not known here: `pq convert` and
    `pq estimate` tell of the model itself.
    """
    schemes: dict[str, AnyScheme] = {}
    for stage in recipe.stages:
        if not isinstance(stage, IntEncode):
            continue
        group = None if stage.group_size == -1 else stage.group_size
        scheme = IntScheme(stage.bits, group, stage.fp8)
        taken = [name for name in (*_ATTENTION, *_FFN, *_OTHERS) if stage.selects(name)]
        # Patterns may name linears of one model alone: bits and groups are told all the same.
        for name in taken or [f"stage {stage.method}"]:
            schemes.setdefault(name, scheme)
    form = FORMATS[recipe.format]
    return form.unserved(schemes, {}, (_ATTENTION, _FFN))
