"""`eval/gpu_speed.py`: one file for all sections, whatever becomes of one of them, and its tables in the README."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import CPU
from speeds import MEASURES, figure, shrink, wrong

from quantize.bench.speed.stand import Stand
from quantize.kernels.int4 import api as int4
from quantize.report.roofline import write_roofline

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    shrink(monkeypatch)
    monkeypatch.syspath_prepend(EVAL)
    made = importlib.import_module("gpu_speed")
    for name, measure in MEASURES.items():
        monkeypatch.setitem(made.SECTIONS, name, measure)
    return made


def stops(data: dict[str, Any]) -> list[str]:
    """Which sections stopped; other notes tell of peers that this torch lacks."""
    return [note.split(":")[0] for note in data["notes"] if " stopped: " in note]


def test_a_stopped_section_leaves_the_others(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    right = int4.multiply_gated_codes
    monkeypatch.setattr(int4, "multiply_gated_codes", wrong(right, 3.0))
    path, good = script.measure(CPU, None, 1, tmp_path)
    data = json.loads(path.read_text())
    assert not good
    assert {name: len(rows) for name, rows in data["sections"].items()} == {
        "kernels": 8,
        "decode": 4,
        "prefill": 3,
    }
    assert stops(data) == [f"{name} stopped" for name in MEASURES]
    monkeypatch.setattr(int4, "multiply_gated_codes", right)
    again, good = script.measure(CPU, "decode", 1, tmp_path)
    data = json.loads(path.read_text())
    assert (again, good) == (path, True)
    assert {name: len(rows) for name, rows in data["sections"].items()} == {
        "kernels": 8,
        "decode": 6,
        "prefill": 3,
    }
    assert stops(data) == ["kernels stopped", "prefill stopped"]
    text = script.table(data)
    assert "| folded | 256x128 |" in text
    assert "tok/s" in text
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.count("|") in (4, 5, 6)
    write_roofline(data, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_tables_go_into_the_readme(script: ModuleType, tmp_path: Path):
    record = Stand(CPU, rounds=2).record()
    record.sections = {
        "kernels": [figure("folded", 1, 10, 2.5)],
        "prefill": [figure("FFN", 16384, 9, 1.2)],
    }
    record.write(tmp_path / "kernels-x.json")
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nb\n")
    render = importlib.import_module("render")
    render.main(readme, [tmp_path / "kernels-x.json"])
    text = readme.read_text()
    assert text.startswith("a\n<!-- speed: begin -->\n`kernels-x.json`: medians of 2 rounds (")
    assert text.endswith("<!-- speed: end -->\nb\n")
    assert "\nold\n" not in text
    assert "| FFN (M = 16 · 1024), × bf16 | 1.24 | 1.20 | **missed** |" in text
    assert "| folded |  | 1,000,000.0, 2.50×, 50% |" in text
    readme.write_text("nothing")
    with pytest.raises(SystemExit, match="speed: begin"):
        render.main(readme, [tmp_path / "kernels-x.json"])
