"""Words of other tools, and slips of the hand, answered with what pq calls it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from quantize.errors import UsageError

COMMANDS: Mapping[str, str] = {
    "quantize": "convert",
    "quant": "convert",
    "compress": "convert",
    "evaluate": "eval",
    "benchmark": "bench",
    "info": "inspect",
    "show": "inspect",
    "serve": "serve-check",
    "recipes": "recipe ls",
    "ls": "recipe ls",
    "list": "recipe ls",
}
"""What others call a command → the command."""
_BY_RECIPE = "the recipe says it: -r w4a16, w4a8, w3a16 or w2a16 (`pq recipe ls`)"
OPTIONS: Mapping[str, str] = {
    "--bits": f"{_BY_RECIPE}, or --set bits=VALUE",
    "--wbits": f"{_BY_RECIPE}, or --set bits=VALUE",
    "--scheme": _BY_RECIPE,
    "--method": "the recipe says it: -r gptq, awq, sbvr (`pq recipe ls`)",
    "--group-size": "it is a field of the recipe's stages: --set group_size=VALUE",
    "--format": "the recipe says it: -r w4a16 for vLLM, -r gguf-q4_0 for llama.cpp (`pq recipe ls`)",
    "--num-samples": "--nsamples VALUE",
    "--num-calibration-samples": "--nsamples VALUE",
    "--samples": "--nsamples VALUE",
    "--max-seq-length": "--seqlen VALUE",
    "--max-seq-len": "--seqlen VALUE",
    "--seq-len": "--seqlen VALUE",
    "--calib-data": "--dataset VALUE",
    "--calibration-dataset": "--dataset VALUE",
    "--model-path": "--model VALUE",
    "--model-id": "--model VALUE",
    "--output-dir": "--output VALUE",
    "--out": "--output VALUE",
    "--save-dir": "--output VALUE",
    "--force": "--overwrite",
}
"""Options that others have → what does it in `pq convert` and `pq estimate`; VALUE: what was given."""


class PointingCommand(TyperCommand):
    """A command that says of a wrong option or argument which one was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base does it; UsageError with a pointer where one is known."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as err:
            # Two packages have this class, by release of typer.
            if not hasattr(err, "format_message") or not hasattr(err, "exit_code"):
                raise
            if (text := self._pointer(ctx, err, given)) is None:
                raise
            raise UsageError(text) from None

    def _pointer(self, ctx: Any, err: Any, given: Sequence[str]) -> str | None:
        options = [option for p in self.params for option in getattr(p, "opts", ())]
        wrong = getattr(err, "option_name", None)
        if isinstance(wrong, str):
            meant = OPTIONS.get(wrong)
            if "--set" not in options or meant is None:
                return None
            value = _value_of(wrong, given)
            return f"no option {wrong}; {meant.replace('VALUE', value or 'VALUE')}"
        if "--model" not in options or any(p.param_type_name == "argument" for p in self.params):
            return None
        try:
            _, rest, _ = self.make_parser(ctx).parse_args(args=list(given))
        except Exception:  # a second mistake, which the usual line tells of
            return None
        if not rest:
            return None
        first, *others = rest
        text = f"{first!r} is not expected here"
        if "--model" in given or "-m" in given or others:
            return f"{text}; every value follows its option (pq {ctx.info_name} --help)"
        if Path(first).is_file() and "--recipe" in options:
            return f"{text}; a recipe is given as --recipe {shlex.quote(first)}"
        return f"{text}; give the model as --model {shlex.quote(first)}"


def _value_of(option: str, given: Sequence[str]) -> str | None:
    """What stands behind an option, or in it."""
    for index, word in enumerate(given):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != option:
            continue
        if equals:
            return shlex.quote(value)
        if index + 1 < len(given) and not given[index + 1].startswith("-"):
            return shlex.quote(given[index + 1])
    return None


class PointingGroup(TyperGroup):
    """A group that knows what others call its commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base does it; UsageError that names the command that was meant."""
        if args and args[0] in COMMANDS and args[0] not in self.commands:
            meant = COMMANDS[args[0]]
            raise UsageError(f"no command {args[0]!r}; it is pq {meant} (pq {meant} --help)")
        return super().resolve_command(ctx, args)
