"""Write the parts of the documentation that follow from the code.

    python docs/generate.py

A part stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, NAME being a key of `PARTS`.
Tables of results come from `eval/render.py`. tests/test_docs.py tells when a page is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_SIGNS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
}
_TYPES = {
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
_LARGEST_SEED = 2**63 - 1
"""A limit that nobody meets, and which would only be noise in a table."""


def recipe_table() -> str:
    """The shipped recipes: stages, scheme, format, what they are for."""
    from quantize.recipe.recipe import load_recipe

    head = ("recipe", "stages", "weights, activations, cache", "format", "what it is")
    lines = [_row(head), "|---" * len(head) + "|"]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(path.stem)
        stages = " → ".join(f"`{stage.method}`" for stage in recipe.stages)
        name, form = f"`{recipe.name}`", f"`{recipe.format}`"
        lines.append(_row((name, stages, _scheme(recipe.stages), form, recipe.description)))
    return "\n".join(lines)


def choices() -> str:
    """The names to begin with, as `pq recipe ls` shows them, and what the columns mean."""
    from quantize.recipe.aliases import alias_of
    from quantize.recipe.listing import CHOICES, HEADS, LEGEND, list_aliases, list_shipped

    known = {listing.name: listing for listing in (*list_aliases(), *list_shipped())}
    lines = [_row(HEADS), "|---|---|---|---:|---:|---|"]
    for name in CHOICES:
        first, *rest = known[name].cells()
        lines.append(_row((f"`{first}`", *rest)))
    aliases = [(name, alias_of(name)) for name in CHOICES]
    stands = "; ".join(f"`{name}` is `{alias}`" for name, alias in aliases if alias)
    return "\n".join([*lines, "", f"{stands}. {'. '.join(LEGEND)}."])


def _scheme(stages: Any) -> str:
    """`W4A8KV4` and the like; 16 bits where no stage says otherwise."""
    encoder = next((stage for stage in stages if stage.kind == "encode"), None)
    weights = encoder.bits if encoder else 16
    activations = 8 if getattr(encoder, "activations", "none") == "fp8" else 16
    cache = "KV4" if any(stage.kind == "cache" for stage in stages) else ""
    return f"W{weights}A{activations}{cache}"


def stage_fields() -> str:
    """Every method with its fields, from the schema that `pq recipe schema` prints."""
    from quantize.methods import STAGES
    from quantize.recipe.recipe import recipe_schema

    schema = recipe_schema()
    parts = []
    for stage in sorted(STAGES, key=lambda cls: str(cls.model_fields["method"].default)):
        found = schema["$defs"][stage.__name__]
        text = " ".join(found["description"].split())
        head = f"## {found['properties']['method']['default']}\n\n*{stage.kind} stage.* {text}\n"
        fields = {name: field for name, field in found["properties"].items() if name != "method"}
        parts.append(f"{head}\n{_fields(fields)}")
    return "\n\n".join(parts)


def recipe_fields() -> str:
    """The keys of a recipe file, and those under `calibration`."""
    from quantize.recipe.recipe import recipe_schema

    schema = recipe_schema()
    top = dict(schema["properties"])
    for nested in ("calibration", "stages"):
        del top[nested]
    calibration = schema["$defs"]["Calibration"]["properties"]
    return f"{_fields(top)}\n\nUnder `calibration`:\n\n{_fields(calibration)}"


def _fields(fields: Mapping[str, Any]) -> str:
    lines = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = f"`{_yaml(field['default'])}`" if "default" in field else "required"
        meaning = " ".join(field.get("description", "").split())
        lines.append(_row((f"`{name}`", _takes(field), default, meaning)))
    return "\n".join(lines)


def _takes(field: Mapping[str, Any]) -> str:
    """What a field of a JSON schema takes, in words."""
    if "anyOf" in field:
        return " or ".join(_takes(part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{_yaml(option)}`" for option in field["enum"])
    if field["type"] == "array":
        return f"list of ({_takes(field['items'])})"
    given = {key: field[key] for key in _SIGNS if field.get(key, _LARGEST_SEED) < _LARGEST_SEED}
    limits = [f"{_SIGNS[key]} {limit:g}" for key, limit in given.items()]
    return " ".join((_TYPES[field["type"]], ", ".join(limits))).strip()


def _yaml(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return f'"{value}"' if value == "*" else str(value)


def edge_table() -> str:
    """The scale edges of a dense decoder."""
    import torch
    from transformers import AutoConfig

    from quantize.model.skeleton import Skeleton

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 8}
    config = AutoConfig.for_model("llama", num_hidden_layers=1, num_key_value_heads=2, **sizes)
    lines = ["| edge | divided by λ | multiplied by λ |", "|---|---|---|"]
    for edge in Skeleton.of_config(config, torch.float32).arch.edges:
        sinks = ", ".join(f"`{sink}`" for sink in edge.sinks)
        lines.append(_row((f"`{edge.name}`", f"`{edge.source}`", sinks)))
    return "\n".join(lines)


def model_families() -> str:
    """Counts, and the families that people download with what holds for each."""
    from quantize.cli.models import known, summary

    table = known()
    lines = [f"{summary(table)}.", "", *_model_head("family")]
    for family, types in table["families"].items():
        rows = [(f"{family}: `{name}`", table["types"][name]) for name in types]
        lines += [_model_row(name, row) for name, row in rows]
        if not rows:
            lines.append(_row((family, *[""] * (len(_MODEL_HEADS) - 1), "not swept")))
    return "\n".join(lines)


def model_types() -> str:
    """All types of the sweep."""
    from quantize.cli.models import known

    rows = known()["types"].items()
    return "\n".join(_model_head("type") + [_model_row(f"`{name}`", row) for name, row in rows])


_MODEL_HEADS = ("kind", "works", "W8 KLD", "logits, smoothed", "proved", "stock", "not with")


def _model_head(first: str) -> list[str]:
    return [_row((first, *_MODEL_HEADS)), "|---" * (1 + len(_MODEL_HEADS)) + "|"]


def _model_row(name: str, row: Mapping[str, Any]) -> str:
    from quantize.cli.models import RECIPES

    changes = [row["change"][check] for check in ("smooth", "rotate") if check in row["change"]]
    kld = row["kld"].get("rtn8")
    stock = {"": "", "loads": "loads"}.get(row.get("stock", ""), "does not load, as pq says")
    lacks = [
        f"{', '.join(RECIPES[check] for check in checks)}: {why}"
        for why, checks in row.get("refused", {}).items()
    ]
    lacks += [
        f"{RECIPES[check]}: {status}"
        for check, status in row["status"].items()
        if status == "wrong"
    ]
    cells = (
        name,
        row.get("kind", ""),
        row["works"],
        "" if kld is None else f"{kld:.1e}",
        f"{max(changes):.0e}" if changes else "",
        ", ".join(row.get("proved", {})),
        stock,
        "; ".join(lacks),
    )
    return _row(cells)


def engine_table() -> str:
    """What kernels of engines take, from the table that the lines about serving come from."""
    from quantize.formats.engines import KERNELS

    head = ("engine", "where", "kernel", "bits", "groups", "inputs", "sizes", "experts")
    lines = [_row(head), "|---" * len(head) + "|"]
    for kernel in KERNELS:
        groups = "any"
        if kernel.groups is not None:
            sizes = sorted(group for group in kernel.groups if group is not None)
            groups = ", ".join(
                [*map(str, sizes), *(["whole rows"] if None in kernel.groups else [])]
            )
        needs = f" (needs {kernel.needs})" if kernel.needs else ""
        lines.append(
            _row(
                (
                    str(kernel.engine),
                    kernel.hardware,
                    kernel.name + needs,
                    ", ".join(map(str, sorted(kernel.bits))),
                    groups,
                    "FP8" if kernel.fp8 else "16-bit",
                    "any" if kernel.side == 1 else f"multiples of {kernel.side}",
                    "yes" if kernel.experts else "no",
                )
            )
        )
    return "\n".join(lines)


def command_reference() -> str:
    """Every command with its arguments and options."""
    import typer

    from quantize.cli import app

    return "\n\n".join(_commands(typer.main.get_command(app), "pq"))


def _commands(command: Any, name: str) -> Iterator[str]:
    """Help of a command, or of all that a group holds."""
    for child in getattr(command, "commands", {}).values():
        yield from _commands(child, f"{name} {child.name}")
    if hasattr(command, "commands"):
        return
    lines = [f"## {name}", "", " ".join((command.help or "").split()), ""]
    lines += ["| argument or option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        meaning = " ".join((parameter.help or "").split())
        lines.append(_row((_names(parameter), _default(parameter), meaning)))
    yield "\n".join(lines)


def _names(parameter: Any) -> str:
    """An option in all its spellings, or the placeholder of an argument."""
    if parameter.param_type_name == "option":
        return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    return f"`{str(parameter.metavar or parameter.name).upper()}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    return "" if default in (None, False, ()) or callable(default) else f"`{default}`"


def calibration_text() -> str:
    """calib_data/README.md without its title."""
    text = (ROOT / "calib_data" / "README.md").read_text(encoding="utf-8")
    return text.partition("\n")[2].strip()


PARTS: Mapping[str, Callable[[], str]] = {
    "choices": choices,
    "recipes": recipe_table,
    "stages": stage_fields,
    "recipe fields": recipe_fields,
    "edges": edge_table,
    "engines": engine_table,
    "families": model_families,
    "types": model_types,
    "commands": command_reference,
    "calibration text": calibration_text,
}


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def generate(text: str) -> str:
    """A page with every part of it made anew."""
    for name, part in PARTS.items():
        if f"<!-- {name}: begin -->" in text:
            text = _put(text, name, part())
    return text


def _put(text: str, name: str, part: str) -> str:
    section = re.compile(rf"(<!-- {name}: begin -->\n).*(<!-- {name}: end -->)", re.DOTALL)
    return section.sub(lambda match: f"{match[1]}\n{part}\n\n{match[2]}", text)


def pages() -> list[Path]:
    """All pages that may hold such parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Rewrite the pages that are out of date."""
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = generate(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
