"""A command as it was given, with some of its options changed: what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import typer

_PASSING = ("as_json", "work", "resume", "overwrite")
"""Options of one run alone, by parameter."""


def again(ctx: typer.Context, **changes: Any) -> str:
    """The command line of this invocation, options that were not given left out.

    changes: parameter → another value; a list is added to what was given.
    """
    words = ["pq", str(ctx.command.name)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        given = getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
        value = ctx.params.get(name) if given else None
        if name in changes:
            change = changes[name]
            value = [*(value or []), *change] if isinstance(change, list) else change
        if value is None or name in _PASSING:
            continue
        words += _words(parameter, value)
    return shlex.join(words)


def _words(parameter: Any, value: Any) -> list[str]:
    """An option's long name and value as typed; a flag's name alone; an argument's value."""
    if parameter.param_type_name == "argument":
        return [str(value)]
    option = max(parameter.opts, key=len)
    if isinstance(value, bool):
        off = max(parameter.secondary_opts, key=len, default=None)
        return [option] if value else ([off] if off else [])
    values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    return [word for one in values for word in (option, str(one))]
