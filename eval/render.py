"""Put the accuracy tables of results files into README.md, between the markers `accuracy: begin` and `accuracy: end`.

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
import ladimo
import sbvr

_SECTION = re.compile(r"(<!-- accuracy: begin -->\n).*(<!-- accuracy: end -->)", re.DOTALL)


def _table(data: dict[str, Any]) -> str:
    kinds = {"part": ablation.table, "method": sbvr.table, "conversion": ladimo.table}
    return next((table for key, table in kinds.items() if key in data["rows"][0]), accuracy.table)(data)


def main(readme: Path, results: list[Path]) -> None:
    """Rewrite the section; every table is headed by the protocol and versions that its file records."""
    parts = []
    for path in results:
        data = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        parts.append(f"`{path.name}`: {data['protocol']} ({data['machine']}; {versions}).\n\n{_table(data)}\n")
    text, count = _SECTION.subn(lambda m: m[1] + "\n".join(parts) + m[2], readme.read_text())
    if count != 1:
        sys.exit(f"{readme}: the markers are missing")
    readme.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
