"""Recipes: one strict YAML file that says what becomes of a model, read into frozen types.

Law: a recipe is restructure* smooth* cache? encode*, with a restructure, a cache or an
encode stage. Every problem of a file is reported at once, one line each, with file,
line, path, value and remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from quantize.errors import RecipeError, UsageError
from quantize.files import strict_yaml
from quantize.files.strict_yaml import Document, Problem, show_key, show_value
from quantize.formats.registry import DEFAULT, FORMATS
from quantize.methods import STAGES, Stage
from quantize.methods.base import Kind
from quantize.methods.plugins import installed_methods, load_method
from quantize.recipe.files import find_recipe, nearest, read_recipe

if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = Annotated[Union[STAGES], Field(discriminator="method")]  # noqa: UP007

METHODS: dict[str, type[Stage]] = {cls.model_fields["method"].default: cls for cls in STAGES}
"""Methods that recipes may name: the shipped ones, and what was loaded of those that other
distributions bring."""
LAW = "restructure* smooth* cache? encode*, with a restructure, a cache or an encode stage"
_KINDS: tuple[Kind, ...] = get_args(Kind)
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Calibration(BaseModel):
    """Text that the statistics are measured on."""

    model_config = _STRICT

    dataset: str = "builtin"
    """Named calibration set, or a path to a text or JSON-lines file."""
    nsamples: int = Field(default=128, ge=1)
    """Number of sequences."""
    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a sequence."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the choice of sequences."""
    chat_template: bool = False
    """Whether conversations go through the tokenizer's chat template."""
    text_field: str | None = None
    """Column that holds the text; null: the set's own."""


def _formats(schema: dict[str, Any]) -> None:
    """Tell an editor of all formats; called whenever a schema is made."""
    schema["enum"] = list(FORMATS)
    schema["description"] = schema["description"].removesuffix(".") + ": "
    schema["description"] += (
        ", ".join(f"`{form.name}` {form.about}" for form in FORMATS.values()) + "."
    )


class Recipe(BaseModel):
    """What becomes of a model: calibration text and the stages that each block goes through."""

    model_config = _STRICT

    name: str
    """The file's name without its ending; not a key of the file."""
    description: str
    """What the recipe is for, in one line."""
    format: str = Field(default=DEFAULT, json_schema_extra=_formats)
    """Layout of the written checkpoint."""
    head_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of lm_head (clipped rounding, group 128, 16-bit
    activations); null: it stays as it is."""
    calibration: Calibration = Calibration()
    """Text that the statistics are measured on."""
    target_bpw: float | None = Field(default=None, ge=2, le=16)
    """Mean bits per weight that integer linears may take, scales counted: those that suffer most
    from rounding get 8 bits instead of their stage's own until it is spent
    (`pq convert --target-bpw`); null: every stage's own bits."""
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    """Methods in order: restructure* smooth* cache? encode*, with a restructure, a
    cache or an encode stage."""

    @field_validator("format")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in FORMATS:
            raise PydanticCustomError(
                "format", "must be one of {names}", {"names": ", ".join(FORMATS)}
            )
        return name

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        for _, text in _order_problems([type(stage) for stage in stages]):
            raise PydanticCustomError("stage_order", "{text}", {"text": text})
        return stages

    @model_validator(mode="after")
    def _fits_format(self) -> Self:
        for index, field, text in format_problems(self):
            raise PydanticCustomError(
                "stage_format",
                "{text}",
                {"text": text, "path": ("stages", index, field)},
            )
        return self

    def with_overrides(
        self,
        dataset: str | None = None,
        nsamples: int | None = None,
        seqlen: int | None = None,
        seed: int | None = None,
        chat_template: bool | None = None,
        text_field: str | None = None,
    ) -> Recipe:
        """Return a copy whose calibration has the given values; None keeps the recipe's own.

        Raises UsageError, one line per value out of range.
        """
        given = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "seed": seed}
        given |= {"chat_template": chat_template, "text_field": text_field}
        changes = {key: value for key, value in given.items() if value is not None}
        try:
            calibration = Calibration(**self.calibration.model_dump() | changes)
        except ValidationError as err:
            lines = []
            for error in err.errors():
                name = str(error["loc"][0])
                lines.append(f"{name}: {_misfit(Calibration, name, error)}")
            raise UsageError("\n".join(lines)) from None
        return self.model_copy(update={"calibration": calibration})


def load_recipe(name_or_path: str) -> Recipe:
    """Read the recipe that `find_recipe` finds. Raises RecipeError with one line per problem."""
    path = find_recipe(name_or_path)
    source = str(path) if path == Path(name_or_path) else path.name
    return parse_recipe(read_recipe(path, source), source)


def parse_recipe(text: str | bytes, source_name: str) -> Recipe:
    """Parse and validate one recipe; `source_name` is the file for messages
    and its stem the recipe's name.

    Raises RecipeError with a line `file:line: path: problem; remedy` for each problem.
    """
    doc = strict_yaml.load(text, source_name)
    if not isinstance(doc.data, dict):
        text = strict_yaml.no_mapping(doc.data, "begin with 'description: ...' and 'stages:'")
        raise strict_yaml.error_of(source_name, doc.problems or [doc.problem((), text)])
    _load_named(doc)
    problems = [*doc.problems, *_law_problems(doc)]
    if "name" in doc.data:
        problems.append(
            doc.problem(
                ("name",),
                "unknown field 'name'; a recipe is named by its file, remove the line",
            )
        )
    recipe = None
    try:
        # As JSON, because strict types take a list for a tuple and a mapping
        # for a model only from there.
        recipe = Recipe.model_validate_json(
            json.dumps({**doc.data, "name": Path(source_name).stem}),
        )
    except ValidationError as err:
        problems += [problem for error in err.errors() for problem in _translate(error, doc)]
    if recipe is None or problems:
        raise strict_yaml.error_of(source_name, problems)
    return recipe


def format_problems(recipe: Recipe) -> Iterator[tuple[int, str, str]]:
    """(index, field, text) for each stage that asks for what the recipe's format cannot hold."""
    return FORMATS[recipe.format].problems(recipe.stages)


def resolved_yaml(recipe: Recipe) -> str:
    """Write the recipe with every default filled in; `parse_recipe` reads an equal recipe back."""
    body = recipe.model_dump(mode="json", exclude={"name"})
    body["stages"] = [{"method": stage["method"], **stage} for stage in body["stages"]]
    return strict_yaml.dump(body)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe file, for editors."""
    for name in installed_methods():
        _learn(name)
    schema = Recipe.model_json_schema()
    del schema["properties"]["name"]
    schema["required"].remove("name")
    for cls in METHODS.values():
        stage = schema["$defs"][cls.__name__]
        stage["required"] = ["method", *stage.get("required", [])]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "pq recipe",
    }


def _learn(name: str) -> None:
    """Let recipes name an installed method from now on, if there is one.

    RecipeError where it cannot be used.
    """
    shipped = {cls.model_fields["method"].default for cls in STAGES}
    if name in METHODS and name not in shipped:
        return
    cls = load_method(name, shipped)
    if cls is None:
        return
    for method, other in METHODS.items():
        if other.__name__ == cls.__name__:  # the schema names stages by their classes
            what = f"its class is called {cls.__name__} as that of '{method}'"
            raise RecipeError(f"method '{name}': {what}; rename one")
    METHODS[name] = cls
    allow_methods()


def allow_methods() -> None:
    """Let the type of a recipe take what METHODS has now."""
    union: Any = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007
    Recipe.model_fields["stages"].annotation = tuple[union, ...]
    Recipe.model_rebuild(force=True)


def _load_named(doc: Document) -> None:
    """Load the methods that a recipe names and pq does not have.

    RecipeError where one cannot be used.
    """
    stages = doc.data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        name = stage.get("method") if isinstance(stage, dict) else None
        if isinstance(name, str) and name not in METHODS:
            try:
                _learn(name)
            except RecipeError as err:
                problem = doc.problem(("stages", index, "method"), str(err))
                raise strict_yaml.error_of(doc.source, [problem]) from None


def _method_names() -> list[str]:
    """Names of all methods, those not loaded included."""
    return list(dict.fromkeys([*METHODS, *installed_methods()]))


def _order_problems(stages: Sequence[type[Stage] | None]) -> Iterator[tuple[int | None, str]]:
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
        yield None, f"no encode stage; the order is {LAW}, add one of {_methods_of('encode')}"


def _law_problems(doc: Document) -> Iterator[Problem]:
    """Yield what breaks the law, found in the raw data so that a mistake in
    one stage does not hide it."""
    stages = doc.data.get("stages")
    classes = [_stage_class(stage) for stage in stages] if isinstance(stages, list) else []
    for index, text in _order_problems(classes):
        yield doc.problem(("stages",) if index is None else ("stages", index), text)


def _translate(error: ErrorDetails, doc: Document) -> Iterator[Problem]:
    """Turn one pydantic error into Problems with line, path, value and remedy."""
    path = tuple(error["loc"])
    kind = error["type"]
    value = error["input"]
    if kind == "stage_format":
        yield doc.problem(error["ctx"]["path"], error["msg"])
        return
    if path[:1] == ("stages",) and len(path) > 2:
        path = path[:2] + path[3:]  # the union puts the method's name after the index
    # A list whose items all failed counts as too short.
    all_failed = path == ("stages",) and kind == "too_short" and value
    if path in doc.spoiled or kind == "stage_order" or all_failed:
        return  # said already, with its line
    cls = _owner(path, doc)
    name = str(path[-1]) if path else ""
    known = _method_names() if kind.startswith("union_tag") else []
    methods = f"the methods are {', '.join(known)}"
    if kind == "union_tag_invalid":
        path = (*path, "method")
        method = value["method"]
        text = f"unknown method {show_value(method)}; {nearest(method, known)}{methods}"
    elif kind == "union_tag_not_found":
        text = f"required field 'method' is missing; add 'method: ...', {methods}"
    elif kind == "missing":
        expected = _expectation(cls, name) or "see `pq recipe schema`"
        text = f"required field is missing; add '{name}: ...', {expected}"
    elif kind == "extra_forbidden":
        text = _unknown_field(cls, name, value)
    elif path == ("stages",) and value == []:
        encodes = _methods_of("encode")
        text = f"the list is empty; add at least one encode stage, '- method: ...' with {encodes}"
    elif len(path) == 2 and path[0] == "stages" and not isinstance(value, dict):
        text = f"must be a mapping (value {show_value(value)}); write '- method: ...'"
    else:
        while path not in doc.marks:  # plain unions put the name of the type that failed last
            path = path[:-1]
        text = _misfit(_owner(path, doc), str(path[-1]) if path else "", error)
    yield doc.problem(path, text)


def _unknown_field(cls: type[BaseModel] | None, name: str, value: Any) -> str:
    """Name the field's real home if it has one, else the nearest field of the same class."""
    owners = [method for method, other in METHODS.items() if name in other.model_fields]
    homes = [f"method '{method}'" for method in owners]
    if len(owners) == len(METHODS):
        homes = ["a stage"]
    if name in Calibration.model_fields:
        homes.append("'calibration'")
    if name in Recipe.model_fields and name != "name":
        homes.append("the top level")
    own = [field for field in (cls.model_fields if cls else ()) if field != "name"]
    shown = "" if isinstance(value, dict | list) else f" (value {show_value(value)})"
    remedy = nearest(name, own) or f"fields: {', '.join(own) or 'none here'}"
    if homes:
        remedy = f"it belongs to {' or '.join(homes)}"
    return f"unknown field {show_key(name)!r}{shown}; {remedy.strip()}"


def _misfit(cls: type[BaseModel] | None, name: str, error: ErrorDetails) -> str:
    """Say what the field takes, what it got, and how to mend it."""
    value = error["input"]
    expected = _expectation(cls, name)
    if not cls or not expected or error["type"] in ("value_error", "assertion_error"):
        return error["msg"].removeprefix("Value error, ") + f" (value {show_value(value)})"
    default = cls.model_fields[name].get_default()
    remedy = ""
    if isinstance(default, str | int | float):
        remedy = f"; the default is {show_value(default)}"
    if isinstance(value, str) and "string" not in expected and not strict_yaml.is_text(value):
        remedy = "; remove the quotes"
    elif "string" in expected and isinstance(value, int | float):
        remedy = "; put it in quotes"
    return f"must be {expected} (value {show_value(value)}){remedy}"


def _owner(path: strict_yaml.Path, doc: Document) -> type[BaseModel] | None:
    """Return the class whose field `path` is."""
    if len(path) == 3 and path[0] == "stages":
        return _stage_class(doc.data["stages"][path[1]])
    return {1: Recipe, 2: Calibration if path[:1] == ("calibration",) else None}.get(len(path))


def _stage_class(stage: Any) -> type[Stage] | None:
    method = stage.get("method") if isinstance(stage, dict) else None
    return METHODS.get(method) if isinstance(method, str) else None


def _methods_of(kind: Kind) -> str:
    return ", ".join(method for method, cls in METHODS.items() if cls.kind == kind)


def _expectation(cls: type[BaseModel] | None, name: str) -> str:
    """Describe in words what a field takes, its range included; empty
    when there is no such field."""
    if not cls or name not in cls.model_fields:
        return ""
    return _words(cls.model_json_schema()["properties"][name])


def _words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return " or ".join(show_value(option) for option in options)
    names = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
    }
    names |= {"string": "a string", "array": "a list"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema)
    return f"{names.get(schema.get('type', ''), 'a mapping')} {limits}".strip()
