"""Speed of the kernels on a GPU: everything that `pq bench kernels`, `decode` and `prefill` measure, in one file.

    python eval/gpu_speed.py --output eval/results [--only decode] [--rounds 20]

Writes kernels-DEVICE.json after each figure, and the roofline kernels-DEVICE.svg at the end. A section ends at a kernel
that is wrong or fails, with a note; the others go on, and the exit code is 1. `--only` measures one section anew and
leaves the others as they are in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measuring import keep  # the script beside this one

from quantize.bench.speed.run import SECTIONS
from quantize.bench.speed.stand import Stand
from quantize.report.roofline import write_roofline

_HEADS = {
    "kernels": "µs, times faster than {}, part of the copy's bandwidth",
    "decode": "µs (or tokens a second), times faster than {}",
    "prefill": "µs, times faster than {}",
}


def table(data: dict[str, Any]) -> str:
    """Markdown of a results file: targets, and for each section sizes down and batches M (rows or sequences) across."""
    parts = [_targets(data["targets"])] if data["targets"] else []
    parts += [_section(name, rows) for name, rows in data["sections"].items() if rows]
    ceilings = ", ".join(
        f"{name} {rate / 1e12:,.0f} TFLOP/s" for name, rate in data["ceilings"]["matmul"].items()
    )
    parts.append(
        f"Measured ceilings: copy {data['ceilings']['copy'] / 1e12:.2f} TB/s, large product {ceilings}."
    )
    parts += [f"- {note}" for note in data["notes"]]
    return "\n".join(parts)


def _targets(targets: Iterable[dict[str, Any]]) -> str:
    lines = ["| target | wanted | lowest found | |", "|---|---|---|---|"]
    for target in targets:
        met = "met" if target["met"] else "**missed**"
        lines.append(
            f"| {target['name']} | {target['wanted']:.2f} | {target['found']:.2f} | {met} |"
        )
    return "\n".join(lines) + "\n"


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    batches = sorted({row["M"] for row in rows})
    peer = next(iter(rows[0]["peers"]), "torch")
    lines = [
        f"| {name}: {_HEADS[name].format(peer)} | size | "
        + " | ".join(f"M = {M}" for M in batches)
        + " |"
    ]
    lines.append("|---" * (len(batches) + 2) + "|")
    cells = {(row["what"], row["shape"], row["M"]): _cell(name, row, peer) for row in rows}
    for what, shape in dict.fromkeys((row["what"], row["shape"]) for row in rows):
        lines.append(
            f"| {what} | {shape} | "
            + " | ".join(cells.get((what, shape, M), "") for M in batches)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(section: str, row: dict[str, Any], peer: str) -> str:
    made = row.get("tokens_per_second")
    first = f"{made['pq']:,.0f} tok/s" if made else f"{row['time']['seconds'] * 1e6:,.1f}"
    ratios = (
        f", {ratio:.2f}×{'' if name == peer else f' {name}'}"
        for name, ratio in row["ratios"].items()
    )
    return f"{first}{next(ratios, '')}" + (
        f", {row['bandwidth']:.0%}" if section == "kernels" else ""
    )


def measure(device: torch.device, only: str | None, rounds: int, output: Path) -> tuple[Path, bool]:
    """Measure all sections, or one; the results file, and whether none of them stopped early."""
    stand = Stand(device, rounds)
    record = stand.record()
    name = re.sub(r"[^a-z0-9]+", "-", record.device.lower()).strip("-")
    path, right = output / f"kernels-{name}.json", True
    before = json.loads(path.read_text()) if only and path.exists() else {}
    for section in [only] if only else SECTIONS:
        rows = record.sections.setdefault(section, [])
        try:
            for row in SECTIONS[section](stand):
                rows.append(row)
                print(
                    f"{section}: {row.what} {row.shape}, {row.M}: {row.time.seconds * 1e6:,.1f} us",
                    flush=True,
                )
                keep(_join(before, record.as_json()), path)
        except Exception as err:  # a machine with a GPU is rarely at hand: the other sections are measured all the same
            traceback.print_exc()
            right = False
            stand.note(f"{section} stopped: {(str(err).splitlines() or [type(err).__name__])[0]}")
            keep(_join(before, record.as_json()), path)
    return path, right


def _join(before: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    # What was measured before, but for what was measured anew.
    sections = before.get("sections", {}) | data["sections"]
    found = {target["name"]: target for target in [*before.get("targets", []), *data["targets"]]}
    stale = tuple(f"{section} stopped" for section in data["sections"])
    notes = [note for note in before.get("notes", []) if not note.startswith(stale)]
    return data | {
        "sections": {name: sections[name] for name in SECTIONS if name in sections},
        "targets": list(found.values()),
        "notes": list(dict.fromkeys([*notes, *data["notes"]])),
    }


def main() -> None:
    """Measure, draw, and print what was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder")
    args = parser.parse_args()
    path, right = measure(args.device, args.only, args.rounds, args.output)
    data = json.loads(path.read_text())
    write_roofline(data, path.with_suffix(".svg"))
    print(table(data))
    sys.exit(not right)


if __name__ == "__main__":
    main()
