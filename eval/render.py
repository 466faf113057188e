"""Put the tables of results files into docs/results.md and README.md.

    python eval/render.py

A part stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. docs/results.md gets all tables
under `accuracy`, `speed` and `memory`, README.md one small table under `results`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ablation  # the scripts beside this one
import accuracy
import bench_peers
import gemma
import gguf_accuracy
import gpu_speed
import growth
import ideas
import ladimo
import memory
import sbvr
import vllm_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
_FIRST = ("yardstick-4bit", "fireq-ablation", "sbvr", "ladimo")
"""Results files in the order in which they are read best; others follow by name."""
_ELSEWHERE = ("models", "fineserve", "latency", "vllm-", "draft-", "tensor-parallel")
"""How the names of others begin: docs/models.md, docs/plan*.md, docs/draft.md and docs/serving.md."""
_OWN_PAGES = {"vllm-table": ("vllm.md", "engine", vllm_table.table)}
"""Results file → the page that shows it, its section, its table."""
_KINDS = {
    "ratios": (bench_peers.table, "Conversions beside other tools"),
    "forward_passes": (growth.table, "Time of a block"),
    "part": (ablation.table, "FireQ part by part"),
    "method": (sbvr.table, "SBVR beside other formats at equal bits"),
    "conversion": (ladimo.table, "LaDiMo beside pruning"),
    "row": (gemma.table, "A real model: Gemma 3 270M"),
    "idea": (ideas.table, "Ideas of other papers beside the recipes, at counted bits"),
    "file": (gguf_accuracy.table, "GGUF files beside llama.cpp's own types, all run by llama.cpp"),
}
"""Key of a row that only one kind of results has → its table, its heading."""
_ROWS: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    ("round to nearest, W4A16", "yardstick-4bit", {"recipe": "rtn", "activations": "none"}),
    ("NF4 (bitsandbytes)", "sbvr", {"method": "4-bit NF4 (bitsandbytes)"}),
    ("AWQ, W4A16", "yardstick-4bit", {"recipe": "awq", "activations": "none"}),
    ("GPTQ, W4A16", "yardstick-4bit", {"recipe": "gptq", "activations": "none"}),
    ("`fireq-linear`, W4A16", "yardstick-4bit", {"recipe": "fireq-linear", "activations": "none"}),
    (
        "`fireq-linear`, W4A8-FP8",
        "yardstick-4bit",
        {"recipe": "fireq-linear", "activations": "fp8"},
    ),
    ("`fireq`, W4A8 and an INT4 cache", "fireq-ablation", {"part": "linear and KV4"}),
    ("`sbvr`, W4A16", "sbvr", {"method": "4-bit SBVR"}),
    ("GPTQ, W3A16", "sbvr", {"method": "3-bit GPTQ g128"}),
    ("`sbvr-3bit`, W3A16", "sbvr", {"method": "3-bit SBVR"}),
    ("GPTQ, W2A16", "sbvr", {"method": "2-bit GPTQ g128"}),
    ("`sbvr-2bit`, W2A16", "sbvr", {"method": "2-bit SBVR"}),
)
"""Rows of the small table: what it is called, the results file, what finds it there."""


def results() -> list[Path]:
    """All results files, in the order of the page, but for those that pages of their own show."""
    files = {
        path.stem: path
        for path in sorted(RESULTS.glob("*.json"))
        if not path.stem.startswith(_ELSEWHERE)
    }
    first = [files.pop(stem) for stem in _FIRST]
    return [*first, *files.values()]


def summary(folder: Path) -> str:
    """A few rows of the results files: bits per weight, KL divergence on both models."""
    files = {path.stem: _data(path) for path in folder.glob("*.json")}
    lines = ["| method | bits per weight | KLD | KLD, with outliers |", "|---|---:|---:|---:|"]
    for name, file, key in _ROWS:
        found = {row["model"]: row for row in files[file]["rows"] if key.items() <= row.items()}
        plain, outliers = found["yardstick"], found["yardstick-outliers"]
        bits = plain["bits_per_weight"]
        lines.append(f"| {name} | {bits:.3f} | {_kld(plain):.4f} | {_kld(outliers):.4f} |")
    return "\n".join(lines) + "\n"


def _data(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _kld(row: Mapping[str, Any]) -> float:
    """Of a row of either form; as its kernel computes, where it has one."""
    figures = row.get("figures")
    found = row if figures is None else figures.get("kernel", figures["stock"])
    return float(found["kld_mean"])


def _table(data: dict[str, Any]) -> tuple[str, str]:
    """Table and heading of a file about accuracy."""
    found = (kind for key, kind in _KINDS.items() if key in data["rows"][0])
    table, heading = next(found, (accuracy.table, "Integer weights at 4 bits"))
    return table(data), heading


def _part(path: Path) -> tuple[str, str]:
    """The section that a results file belongs to, and what goes there."""
    data = _data(path)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    if "ceilings" in data:
        head = f"medians of {data['rounds']} rounds ({data['device']}; {versions})"
        return "speed", f"`{path.name}`: {head}.\n\n{gpu_speed.table(data)}\n"
    if "memory" in data:
        return "memory", f"`{path.name}` ({data['machine']}; {versions}):\n\n{memory.table(data)}\n"
    table, heading = _table(data)
    head = f"`{path.name}`: {data['protocol']} ({data['machine']}; {versions})."
    note = f" {data['note']}" if data.get("note") else ""
    return "accuracy", f"### {heading}\n\n{head}{note}\n\n{table}\n"


def main(page: Path, files: Sequence[Path]) -> None:
    """Rewrite the sections; every table is headed by the protocol that its file records."""
    text = fill(page.read_text(encoding="utf-8"), files, page)
    page.write_text(text, encoding="utf-8")


def fill(text: str, files: Sequence[Path], page: Path) -> str:
    """The text of a page with the sections of all that `files` hold made anew."""
    parts: dict[str, list[str]] = {}
    for path in files:
        name, part = _part(path)
        parts.setdefault(name, []).append(part)
    for name, tables in parts.items():
        text = put(text, name, "\n".join(tables), page)
    return text


def own_pages() -> list[str]:
    """Results files that pages of their own show, of those that were measured."""
    return [stem for stem in _OWN_PAGES if (RESULTS / f"{stem}.json").exists()]


def own_page(stem: str) -> tuple[Path, str]:
    """A page that shows one results file, and its text with the section made anew."""
    name, section, table = _OWN_PAGES[stem]
    page, data = ROOT / "docs" / name, _data(RESULTS / f"{stem}.json")
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    shown = f"`{stem}.json`: {data['protocol']} ({data['machine']}; {versions}).\n\n{table(data)}\n"
    return page, put(page.read_text(encoding="utf-8"), section, shown, page)


def put(text: str, name: str, tables: str, page: Path) -> str:
    """The text with another section `name`; leaves the program where the page has none."""
    section = re.compile(rf"(<!-- {name}: begin -->\n).*(<!-- {name}: end -->)", re.DOTALL)
    text, count = section.subn(lambda m: m[1] + tables + m[2], text)
    if count != 1:
        sys.exit(f"{page}: the markers `{name}: begin` and `{name}: end` are missing")
    return text


if __name__ == "__main__":
    main(ROOT / "docs" / "results.md", results())
    for one in own_pages():
        its_page, anew = own_page(one)
        its_page.write_text(anew, encoding="utf-8")
    readme = ROOT / "README.md"
    changed = put(readme.read_text(encoding="utf-8"), "results", summary(RESULTS), readme)
    readme.write_text(changed, encoding="utf-8")
