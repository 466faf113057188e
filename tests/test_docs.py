"""README.md, CONTRIBUTING.md and docs/ say what is so: links, commands, code, messages, generated parts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import quantize
from quantize import errors
from quantize.cli import app
from quantize.errors import PqError
from quantize.recipe.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
README_BYTES = 8192
LAUNCHERS = ("accelerate launch", "torchrun")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=named)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def script(path: Path) -> ModuleType:
    """A script that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its data classes look their own types up
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`\n]+)`", prose(page))


# Links


def links(page: Path) -> list[str]:
    """Targets of links and pictures that stay within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    found += re.findall(r"""(?:src|srcset|href)=["']([^"']+)["']""", prose(page))
    return [target for target in found if "://" not in target]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Anchors that both GitHub and the site give to headings."""
    heads = re.findall(r"^#+ (.+?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", head) for head in heads]
    return frozenset({github_slug(head) for head in plain} & {site_slug(head) for head in plain})


def github_slug(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


def site_slug(head: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", head).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


@each_page
def test_links_lead_somewhere(page: Path):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), target
        if there.suffix == ".md" and anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=named)
def test_pages_of_the_site_link_to_nothing_outside_of_it(page: Path):
    for target in links(page):
        assert (page.parent / target.partition("#")[0]).resolve().is_relative_to(DOCS), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r"([\w-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.rglob("*.md"))


def test_the_readme_leads_to_every_page():
    reached = {target.partition("#")[0] for target in links(ROOT / "README.md")}
    pages = {named(page) for page in DOCS.rglob("*.md")} - {"docs/index.md"}
    assert pages <= reached


def test_slugs_are_those_of_github_and_of_the_site():
    assert github_slug("Memory, disk and time") == site_slug("Memory, disk and time") == "memory-disk-and-time"
    assert github_slug("a – b") != site_slug("a – b")


# Commands


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of every command in a shell block, `#` and what follows left out."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def arguments_of_pq(words: list[str]) -> list[str] | None:
    """What `pq` is given in a command; None where it is another command."""
    if ">" in words:
        words = words[: words.index(">")]
    if words[0] == "pq":
        return words[1:]
    if " ".join(words).startswith(LAUNCHERS):
        return words[words.index("quantize") + 1 :]
    return None


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def parse(arguments: list[str]) -> None:
    """Parse what `pq` is given, and do nothing; an exception where it would refuse."""
    command, name, context = root_command(), "pq", None
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        context = type(command).context_class(command, info_name=name, parent=context, **command.context_settings)
        name = arguments[0]
        command, arguments = command.commands[name], arguments[1:]
    if hasattr(command, "commands"):
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(arguments) <= known | {"--help"}, arguments
        return
    command.make_context(name, list(arguments), parent=context)


@each_page
def test_commands_parse(page: Path):
    for words in command_lines(page):
        arguments = arguments_of_pq(words)
        if arguments is not None:
            parse(arguments)


def test_the_parser_refuses_what_pq_refuses():
    for wrong in (["convert", "--modle", "x"], ["convert", "--model", "x"], ["recipe", "show"], ["bench", "fit"]):
        with pytest.raises(Exception, match=r"(?i)no such option|missing"):
            parse(wrong)
    with pytest.raises(KeyError):
        parse(["convertt"])
    parse(["eval", "x", "--num_fewshot", "1"])


def options(command: Any) -> set[str]:
    """Options of a command and of all below it."""
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*(options(child) for child in getattr(command, "commands", {}).values()))


@each_page
def test_commands_and_options_in_a_sentence_exist(page: Path):
    others = ("--num_processes", "--nproc-per-node", "--kv-cache-dtype", "--help")
    known = options(root_command())
    for span in spans(page):
        words = span.split()
        if words[0] == "pq" and len(words) > 1 and words[1] in root_command().commands:
            command = root_command().commands[words[1]]
            if len(words) > 2 and words[2] in getattr(command, "commands", {}):
                command = command.commands[words[2]]
            given = {word for word in words if word.startswith("--")}
            assert given <= options(command) | {"--help"}, span
        elif words[0] == "pq" and len(words) > 1 and words[1].islower():
            raise AssertionError(f"{span}: no such command")
        for word in words:
            if re.fullmatch(r"--[a-z][a-z_-]*", word) and word not in others and words[0] not in ("pip", "python"):
                assert word.replace("_", "-") in known, span


@each_page
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [shlex.join(words) for words in command_lines(page)]
    for target in re.findall(r"^make ((?:[a-z-]+ ?)+)", "\n".join(lines + spans(page)), re.MULTILINE):
        assert set(target.split()) <= targets, target


# Code


@each_page
def test_python_blocks_compile_and_import_what_there_is(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantize"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_worked_bytes_are_right():
    found = blocks(DOCS / "formats.md", "python")
    assert len(found) >= 6
    space: dict[str, Any] = {}
    for block in found:
        exec(block, space)


@each_page
def test_json_blocks_are_json(page: Path):
    for block in blocks(page, "json"):
        json.loads(block)


@each_page
def test_recipes_are_valid(page: Path, tmp_path: Path):
    for i, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_recipe(str(path)).stages


@each_page
def test_files_that_are_named_exist(page: Path):
    for span in spans(page):
        if re.fullmatch(r"(?:quantize|tests|eval|docs|recipes|calib_data)/[\w/.-]*", span):
            assert (ROOT / span).exists() or re.search("DEVICE|NAME", span), span


# What is quoted


@cache
def sentences() -> str:
    """All texts of the code, an expression within one as `{}`."""
    out = []
    for path in sorted(Path(quantize.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                out.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return "\n".join(out)


def rows(text: str) -> list[list[str]]:
    """Cells of all tables, heads and rules left out."""
    tables = re.findall(r"^\|.*\n\|[-:| ]+\n((?:\|.*\n?)*)", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_messages_are_those_of_the_code():
    quoted = [row[0] for row in rows(text_of(DOCS / "troubleshooting.md")) if row[0].startswith("`")]
    assert len(quoted) > 40
    for message in quoted:
        assert message.strip("`") in sentences(), message


def test_the_exit_codes_are_those_of_the_classes():
    table = text_of(DOCS / "troubleshooting.md").partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    listed = {int(code): meaning for code, meaning in rows(table)}
    classes = {cls.exit_code: cls.__name__ for cls in PqError.__subclasses__() if cls.__module__ == errors.__name__}
    assert set(listed) == set(classes) | {0, 130}
    subject = {"Usage": "command line", "Recipe": "recipe", "Model": "model", "Data": "text", "Output": "output"}
    subject |= {"Verify": "read back", "Room": "memory", "Quality": "gate", "Stopped": "stopped"}
    for code, name in classes.items():
        assert subject[name.removesuffix("Error")] in listed[code], name


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").encode()) <= README_BYTES


def test_recipes_that_the_readme_advises_exist():
    table = text_of(ROOT / "README.md").partition("\n## Which recipe")[2].partition("\n## ")[0]
    names = {path.stem for path in shipped_recipes()}
    for row in rows(table):
        advised = [name for name in re.findall(r"`([\w-]+)`", row[1]) if not name.startswith("--")]
        assert advised
        assert set(advised) <= names, row


# What is generated


@pytest.fixture(scope="module")
def render() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "eval"))
    yield importlib.import_module("render")
    sys.path.remove(str(ROOT / "eval"))


@pytest.mark.parametrize("page", [page for page in PAGES if "begin -->" in text_of(page)], ids=named)
def test_generated_parts_are_up_to_date(page: Path):
    generate = script(DOCS / "generate.py")
    assert generate.generated(text_of(page)) == text_of(page), "run make docs"


def test_every_part_has_a_page():
    generate = script(DOCS / "generate.py")
    everything = "\n".join(text_of(page) for page in PAGES)
    for name in generate.PARTS:
        assert everything.count(f"<!-- {name}: begin -->") == 1, name
        assert everything.count(f"<!-- {name}: end -->") == 1, name


def test_a_changed_part_is_noticed():
    generate = script(DOCS / "generate.py")
    page = text_of(DOCS / "recipes.md")
    changed = page.replace("| `sbvr` |", "| `sbrv` |")
    assert changed != page
    assert generate.generated(changed) == page


def test_tables_of_results_are_up_to_date(render: ModuleType):
    page = DOCS / "results.md"
    assert render.rendered(text_of(page), render.results(), page) == text_of(page), "run make docs"
    readme = ROOT / "README.md"
    small = render.put(text_of(readme), "results", render.summary(ROOT / "eval" / "results"), readme)
    assert small == text_of(readme), "run make docs"


def test_pictures_are_up_to_date():
    drawn = script(DOCS / "pictures.py").files()
    assert set(drawn) == set((DOCS / "pictures").glob("*.svg"))
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, "run make docs"
