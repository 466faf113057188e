"""README.md, CONTRIBUTING.md and docs/ say what is so: links, messages, exit codes, generated tables."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from pages import DOCS, PAGES, ROOT, each_page, named, prose, rows, text_of

import quantize
from quantize import errors
from quantize.errors import PqError

README_BYTES = 8192


def script(path: Path) -> ModuleType:
    """A script that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its data classes look their own types up
    spec.loader.exec_module(module)
    return module


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
    for slug in (github_slug, site_slug):
        assert slug("Memory, disk and time") == "memory-disk-and-time"
    assert github_slug("a – b") != site_slug("a – b")


# What is quoted


@cache
def sentences() -> str:
    """All texts of the code, an expression within one as `{}`."""
    out = []
    for path in sorted(Path(quantize.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                out.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return "\n".join(out)


def test_messages_are_those_of_the_code():
    messages = [row[0] for row in rows(text_of(DOCS / "troubleshooting.md"))]
    quoted = [message for message in messages if message.startswith("`")]
    assert len(quoted) > 40
    for message in quoted:
        assert message.strip("`") in sentences(), message


def test_the_exit_codes_are_those_of_the_classes():
    page = text_of(DOCS / "troubleshooting.md")
    table = page.partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    listed = {int(code): meaning for code, meaning in rows(table)}
    own = [cls for cls in PqError.__subclasses__() if cls.__module__ == errors.__name__]
    classes = {cls.exit_code: cls.__name__ for cls in own}
    assert set(listed) == set(classes) | {0, 130}
    subject = {
        "Usage": "command line",
        "Recipe": "recipe",
        "Model": "model",
        "Data": "text",
        "Output": "output",
        "Verify": "read back",
        "Room": "memory",
        "Quality": "gate",
        "Plan": "plan",
        "Stopped": "stopped",
    }
    for code, name in classes.items():
        assert subject[name.removesuffix("Error")] in listed[code], name


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").encode()) <= README_BYTES


def test_recipes_that_the_readme_advises_exist():
    table = text_of(ROOT / "README.md").partition("\n## Which recipe")[2].partition("\n## ")[0]
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
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


GENERATED = [page for page in PAGES if "begin -->" in text_of(page)]


@pytest.mark.parametrize("page", GENERATED, ids=named)
def test_generated_parts_are_up_to_date(page: Path):
    generate = script(DOCS / "generate.py")
    assert generate.generate(text_of(page)) == text_of(page), "run make docs"


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
    assert generate.generate(changed) == page


def test_tables_of_results_are_up_to_date(render: ModuleType):
    page = DOCS / "results.md"
    assert render.fill(text_of(page), render.results(), page) == text_of(page), "run make docs"
    for stem in render.own_pages():
        page, anew = render.own_page(stem)
        assert anew == text_of(page), "run make docs"
    readme = ROOT / "README.md"
    table = render.summary(render.RESULTS)
    small = render.put(text_of(readme), "results", table, readme)
    assert small == text_of(readme), "run make docs"


def test_pictures_are_up_to_date():
    drawn = script(DOCS / "pictures.py").files()
    plotted = {script(ROOT / "eval" / "fineserve_page.py").PICTURE}  # from results
    assert set(drawn) == set((DOCS / "pictures").glob("*.svg")) - plotted
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, "run make docs"
