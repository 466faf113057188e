"""The text that comes with Python: complete, cleanly split, and refused with a remedy where Python lacks it."""

from __future__ import annotations

import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration import pydocs
from quantize.errors import DataError


@pytest.fixture
def uncached() -> Iterator[None]:
    pydocs.entries.cache_clear()
    pydocs.text.cache_clear()
    yield
    pydocs.entries.cache_clear()
    pydocs.text.cache_clear()


def test_split_of_a_name_never_moves() -> None:
    assert [pydocs.split(name) for name in ("json", "collections", "topic:del", "tkinter")] == [
        "heldout"
    ] * 4
    assert [pydocs.split(name) for name in ("argparse", "heapq", "topic:lambda", "json.dumps")] == [
        "train"
    ] * 4


@given(st.text(max_size=40))
def test_split_hangs_on_the_name_alone(name: str) -> None:
    assert pydocs.split(name) == pydocs.split(name)
    assert pydocs.split(name) in ("train", "heldout")


def test_both_splits_are_worth_using() -> None:
    train, heldout = pydocs.text("train"), pydocs.text("heldout")
    assert len(train) > 1_000_000
    assert 0.05 < len(heldout) / len(train) < 0.2
    for text in (train, heldout):
        assert text.encode().decode() == text


def test_splits_partition_the_entries() -> None:
    assert len(pydocs.text("train")) + len(pydocs.text("heldout")) == (
        sum(len(body) for _, body in pydocs.entries()) + 2 * (len(pydocs.entries()) - 2)
    )
    for name, body in pydocs.entries():
        assert body in pydocs.text(pydocs.split(name))


def test_no_long_paragraph_is_in_both_splits() -> None:
    train, heldout = (
        {p.strip() for p in pydocs.text(s).split("\n\n") if len(p) >= pydocs.MIN_CHARS}
        for s in ("train", "heldout")
    )
    assert len(heldout) > 200
    assert not train & heldout


def test_entries_are_long_enough_and_unique() -> None:
    names = [name for name, _ in pydocs.entries()]
    bodies = [body for _, body in pydocs.entries()]
    assert min(map(len, bodies)) >= pydocs.MIN_CHARS
    assert len(set(names)) == len(names)
    assert len(set(bodies)) == len(bodies)
    assert "argparse" in names
    assert "heapq.merge" in names
    assert sum(name.startswith("topic:") for name in names) > 50


def test_a_prefix_mixes_topics_and_modules() -> None:
    first = [name for name, _ in pydocs.entries()[:200]]
    assert any(name.startswith("topic:") for name in first)
    assert len({name.partition(".")[0] for name in first}) > 50


@pytest.mark.usefixtures("uncached")
def test_a_library_is_parsed_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doc = "Say something about {} that is long enough to be kept, and that no other entry says."
    files = {
        "package/__init__.py": f'"""{doc.format("package")}"""\nraise SystemExit',
        "package/module.py": f'class A:\n async def f(self):\n  """{doc.format("f")}\n\n    Indented.\n  Not.\n  """',
        "broken.py": "def",
        "test/skipped.py": f'"""{doc.format("tests")}"""',
        "site-packages/skipped.py": f'"""{doc.format("installed things")}"""',
        "copy.py": f'"""{doc.format("package")}"""',
        "short.py": '"""Short."""',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert {name: body for name, body in pydocs.entries() if not name.startswith("topic:")} == {
        "copy": doc.format("package"),
        "package.module.A.f": doc.format("f") + "\n\n  Indented.\nNot.",
    }


def test_the_order_repeats() -> None:
    first = pydocs.entries()
    pydocs.entries.cache_clear()
    assert pydocs.entries() == first


@pytest.mark.usefixtures("uncached")
def test_stripped_docstrings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text("x = 1")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"no docstrings in the \.py files of .*use a CPython"):
        pydocs.text("train")


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("module", [None, types.SimpleNamespace(topics={})])
def test_missing_topics_are_refused(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)  # None makes the import fail
    with pytest.raises(DataError, match=r"pydoc_data\.topics.*use a CPython"):
        pydocs.text("heldout")
