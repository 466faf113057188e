"""Recipes: one strict YAML file that says what becomes of a model, read into frozen types.

Law: a recipe is restructure* smooth* cache? encode*, with a restructure, a cache or an
encode stage. Every problem of a file is reported at once, one line each, with file,
line, path, value and remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from quantize.errors import RecipeError, UsageError
from quantize.files import strict_yaml
from quantize.files.problems import error_of, no_mapping
from quantize.files.strict_yaml import Document
from quantize.formats.registry import DEFAULT, FORMATS
from quantize.methods import STAGES, Stage
from quantize.methods.plugins import installed_methods
from quantize.recipe.files import find, read_recipe
from quantize.recipe.foreign import foreign
from quantize.recipe.messages import TOP, Sections, law_problems, misfit, translate
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.stages import METHODS, learn, order_problems

if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = Annotated[Union[STAGES], Field(discriminator="method")]  # noqa: UP007

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Calibration(BaseModel):
    """Text that the statistics are measured on."""

    model_config = _STRICT

    dataset: str = "builtin"
    """Named calibration set, or a path to a file of text or of rows."""
    nsamples: int = Field(default=128, ge=1)
    """Number of sequences."""
    seqlen: int = Field(default=2048, ge=8)
    """Tokens of a sequence."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the choice of sequences."""
    chat_template: bool | None = None
    """Whether rows go through the tokenizer's chat template; null: conversations do."""
    text_field: str | None = None
    """Column that holds the text or the conversation; null: the set's own, else recognized."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every sequence begins with the BOS token; auto: where the tokenizer adds it."""


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
    embedding_bits: Literal[8] | None = None
    """`8`: the embedding, and with it a head that shares it, in blocks of 8 bits (Q8_0), for which
    `format: gguf` is needed; null: it stays as it is."""
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
        for _, text in order_problems([type(stage) for stage in stages]):
            raise PydanticCustomError("stage_order", "{text}", {"text": text})
        return stages

    @model_validator(mode="after")
    def _fits_format(self) -> Self:
        if self.embedding_bits is not None and not FORMATS[self.format].keeps_blocks:
            text = "needs 'format: gguf', no other loader takes a packed embedding; remove it"
            raise PydanticCustomError(
                "stage_format", "{text}", {"text": text, "path": ("embedding_bits",)}
            )
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
        bos: str | None = None,
    ) -> Recipe:
        """Return a copy whose calibration has the given values; None keeps the recipe's own.

        Raises UsageError, one line per value out of range.
        """
        given = {"dataset": dataset, "nsamples": nsamples, "seqlen": seqlen, "seed": seed}
        given |= {"chat_template": chat_template, "text_field": text_field, "bos": bos}
        changes = {key: value for key, value in given.items() if value is not None}
        try:
            calibration = Calibration(**self.calibration.model_dump() | changes)
        except ValidationError as err:
            lines = []
            for error in err.errors():
                name = str(error["loc"][0])
                lines.append(f"{name}: {misfit(Calibration, name, error)}")
            raise UsageError("\n".join(lines)) from None
        return self.model_copy(update={"calibration": calibration})


_SECTIONS: Sections = {"calibration": Calibration, TOP: Recipe}


def load_recipe(name_or_path: str) -> Recipe:
    """Read the recipe that `find` finds, with the settings of an alias. Raises RecipeError with one
    line per problem."""
    found = find(name_or_path)
    source = str(found.path) if found.path == Path(name_or_path) else found.path.name
    recipe = parse_recipe(read_recipe(found.path, source), source)
    if not found.settings:
        return recipe
    return with_stage_fields(recipe, found.settings)


def parse_recipe(text: str | bytes, source_name: str) -> Recipe:
    """Parse and validate one recipe; `source_name` is the file for messages
    and its stem the recipe's name.

    Raises RecipeError with a line `file:line: path: problem; remedy` for each problem.
    """
    doc = strict_yaml.load(text, source_name)
    if not isinstance(doc.data, dict):
        text = no_mapping(doc.data, "begin with 'description: ...' and 'stages:'")
        raise error_of(source_name, doc.problems or [doc.problem((), text)])
    if other := foreign(doc.data):
        raise RecipeError("\n".join(f"{source_name}: {line}" for line in other.lines()))
    _load_methods(doc)
    problems = [*doc.problems, *law_problems(doc)]
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
        problems += [
            problem for error in err.errors() for problem in translate(error, doc, _SECTIONS)
        ]
    if recipe is None or problems:
        raise error_of(source_name, problems)
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
        if learn(name):
            allow_methods()
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


def allow_methods() -> None:
    """Let the type of a recipe take what METHODS has now."""
    union: Any = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007
    Recipe.model_fields["stages"].annotation = tuple[union, ...]
    Recipe.model_rebuild(force=True)


def _load_methods(doc: Document) -> None:
    """Load the methods that a recipe names and pq does not have.

    RecipeError where one cannot be used.
    """
    stages = doc.data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        name = stage.get("method") if isinstance(stage, dict) else None
        if isinstance(name, str) and name not in METHODS:
            try:
                if learn(name):
                    allow_methods()
            except RecipeError as err:
                problem = doc.problem(("stages", index, "method"), str(err))
                raise error_of(doc.source, [problem]) from None
