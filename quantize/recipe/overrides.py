"""`--set FIELD=VALUE`: change stage fields of a recipe from the command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, get_args, get_origin

from pydantic import ValidationError
from typing_extensions import Self

from quantize.errors import UsageError
from quantize.files.yaml_scalars import resolve_plain
from quantize.methods.base import Stage
from quantize.recipe.messages import misfit


class Staged(Protocol):
    """A recipe, as far as its stages go: recipes are read with this module's help."""

    @property
    def name(self) -> str:
        """Its name, for messages."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Its stages."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other fields."""


AnyRecipe = TypeVar("AnyRecipe", bound=Staged)


def with_stage_fields(recipe: AnyRecipe, assignments: Sequence[str]) -> AnyRecipe:
    """Return the recipe with `field=value` applied to every stage that has the field.

    A field that is a list takes values separated by commas.
    `method.field=value` limits it to one method.
    Raises UsageError for a field no stage has, or a value it refuses.
    """
    changes: dict[int, dict[str, object]] = {}
    for assignment in assignments:
        target, equals, raw = assignment.partition("=")
        method, _, field = target.rpartition(".")
        if not equals or not field:
            raise UsageError(f"--set {assignment}: write FIELD=VALUE, for example bits=3")
        chosen = [
            index
            for index, stage in enumerate(recipe.stages)
            if method in ("", stage.method) and field in _fields_of(stage)
        ]
        if not chosen:
            raise UsageError(f"--set {assignment}: {_no_such_field(recipe, target)}")
        for index in chosen:
            several = _several(type(recipe.stages[index]).model_fields[field].annotation, raw)
            changes.setdefault(index, {})[field] = _value(assignment, raw, several)
    values = [changes.get(index, {}) for index in range(len(recipe.stages))]
    stages = tuple(map(_replace_fields, recipe.stages, values))
    return recipe.model_copy(update={"stages": stages})


def _fields_of(stage: Stage) -> set[str]:
    """Names of the fields that can be set: all but the method, which says what the stage is."""
    return {*type(stage).model_fields} - {"method"}


def _several(annotation: object, raw: str) -> bool:
    """Whether a value is a list: for a field of one or many values, if there is a comma."""
    options = [get_origin(option) for option in get_args(annotation)]
    return get_origin(annotation) is tuple or (tuple in options and "," in raw)


def _value(assignment: str, raw: str, several: bool) -> object:
    try:
        if several:
            return [resolve_plain(part) for part in raw.split(",")] if raw else []
        return resolve_plain(raw)
    except ValueError as err:
        raise UsageError(f"--set {assignment}: {err}") from None


def _replace_fields(stage: Stage, values: dict[str, object]) -> Stage:
    try:
        # Through JSON, because strict types take a list for a tuple only from there.
        return type(stage).model_validate_json(json.dumps(stage.model_dump(mode="json") | values))
    except ValidationError as err:
        problem = err.errors()[0]
        if any(isinstance(part, str) for part in problem["loc"][1:]):  # one type of several
            name = str(problem["loc"][0])
            text = misfit(type(stage), name, problem)
            raise UsageError(f"--set: {stage.method}.{name}: {text}") from None
        where = ".".join(str(part) for part in (stage.method, *problem["loc"]))
        reason = problem["msg"].removeprefix("Value error, ")
        # A rule about several fields has no value of its own; pydantic would show the whole stage.
        value = f" (value {problem['input']!r})" if problem["loc"] else ""
        raise UsageError(f"--set: {where}: {reason}{value}") from None


def _no_such_field(recipe: Staged, target: str) -> str:
    fields = sorted(set().union(*map(_fields_of, recipe.stages)))
    close = difflib.get_close_matches(target.rpartition(".")[2], fields, 1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    problem = f"no stage of recipe '{recipe.name}' has the field '{target}'"
    return f"{problem}; {hint}(fields: {', '.join(fields)})"
