"""The notebook of the documentation: tidy as it lies there, and it runs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "compare.ipynb"


def sources() -> dict[str, str]:
    """Code of each cell by its id."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def test_it_lies_there_as_nobody_has_run_it():
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(ids) == len(set(ids))
    for cell in book["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    for code in sources().values():
        ast.parse(code)
        assert max(map(len, code.splitlines())) <= 100


def output(cell: dict[str, Any]) -> str:
    """All that a cell has shown, printed text and tables."""
    parts = []
    for shown in cell["outputs"]:
        parts.append(shown.get("text", ""))
        parts += [str(value) for value in shown.get("data", {}).values()]
    return "\n".join(parts)


def test_it_runs():
    reason = "nbclient and ipykernel are not installed (pip install -e '.[notebook]')"
    nbformat = pytest.importorskip("nbformat", reason=reason)
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    client = nbclient.NotebookClient(
        book,
        timeout=300,
        startup_timeout=300,  # the machine may be busy
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    shown = {cell["id"]: output(cell) for cell in book["cells"] if cell["cell_type"] == "code"}
    assert "<table>" in shown["convert"]
    assert "KLD mean" in shown["measure"]
    assert shown["compare"].count("<tr>") == 4  # head, parent, two recipes
    lines = shown["export"].strip().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["reference-model", "gptq", "rtn"]
    assert "<table>" in shown["load"]
    assert "not an empty folder" in shown["errors"]
