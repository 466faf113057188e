"""How config.json says which linears are packed how: its part `config_groups`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

S = TypeVar("S", bound="AnyScheme")


def config_groups(
    schemes: Mapping[str, AnyScheme], called: Callable[[str], Sequence[str]] = lambda name: (name,)
) -> dict[str, Any]:
    """Linears by full module name → scheme as `config_groups`: one entry for each scheme.

    called: all names by which readers look for a linear.
    """

    def place(item: tuple[AnyScheme, list[str]]) -> tuple[bool, str]:
        # transformers stacks the experts of a Mixture of Experts, and takes the first group's
        # scheme to be theirs.
        return not any(".experts." in name for name in item[1]), repr(item[0])

    by_scheme: dict[AnyScheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    single = len(by_scheme) == 1
    ordered = sorted(by_scheme.items(), key=place)

    def targets(names: Sequence[str]) -> list[str]:
        # vLLM's class of heads is no Linear by its name: without its own name a packed head would
        # be taken for a plain one.
        named = [name for name in names if _outside(name)] if single else names
        every = sorted({alias for name in named for alias in called(name)})
        return ["Linear", *every] if single else every

    return {
        f"group_{i}": scheme.as_json(targets(names)) for i, (scheme, names) in enumerate(ordered)
    }


def _outside(name: str) -> bool:
    """Whether a linear stands outside the numbered blocks, as a head does."""
    return not any(part.isdecimal() for part in name.split("."))


def read_groups(
    config: Mapping[str, Any], linears: Sequence[str], read: Callable[[Mapping[str, Any]], S]
) -> dict[str, S]:
    """Undo `config_groups`: full linear names → scheme, as `read` makes it of one entry."""
    ignored = set(config.get("ignore", ()))
    packed = [name for name in linears if name not in ignored]
    out: dict[str, S] = {}
    for group in config["config_groups"].values():
        scheme, targets = read(group), group["targets"]
        out |= {name: scheme for name in packed if "Linear" in targets or name in targets}
    return out
