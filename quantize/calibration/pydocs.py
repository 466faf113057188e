"""English text that comes with every Python: CPython's language reference and the
standard library's docstrings.

It is the calibration set ("train") and the evaluation set ("heldout") that need no download.
The standard library is parsed, never imported. Passages that several entries share (a chapter
of the reference repeats its sections) are kept once, so that the held-out text holds no long
paragraph of the training text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from quantize.errors import DataError

Split = Literal["train", "heldout"]

MIN_CHARS = 80
"""Shorter entries mostly restate a name; shorter paragraphs may recur without being copies."""

_SKIPPED_DIRS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}
)
# Generated character tables and the topics' own module: a fifth of the library's
# bytes and hardly a docstring.
_SKIPPED_DIRS |= {"encodings", "pydoc_data"}
# These differ between builds of one Python version, and the text should not.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
_REMEDY = "use a CPython with its whole standard library, or name a text of your own"
_HELDOUT_BYTES = 26
"""Names whose first hash byte is below this are held out: 26 of 256, about a tenth."""


@cache
def entries() -> tuple[tuple[str, str], ...]:
    """Return all (name, text) pairs in the order of their names' hashes; names are
    "topic:NAME" or "module.qualname".

    Raises DataError when this Python came without pydoc's topics or without
    the docstrings of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    topics = _topics()
    docstrings = dict(_docstrings(root))
    if not docstrings:
        raise DataError(f"no docstrings in the .py files of {root} (stripped?): {_REMEDY}")
    return tuple(sorted(_without_copies(topics | docstrings), key=lambda entry: _digest(entry[0])))


@cache
def text(split: Split) -> str:
    """Return the entries of one split joined by blank lines; any prefix
    of it is a representative mix.

    Raises DataError like `entries`.
    """
    return "\n\n".join(
        body for name, body in entries() if _is_heldout(name) == (split == "heldout")
    )


def split(name: str) -> Split:
    """Return the split of an entry. It depends on the name alone, so that it is the
    same in every Python version."""
    return "heldout" if _is_heldout(name) else "train"


def _is_heldout(name: str) -> bool:
    return _digest(name)[0] < _HELDOUT_BYTES


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(f"this Python lacks pydoc_data.topics ({error}): {_REMEDY}") from error
    if not topics:
        raise DataError(f"pydoc_data.topics of this Python is empty: {_REMEDY}")
    return {f"topic:{name}": inspect.cleandoc(body) for name, body in topics.items()}


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of every module, class
    and function below `root`."""
    for path in _sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            # an unreadable file or a template that is no Python only makes the text shorter
            continue
        yield from _node_docstrings(
            tree, ".".join(parts[:-1] if path.stem == "__init__" else parts)
        )


def _sources(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        # Pruned in place: site-packages is often many times the library's size.
        subfolders[:] = [
            sub
            for sub in subfolders
            if sub not in _SKIPPED_DIRS and not sub.startswith(_SKIPPED_PREFIXES)
        ]
        found += [
            Path(folder, f)
            for f in files
            if f.endswith(".py") and not f.startswith(_SKIPPED_PREFIXES)
        ]
    return sorted(found)


def _node_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _node_docstrings(child, f"{name}.{child.name}")


def _without_copies(bodies: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the entries in name order without the long paragraphs of earlier ones, as
    far as enough text is left."""
    paragraphs: set[str] = set()
    texts: set[str] = set()
    for name, body in sorted(bodies.items()):
        new = [
            p
            for p in re.split(r"\n\s*\n", body)
            if len(p) < MIN_CHARS or p.strip() not in paragraphs
        ]
        paragraphs.update(p.strip() for p in new)
        kept = "\n\n".join(new).strip()
        if len(kept) >= MIN_CHARS and kept not in texts:
            texts.add(kept)
            yield name, kept
