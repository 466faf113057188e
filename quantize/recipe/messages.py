"""What is wrong with a recipe, in words: pydantic's errors as lines with path, value and remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from quantize.files.problems import Place, Problem, show_key, show_value
from quantize.files.strict_yaml import Document
from quantize.files.yaml_scalars import is_text
from quantize.methods.encode import Encode
from quantize.recipe.files import nearest
from quantize.recipe.foreign_words import foreign_word
from quantize.recipe.stages import METHODS, method_names, methods_of, order_problems, stage_class

Sections = Mapping[str, type[BaseModel]]
"""Class of each mapping that a recipe may hold beside its stages, by its key; that of the recipe
itself by `TOP`, last."""
TOP = ""


def law_problems(doc: Document) -> Iterator[Problem]:
    """Yield what breaks the law, found in the raw data so that a mistake in
    one stage does not hide it."""
    stages = doc.data.get("stages")
    classes = [stage_class(stage) for stage in stages] if isinstance(stages, list) else []
    for index, text in order_problems(classes):
        yield doc.problem(("stages",) if index is None else ("stages", index), text)


def translate(error: ErrorDetails, doc: Document, sections: Sections) -> Iterator[Problem]:
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
    cls = _owner(path, doc, sections)
    name = str(path[-1]) if path else ""
    known = method_names() if kind.startswith("union_tag") else []
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
        text = _unknown_field(cls, name, value, sections)
    elif path == ("stages",) and value == []:
        encodes = methods_of("encode")
        text = f"the list is empty; add at least one encode stage, '- method: ...' with {encodes}"
    elif len(path) == 2 and path[0] == "stages" and not isinstance(value, dict):
        text = f"must be a mapping (value {show_value(value)}); write '- method: ...'"
    else:
        while path not in doc.marks:  # plain unions put the name of the type that failed last
            path = path[:-1]
        text = misfit(_owner(path, doc, sections), str(path[-1]) if path else "", error)
    yield doc.problem(path, text)


def _unknown_field(cls: type[BaseModel] | None, name: str, value: Any, sections: Sections) -> str:
    """Name the field's real home if it has one, else the nearest field of the same class."""
    owners = [method for method, other in METHODS.items() if name in other.model_fields]
    homes = [f"method '{method}'" for method in owners]
    if len(owners) == len(METHODS):
        homes = ["a stage"]
    for section, fields in sections.items():
        if name in fields.model_fields and name != "name":
            homes.append(f"'{section}'" if section != TOP else "the top level")
    own = [field for field in (cls.model_fields if cls else ()) if field != "name"]
    shown = "" if isinstance(value, dict | list) else f" (value {show_value(value)})"
    remedy = nearest(name, own) or f"fields: {', '.join(own) or 'none here'}"
    rounds = cls is not None and issubclass(cls, Encode)
    if word := foreign_word(name, value, rounds):
        remedy = word
    elif homes:
        remedy = f"it belongs to {' or '.join(homes)}"
    return f"unknown field {show_key(name)!r}{shown}; {remedy.strip()}"


def misfit(cls: type[BaseModel] | None, name: str, error: ErrorDetails) -> str:
    """Say what the field takes, what it got, and how to mend it."""
    value = error["input"]
    expected = _expectation(cls, name)
    if not cls or not expected or error["type"] in ("value_error", "assertion_error"):
        return error["msg"].removeprefix("Value error, ") + f" (value {show_value(value)})"
    default = cls.model_fields[name].get_default()
    remedy = ""
    if isinstance(default, str | int | float):
        remedy = f"; the default is {show_value(default)}"
    if isinstance(value, str) and "string" not in expected and not is_text(value):
        remedy = "; remove the quotes"
    elif "string" in expected and isinstance(value, int | float):
        remedy = "; put it in quotes"
    return f"must be {expected} (value {show_value(value)}){remedy}"


def _owner(path: Place, doc: Document, sections: Sections) -> type[BaseModel] | None:
    """Return the class whose field `path` is."""
    if len(path) == 3 and path[0] == "stages":
        return stage_class(doc.data["stages"][path[1]])
    if len(path) == 2:
        return sections.get(str(path[0]))
    return sections[TOP] if len(path) == 1 else None


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
