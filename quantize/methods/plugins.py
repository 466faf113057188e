"""Methods from other distributions, which name them as entry points of the group `pq.methods`.

    [project.entry-points."pq.methods"]
    my-method = "my_package.my_module:MyMethod"

The entry point has the method's name and leads to its stage class. Nothing is imported before a
recipe names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib.metadata import EntryPoint, entry_points

from quantize.errors import RecipeError
from quantize.methods.base import Stage

GROUP = "pq.methods"
_versions: dict[type[Stage], tuple[str, str]] = {}
"""Loaded class → name and version of its distribution."""


def installed_methods() -> list[str]:
    """Names of all methods that other distributions bring, without loading any."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load_method(name: str, shipped: Collection[str]) -> type[Stage] | None:
    """The stage class of an installed method; None where no distribution brings one of that name.

    shipped: names that are taken. RecipeError, one line that names the distribution, for a name
    that is taken or comes twice, and for what cannot be loaded or is no stage.
    """
    entries = list(entry_points(group=GROUP, name=name))
    if not entries:
        return None
    origins = [_origin(entry) for entry in entries]
    label = f"method '{name}' of {' '.join(origins[0])}"
    if name in shipped:
        remedy = f"uninstall {origins[0][0]}"
        raise RecipeError(f"{label}: pq has a method of that name itself; {remedy}")
    if len(entries) > 1:
        others = " and ".join(" ".join(origin) for origin in origins[1:])
        raise RecipeError(f"{label}: comes with {others}, too; uninstall all but one")
    try:
        found = entries[0].load()
    except Exception as err:  # whatever foreign code raises when it is imported
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise RecipeError(f"{label}: cannot be loaded ({reason}); update or uninstall it") from None
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise RecipeError(f"{label}: {entries[0].value} is no stage class; update or uninstall it")
    field = found.model_fields["method"]
    if field.default != name or not hasattr(found, "kind"):
        what = f"{entries[0].value} has no kind or another method's name"
        raise RecipeError(f"{label}: {what}; update or uninstall it")
    _versions[found] = origins[0]
    return found


def method_versions(stages: Iterable[Stage]) -> dict[str, str]:
    """Version of every distribution that brought one of these stages, by its name."""
    return dict(sorted(_versions[type(stage)] for stage in stages if type(stage) in _versions))


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution."""
    return (entry.dist.name, entry.dist.version) if entry.dist else ("an unknown distribution", "")
