"""The methods that recipes may name, and the order in which their stages stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, get_args

from quantize.errors import RecipeError
from quantize.methods import STAGES, Stage
from quantize.methods.base import Kind
from quantize.methods.plugins import installed_methods, load_method

METHODS: dict[str, type[Stage]] = {cls.model_fields["method"].default: cls for cls in STAGES}
"""Methods that recipes may name: the shipped ones, and what was loaded of those that other
distributions bring."""
LAW = "restructure* smooth* cache? encode*, with a restructure, a cache or an encode stage"
_KINDS: tuple[Kind, ...] = get_args(Kind)


def learn(name: str) -> bool:
    """Let recipes name an installed method from now on → whether there is one that is new.

    RecipeError where it cannot be used.
    """
    shipped = {cls.model_fields["method"].default for cls in STAGES}
    if name in METHODS and name not in shipped:
        return False
    cls = load_method(name, shipped)
    if cls is None:
        return False
    for method, other in METHODS.items():
        if other.__name__ == cls.__name__:  # the schema names stages by their classes
            what = f"its class is called {cls.__name__} as that of '{method}'"
            raise RecipeError(f"method '{name}': {what}; rename one")
    METHODS[name] = cls
    return True


def method_names() -> list[str]:
    """Names of all methods, those not loaded included."""
    return list(dict.fromkeys([*METHODS, *installed_methods()]))


def methods_of(kind: Kind) -> str:
    """Names of the methods of a kind, for a message."""
    return ", ".join(method for method, cls in METHODS.items() if cls.kind == kind)


def stage_class(stage: Any) -> type[Stage] | None:
    """The class of a stage as it stands in a file; None where it names no known method."""
    method = stage.get("method") if isinstance(stage, dict) else None
    return METHODS.get(method) if isinstance(method, str) else None


def order_problems(stages: Sequence[type[Stage] | None]) -> Iterator[tuple[int | None, str]]:
    """Yield (index, text) for the first stage out of order, (None, text) for a missing encode.

    None in `stages` is an unknown method, which could be anything.
    """
    known = [
        (i, _KINDS.index(cls.kind), f"{cls.kind} '{cls.model_fields['method'].default}'")
        for i, cls in enumerate(stages)
        if cls
    ]
    for (i, rank, label), (j, other, later) in product(known, known):
        if j < i and other > rank:
            yield i, f"{label} follows {later}; the order is {LAW}, move it before stages[{j}]"
            break
    ranks = [rank for _, rank, _ in known]
    cache = _KINDS.index("cache")
    sufficient = {_KINDS.index(kind) for kind in ("restructure", "cache", "encode")}
    if ranks.count(cache) > 1:
        second = [i for i, rank, _ in known if rank == cache][1]
        yield second, f"a second cache stage; the order is {LAW}"
    for i, cls in enumerate(stages):
        if cls and cls.once and cls in stages[:i]:
            method = cls.model_fields["method"].default
            yield i, f"a second stage '{method}'; one does all, remove it"
    if known and None not in stages and not sufficient & set(ranks):
        yield None, f"no encode stage; the order is {LAW}, add one of {methods_of('encode')}"
