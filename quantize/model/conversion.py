"""From the names and forms of stored tensors to those of a model whose experts stand by themselves.

Everything here works on tensors without numbers (`quantize/model/lazy.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from quantize.errors import ModelError
from quantize.model.experts import Layout
from quantize.model.lazy import lazy, where
from quantize.model.transformers_names import Conversion
from quantize.model.where import View, Where, names_in, whole

__all__ = [
    "Homes",
    "loaded",
    "owner_of",
    "parts_of",
    "published",
    "published_names",
    "renamed_like",
    "split",
]


def loaded(
    conversion: Conversion, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Stored tensors by name → the model's tensors, stacked experts as stacks, and the names of
    the stored ones that have no place in it.

    ModelError for two stored tensors of one name, and for parts of a tensor that are missing or do
    not fit each other.
    """
    out: dict[str, Tensor] = {}
    taken: dict[str, str] = {}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unplaced = []
    for key in conversion.in_order(stored):
        name, converter, pattern = conversion.place(key)
        if name not in conversion.tensors:
            unplaced.append(key)
        elif converter is not None:
            collected.setdefault(name, (converter, []))[1].append((pattern, key))
        elif name in out:
            raise ModelError(f"tensors {taken[name]} and {key} are both {name}; remove one")
        else:
            out[name], taken[name] = stored[key], key
    published_form: dict[str, Where] | None = None
    for name, (converter, keys) in collected.items():
        parts: dict[str, list[Tensor]] = {}
        for pattern, key in keys:
            parts.setdefault(pattern, []).append(stored[key])
        made = _converted(conversion, name, converter, parts)
        if isinstance(made, str):
            published_form = published_form or published(conversion)
            if not _rest_is_packed(conversion, name, stored, published_form):
                raise ModelError(f"the stored parts of {name} do not fit config.json ({made})")
            unplaced += [key for _, key in keys]
            continue
        for made_name, tensor in made.items():
            if made_name in out:
                raise ModelError(
                    f"tensor {made_name} is stored in two forms, one of them "
                    f"{taken.get(made_name, 'converted')}; remove one"
                )
            out[made_name] = tensor
    return out, unplaced


def _converted(
    conversion: Conversion, name: str, converter: Any, parts: Mapping[str, list[Tensor]]
) -> dict[str, Tensor] | str:
    """What one converter makes of the tensors that it collected, or why that is not the model's."""
    try:
        made = conversion.convert(name, converter, parts)
    except (ValueError, RuntimeError, IndexError, KeyError, AttributeError) as err:
        return " ".join(str(err).split())[:200]
    for made_name, tensor in made.items():
        known = conversion.tensors.get(made_name)
        if known is None:
            return f"{made_name} has no place in the model"
        if tensor.shape != known.shape:
            return f"they make {list(tensor.shape)}, it implies {list(known.shape)}"
    return made


def _rest_is_packed(
    conversion: Conversion,
    name: str,
    stored: Mapping[str, Tensor],
    form: Mapping[str, Where],
) -> bool:
    """Whether what a tensor lacks of its parts is there packed, so that the others stand alone.

    ModelError for parts that are not there at all.
    """

    def bare(key: str) -> str:
        return key.removeprefix(f"{conversion.prefix}.")

    there = {bare(key) for key in stored}
    packed = {owner_of(key) for key in there if not key.endswith((".weight", ".bias"))}
    absent = [key for key, place in form.items() if name in names_in(place)]
    absent = [key for key in absent if bare(key) not in there]
    if lost := [key for key in absent if owner_of(bare(key)) not in packed]:
        raise ModelError(f"tensor {lost[0]} is missing from the checkpoint; download it again")
    return bool(absent)


def published(conversion: Conversion) -> dict[str, Where]:
    """Names of the tensors of a published checkpoint → where in the model's they come from."""
    tensors = conversion.tensors
    own = {name: lazy(name, tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return {name: where(tensor) for name, tensor in conversion.store(own).items()}


def parts_of(conversion: Conversion, layouts: Mapping[str, Layout]) -> dict[str, Where]:
    """Names of the model's tensors, experts by themselves → where in the model's they lie."""
    tensors = conversion.tensors
    return split({name: whole(name, tuple(t.shape)) for name, t in tensors.items()}, layouts)


def published_names(parts: Mapping[str, Where], form: Mapping[str, Where]) -> dict[str, str]:
    """Name of a tensor, experts by themselves → its name in a checkpoint as its type is published.

    parts: `parts_of`. form: `published`. Tensors that such a checkpoint has no counterpart for,
    such as one expert of a stack, are left out.
    """
    at = {place: name for name, place in form.items()}
    return {name: at[place] for name, place in parts.items() if place in at}


def split(places: Mapping[str, Where], layouts: Mapping[str, Layout]) -> dict[str, Where]:
    """Tensors of a model → the same with every expert's by themselves, under the names that
    `split_experts` gives them.

    ModelError for a stack that is not one.
    """
    out: dict[str, Where] = {}
    for name, place in places.items():
        module, _, stack = name.rpartition(".")
        layout, shape = layouts.get(module), place.shape
        if layout is None:
            out[name] = place
            continue
        if len(shape) != (2 if stack.endswith("_bias") else 3):
            raise ModelError(f"tensor {name} is {list(shape)}, which is no stack of experts")
        for expert in range(shape[0]):
            parts: dict[str, Any] = layout.parts(stack, View(place), expert)
            out |= {f"{module}.{expert}.{part}": one.place for part, one in parts.items()}
    return out


class Homes:
    """Where tensors belong that transformers' own conversion does not know, such as the parts of a
    packed linear: by the names of those that it does know.

    published: as `published_names`. expected: names of the model's tensors, experts by themselves.
    """

    def __init__(
        self, conversion: Conversion, published: Mapping[str, str], expected: Iterable[str]
    ) -> None:
        self._conversion = conversion
        self._owners = {owner_of(name): owner_of(name) for name in expected}
        for name, stored in published.items():
            self._owners.setdefault(owner_of(stored), owner_of(name))

    def name(self, stored: str) -> tuple[str, bool]:
        """Stored name → name beside the model's tensors, and whether it is a part of a linear of
        the model; its own name where it belongs nowhere."""
        owner, _, part = stored.rpartition(".")
        weight, converter, _ = self._conversion.place(f"{owner}.weight")
        if converter is None and weight in self._conversion.tensors:
            return f"{owner_of(weight)}.{part}", True
        # The model's name for the part of a stack, where transformers renames what is around it.
        renamed = () if converter is not None else self._prefixed(owner_of(weight))
        for known in (*self._prefixed(owner), *renamed):
            if known in self._owners:
                return f"{self._owners[known]}.{part}", True
        place, converter, _ = self._conversion.place(stored)
        for name in self._prefixed(place if converter is None else stored):
            near = {name.rsplit(".", levels)[0] for levels in (1, 2)}
            near -= {"", self._conversion.prefix}  # near to everything
            if near & self._conversion.modules:
                return name, False
        return stored, False

    def _prefixed(self, name: str) -> tuple[str, ...]:
        prefix = f"{self._conversion.prefix}."
        return name, f"{prefix}{name}", name.removeprefix(prefix)


def owner_of(name: str) -> str:
    """The module that a tensor is of."""
    return name.rpartition(".")[0]


def renamed_like(name: str, pairs: Mapping[str, str]) -> str:
    """A name changed as those of its nearest neighbours are. pairs: known name → changed one."""
    places: dict[str, str] = {}
    for known, changed in pairs.items():
        left, right = known.split("."), changed.split(".")
        while left and right and left[-1] == right[-1]:
            left, right = left[:-1], right[:-1]
            places.setdefault(".".join(left), ".".join(right))
    levels = name.split(".")
    for count in range(len(levels) - 1, -1, -1):
        if (place := places.get(".".join(levels[:count]))) is not None:
            return ".".join(filter(None, (place, *levels[count:])))
    return name
