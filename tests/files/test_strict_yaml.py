from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantize.errors import RecipeError, UsageError
from quantize.files import strict_yaml
from quantize.methods import STAGES
from quantize.recipe.recipe import Calibration, Recipe, parse_recipe, resolved_yaml
from quantize.recipe.stages import METHODS

GOOD = "description: plain\nstages:\n  - method: rtn\n"
CALIBRATION = "description: d\ncalibration:\n  {}\nstages:\n  - method: rtn\n"


def errors(text: str | bytes, source: str = "r.yaml") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source)
    return str(caught.value).split("\n")


# What a file may say


def test_defaults_are_filled_in_and_the_name_is_the_stem():
    recipe = parse_recipe(GOOD, "some/folder/plain.yaml")
    assert (recipe.name, recipe.description, recipe.format) == (
        "plain",
        "plain",
        "compressed-tensors",
    )
    assert recipe.calibration == Calibration(dataset="builtin", nsamples=128, seqlen=2048, seed=0)
    assert [type(stage) for stage in recipe.stages] == [METHODS["rtn"]]
    assert parse_recipe(GOOD.encode(), "plain.yaml") == recipe


def test_a_recipe_cannot_change():
    with pytest.raises(ValidationError, match="frozen"):
        parse_recipe(GOOD, "plain.yaml").description = "other"


def test_a_recipe_built_in_python_obeys_the_law_too():
    rtn, cas = METHODS["rtn"](), METHODS["cas"]()
    assert Recipe(name="x", description="", stages=(cas, rtn)).stages == (cas, rtn)
    with pytest.raises(ValidationError, match="move it before"):
        Recipe(name="x", description="", stages=(rtn, cas))


@pytest.mark.parametrize(
    ("plain", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("010", 10), ("0o17", 15), ("0x1F", 31), ("+3", 3),
        ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("off", "off"), ("on", "on"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("tRUE", "tRUE"),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("0b1", "0b1"), ("=", "="), ("<<", "<<"),
        ("'1'", "1"), ('"true"', "true"), ("0x", "0x"), ("e5", "e5"), (".", "."),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(plain: str, value: object):
    read = strict_yaml.load(f"a: {plain}", "r.yaml").data["a"]
    assert (read, type(read)) == (value, type(value))


def test_yaml_11_words_stay_text_in_string_fields():
    assert parse_recipe(GOOD.replace("plain", "off"), "r.yaml").description == "off"
    assert (
        parse_recipe(CALIBRATION.format("text_field: no"), "r.yaml").calibration.text_field == "no"
    )


def test_marks_give_the_place_of_every_value():
    marks = strict_yaml.load("a: 1\nb:\n  - x\n  - c: {d: 2}\n", "r.yaml").marks
    assert marks[("a",)] == (1, 1)
    assert marks[("b", 0)] == (3, 5)
    assert marks[("b", 1)] == marks[("b", 1, "c")] == (4, 5)
    assert marks[("b", 1, "c", "d")] == (4, 9)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_spans_cut_the_scalars_out_of_the_text(newline: str):
    text = "# 𝄞\na: 12  # é\nb:\n  - 'x y'\n  - {c: 1e-3, d: []}\n".replace("\n", newline)
    spans = strict_yaml.load("\ufeff".encode() + text.encode(), "r.yaml").spans
    cut = {path: text[start:end] for path, (start, end) in spans.items()}
    assert cut == {("a",): "12", ("b", 0): "'x y'", ("b", 1, "c"): "1e-3"}


# What YAML itself refuses


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("a:\n\t- b", "2:1", "spaces, not tabs"),
        ("a: b: c", "1:5", "in quotes"),
        ("a: 1\n b: 2", "2:3", "'b: 2'"),
        ("x: 1\na: 'open", "2:9", "close the quote"),
        ("a: [1", "1:6", "close the bracket"),
        ("a: 1\n- b", "2:1", "align this line"),
        ("a: \x07", "1:4", "U+0007 is not allowed"),
        ("%YAML 2.0\n---\na: 1", "1:1", "incompatible"),
        ("a: 1\n---\nb: 2", "2:1", "a second document"),
        ("a: " + "[" * 30, "1:24", "nested deeper than 20"),
        ("a: @x", "1:4", "'a: @x'"),
    ],
)
def test_syntax_errors_name_line_column_and_text(text: str, where: str, says: str):
    (line,) = errors(text)
    assert line.startswith(f"r.yaml:{where}: ")
    assert says in line


@pytest.mark.parametrize(
    ("yaml", "where", "says"),
    [
        (
            "description: a\n",
            "2: description",
            "duplicate key, first on line 1; remove one of them",
        ),
        ("calibration: &c {}\n", "2: calibration", "anchor '&c' is refused"),
        ("calibration: *c\n", "2: calibration", "alias '*c' is refused; write the value out"),
        (
            "calibration: !!python/object:os.system {}\n",
            "2: calibration",
            "tag '!!python/object:os.system' is refused",
        ),
        ("format: !!str compressed-tensors\n", "2: format", "tag '!!str' is refused"),
        ("calibration: {seed: .nan}\n", "2: calibration.seed", ".nan is not a finite number"),
        ("calibration: {seed: 1e999}\n", "2: calibration.seed", "too large for a float"),
        (
            "calibration: {seed: " + "9" * 5000 + "}\n",
            "2: calibration.seed",
            "number of 5000 characters",
        ),
        ('calibration: {dataset: "\\ud800"}\n', "2: calibration.dataset", "surrogate"),
        ('"\\ud800": 1\n', "2", r"key '\ud800' is not a plain string"),
        ("12: 1\n", "2", "key '12' is not a plain string; use a field name"),
        ("true: 1\n", "2", "key 'true' is not a plain string"),
        ("?\n: 1\n", "2", "key null is not a plain string"),
        ("? [a, b]\n: 1\n", "2", "a key is not plain text"),
        ("? *c\n: [1, {a: 2}]\n", "2", "a key is not plain text"),
        ("<<: {description: b}\n", "2: '<<'", "unknown field"),
    ],
)
def test_yaml_features_that_are_refused(yaml: str, where: str, says: str):
    (line,) = errors(GOOD.replace("\n", f"\n{yaml}", 1))
    assert line.startswith(f"r.yaml:{where}: ")
    assert says in line


def test_an_alias_bomb_costs_nothing():
    bomb = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [{', '.join(['*a'] * 9)}]\n" for i in range(9))
    begin = time.process_time()
    assert "alias '*a' is refused" in "\n".join(errors(bomb))
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("text", ["? " * 40_000, "- " * 40_000, "[" * 40_000, "{a: " * 20_000])
def test_deep_nesting_stops_early(text: str):
    begin = time.process_time()
    assert "nested deeper than 20" in errors(text)[0]
    assert time.process_time() - begin < 2


def test_size_and_encoding():
    assert "larger than 1 MiB" in errors("#" * (strict_yaml.MAX_BYTES + 1))[0]
    assert (
        errors(b"description: a\nstages: \xff")[0]
        == "r.yaml:2: byte 0xff is not UTF-8; save it as UTF-8"
    )
    assert "not UTF-8" in errors(GOOD.encode("utf-16"))[0]
    assert parse_recipe(b"\xef\xbb\xbf" + GOOD.encode(), "r.yaml").description == "plain"
    assert parse_recipe(GOOD.replace("\n", "\r\n"), "r.yaml").description == "plain"
    assert "mend the escape" in errors('a: "\\UFFFFFFFF"')[0]


@given(
    st.one_of(st.text(), st.binary(), st.text(alphabet="amr: -\n[]{}\"'&*!?|>#%1.e\\\t,ﬀ\ud800"))
)
def test_any_input_gives_a_recipe_or_a_recipe_error(text: str | bytes):
    for candidate in (text, GOOD.encode() + text if isinstance(text, bytes) else GOOD + text):
        try:
            parse_recipe(candidate, "r.yaml")
        except RecipeError as err:
            message = str(err)
        else:
            continue
        assert all(
            line.startswith("r.yaml:") and line.isprintable() for line in message.split("\n")
        )


# Writing back


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field's JSON schema allows."""
    if "anyOf" in schema:
        return st.one_of(
            *(values_of(part) for part in schema["anyOf"] if part.get("type") != "array")
        )
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer":
        return st.integers(low, high)
    if schema["type"] == "number":
        low, high = schema.get("exclusiveMinimum", low), schema.get("exclusiveMaximum", high)
        return st.floats(
            low, high, allow_nan=False, allow_infinity=False,
            exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema,
        )  # fmt: skip
    return {"boolean": st.booleans(), "null": st.none(), "string": TEXTS}[schema["type"]]


TRAPS = [
    "",
    "null",
    "~",
    "1e-3",
    "0o17",
    "0x1f",
    "1",
    ".5",
    ".inf",
    "true",
    "off",
    "yes",
    "2020-01-01",
    "- a",
    "a: b",
]
TRAPS += [
    "#x",
    "&a",
    "*a",
    "!t",
    "1_0",
    "'",
    '"',
    " x ",
    "é",
    "\x85",
    "\ufeff",
    "\u2028",
    "\0",
    "a\n\n b\n",
    "---",
    "😀",
]
TEXTS = st.one_of(
    st.text(),
    st.sampled_from(TRAPS),
    st.from_regex(r"[-+0-9.eox_:~ ]{1,9}", fullmatch=True),
    st.text("ab \n", min_size=100, max_size=300),
)


@st.composite
def some_recipes(draw: st.DrawFn) -> Recipe:
    order = ("restructure", "smooth", "cache", "encode")
    classes = sorted(
        draw(st.lists(st.sampled_from(STAGES), max_size=4)), key=lambda cls: order.index(cls.kind)
    )
    kinds = [cls.kind for cls in classes]
    assume("encode" in kinds and kinds.count("cache") < 2)
    assume(not any(cls.once and classes.count(cls) > 1 for cls in classes))
    try:
        return Recipe(
            name="drawn",
            description=draw(TEXTS),
            format=draw(st.sampled_from(["compressed-tensors", "pq"])),
            calibration=Calibration(**draw_fields(draw, Calibration)),
            stages=tuple(cls(**draw_fields(draw, cls)) for cls in classes),
        )
    except ValidationError:  # fields or stages that contradict each other
        assume(False)
        raise


def draw_fields(draw: st.DrawFn, cls: Any) -> dict[str, Any]:
    properties = cls.model_json_schema()["properties"]
    plain = {
        key: schema
        for key, schema in properties.items()
        if "$ref" not in schema and schema.get("type") != "array"
    }
    return {key: draw(values_of(schema)) for key, schema in plain.items() if draw(st.booleans())}


@settings(max_examples=80, deadline=None)
@given(some_recipes())
def test_resolved_yaml_parses_back(recipe: Recipe):
    text = resolved_yaml(recipe)
    assert parse_recipe(text, "drawn.yaml") == recipe
    assert resolved_yaml(parse_recipe(text, "drawn.yaml")) == text


@pytest.mark.parametrize("text", TRAPS)
def test_resolved_yaml_keeps_awkward_text(text: str):
    recipe = Recipe(name="r", description=text, stages=(METHODS["rtn"](),))
    assert parse_recipe(resolved_yaml(recipe), "r.yaml") == recipe


def test_resolved_yaml_is_complete_and_in_order():
    data = strict_yaml.load(resolved_yaml(parse_recipe(GOOD, "r.yaml")), "r.yaml").data
    assert list(data) == [
        "description",
        "format",
        "head_bits",
        "embedding_bits",
        "calibration",
        "target_bpw",
        "stages",
    ]
    assert list(data["calibration"]) == list(Calibration.model_fields)
    assert next(iter(data["stages"][0])) == "method"
    assert set(data["stages"][0]) == set(METHODS["rtn"].model_fields)


def test_overrides_are_validated():
    recipe = parse_recipe(GOOD, "r.yaml")
    changed = recipe.with_overrides(dataset="x.txt", nsamples=4, seed=7)
    assert changed.calibration == Calibration(dataset="x.txt", nsamples=4, seed=7)
    assert changed.stages == recipe.stages
    assert recipe.with_overrides() == recipe
    with pytest.raises(UsageError) as caught:
        recipe.with_overrides(nsamples=0, seqlen=7)
    assert str(caught.value).split("\n") == [
        "nsamples: must be an integer >= 1 (value 0); the default is 128",
        "seqlen: must be an integer >= 8 (value 7); the default is 2048",
    ]
