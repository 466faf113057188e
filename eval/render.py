"""Put the tables of results files into README.md, between the markers `accuracy: begin` and `accuracy: end`; those of
speed and of memory, if any are given, between `speed: begin` and `speed: end`, `memory: begin` and `memory: end`.

python eval/render.py README.md eval/results/*.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import ablation  # the scripts beside this one
import accuracy
import gpu_speed
import ladimo
import memory
import sbvr


def _table(data: dict[str, Any]) -> str:
    kinds = {"part": ablation.table, "method": sbvr.table, "conversion": ladimo.table}
    return next((table for key, table in kinds.items() if key in data["rows"][0]), accuracy.table)(data)


def main(readme: Path, results: list[Path]) -> None:
    """Rewrite the sections; every table is headed by the protocol and versions that its file records."""
    parts: dict[str, list[str]] = {"accuracy": [], "speed": [], "memory": []}
    for path in results:
        data = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        if "ceilings" in data:
            head = f"medians of {data['rounds']} rounds ({data['device']}; {versions})"
            parts["speed"].append(f"`{path.name}`: {head}.\n\n{gpu_speed.table(data)}\n")
        elif "memory" in data:
            parts["memory"].append(f"`{path.name}` ({data['machine']}; {versions}):\n\n{memory.table(data)}\n")
        else:
            head = f"{data['protocol']} ({data['machine']}; {versions})"
            parts["accuracy"].append(f"`{path.name}`: {head}.\n\n{_table(data)}\n")
    text = readme.read_text()
    for name, tables in parts.items():
        if tables:
            text = _put(text, name, "\n".join(tables), readme)
    readme.write_text(text)


def _put(text: str, name: str, tables: str, readme: Path) -> str:
    section = re.compile(rf"(<!-- {name}: begin -->\n).*(<!-- {name}: end -->)", re.DOTALL)
    text, count = section.subn(lambda m: m[1] + tables + m[2], text)
    if count != 1:
        sys.exit(f"{readme}: the markers `{name}: begin` and `{name}: end` are missing")
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
