"""Recipes by what people say: `w4a16` and the like, each the best that we measured of its scheme.

Best is the least KL divergence of the recipes in `quantize.recipe.measured` whose outputs the most
engines load: an output that stock vLLM serves goes before one that needs pq beside the engine.
Nothing here builds a stage.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A name, and what it stands for."""

    name: str
    recipe: str
    """A shipped one."""
    settings: tuple[str, ...] = ()
    """Of its stages, as `--set` takes them."""

    def __str__(self) -> str:
        return " ".join([self.recipe, *(f"--set {setting}" for setting in self.settings)])


ALIASES: tuple[Alias, ...] = (
    Alias("w4a16", "fireq-linear", ("activations=none",)),
    Alias("w4a8", "fireq-linear"),
    Alias("w3a16", "sbvr-3bit"),
    Alias("w2a16", "sbvr-2bit"),
    Alias("w4a8kv4", "fireq"),
)


def alias_of(name: str) -> Alias | None:
    """The alias of this name, in whatever case and with `-` or `_` within; None for another word."""
    plain = name.lower().replace("-", "").replace("_", "")
    return next((alias for alias in ALIASES if alias.name == plain), None)
