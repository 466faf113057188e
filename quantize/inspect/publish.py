"""What of an output goes to the Hub: exactly the files that its pq.json names, each as it was written,
and a card that is told the model's name there and what was measured since.

The output itself is not changed. Where the card becomes another one, so does its hash in the pq.json
that goes with it: `pq verify` of what was fetched from the Hub finds all as it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantize.errors import ModelError, VerifyError
from quantize.files.checkpoint import read_json
from quantize.files.hashing import sha256_file
from quantize.files.provenance import (
    DIGEST,
    PROVENANCE,
    canonical_json,
    provenance_digest,
    read_provenance,
)
from quantize.files.side_files import is_recorded_name
from quantize.inspect.card import Figures, plain_cell, quality_table, serving_lines

CARD = "README.md"
QUALITY, SERVING, PARENTS = "Quality", "How to serve it", "The parent's card"
"""Titles of a card's sections."""
NAME = "DIR"
"""What the model is called in a card's commands until it has a name on the Hub."""
_SENTENCE = "Measured with `pq eval`:"


@dataclass(frozen=True)
class Publication:
    """Files to upload, and what is to be said of them."""

    files: Mapping[str, Path | bytes]
    """By path in the repository."""
    sizes: Mapping[str, int]
    """Bytes."""
    notes: tuple[str, ...]


def publication(folder: Path, name: str) -> Publication:
    """What of an output becomes the model `name` on the Hub.

    ModelError for a folder that pq did not write, VerifyError where a file is missing or not what
    was written; README.md may be another one, since people edit cards.
    """
    record = read_provenance(folder)
    if record is None:
        raise ModelError(
            f"{folder}: has no {PROVENANCE}: pq did not write it; `hf upload {name} {folder}` "
            "uploads any folder"
        )
    files: dict[str, Path | bytes] = {}
    for file, digest in sorted(record["files"].items()):
        path = folder / file
        if not is_recorded_name(file) or not path.is_file():
            raise VerifyError(f"{path}: is missing; copy the folder again, or convert again")
        if file != CARD and sha256_file(path) != digest:
            raise VerifyError(
                f"{path}: is not the file that was written; copy the folder again, or convert again"
            )
        files[file] = path
    notes: list[str] = []
    if CARD in files:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        card = _card(text, folder, name, notes).encode("utf-8")
        files[CARD] = card
        record["files"][CARD] = sha256(card).hexdigest()
        record[DIGEST] = provenance_digest(record)
    files[PROVENANCE] = canonical_json(record).encode("utf-8")
    sizes = {
        file: len(one) if isinstance(one, bytes) else one.stat().st_size
        for file, one in files.items()
    }
    return Publication(files, sizes, tuple(notes))


def _card(text: str, folder: Path, name: str, notes: list[str]) -> str:
    """The card with the model's name on the Hub, how to serve it from there, and evaluations."""
    ours, title, parents = text.partition(f"\n## {PARENTS}\n")
    ours = re.sub(rf"(`pq [a-z-]+ ){NAME}\b", lambda found: found[1] + name, ours)
    config = read_json(folder / "config.json")
    ours = with_section(ours, SERVING, serving_lines(name, folder, config, on_hub=True))
    rows, tasks, old = _evaluations(folder)
    if old:
        notes.append(f"{old} evaluations beside it are older than the output and left out")
    if rows or tasks:
        kept = section(ours, QUALITY).partition(_SENTENCE)[0].strip()
        lines = [kept, "", _SENTENCE, "", *(quality_table(rows) if rows else []), ""]
        ours = with_section(ours, QUALITY, [*lines, *_tasks_table(tasks)])
        notes.append(f"the card tells of {len(rows)} evaluations and {len(tasks)} task scores")
    else:
        notes.append("no evaluations lie beside it; pq eval saves them, pq push tells of them")
    return ours + title + parents


def section(card: str, title: str) -> str:
    """The text below a title of the second level; empty where there is none."""
    found = _find(card, title)
    return card[found[0] : found[1]].strip() if found else ""


def with_section(card: str, title: str, lines: Sequence[str]) -> str:
    """The card with other text below a title; unchanged where it has no such title."""
    found = _find(card, title)
    if found is None:
        return card
    body = "\n".join(lines).strip()
    return f"{card[: found[0]]}\n{body}\n{card[found[1] :]}"


def _find(card: str, title: str) -> tuple[int, int] | None:
    start = re.search(rf"^## {re.escape(title)}[ \t]*\n", card, re.MULTILINE)
    if start is None:
        return None
    end = re.search(r"^## ", card[start.end() :], re.MULTILINE)
    return start.end(), start.end() + end.start() if end else len(card)


def _evaluations(folder: Path) -> tuple[list[Figures], list[Mapping[str, Any]], int]:
    """Comparisons with the parent and scores of tasks that `pq eval` saved beside an output, and
    how many of those files are older than it."""
    made = (folder / PROVENANCE).stat().st_mtime
    rows: list[Figures] = []
    tasks: list[Mapping[str, Any]] = []
    old = 0
    beside = folder.absolute().with_name(f"{folder.absolute().name}.eval")
    for path in sorted(beside.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("kind") not in ("perplexity", "tasks"):
                continue
            if path.stat().st_mtime < made:
                old += 1
            elif data["kind"] == "tasks":
                tasks += [dict(score) for score in data["scores"]]
            else:
                rows.append(_figures(data))
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ModelError(f"{path}: is no evaluation that pq wrote ({err}); remove it") from None
    return rows, tasks, old


def _figures(data: Mapping[str, Any]) -> Figures:
    return Figures(
        f"{data['data']}, {data['protocol']}, {data['numerics']} numerics",
        int(data["tokens"]),
        data["kld_mean"],
        data["kld_stderr"],
        data["top1_agreement"],
        float(data["perplexity"]),
        data["baseline_perplexity"],
    )


def _tasks_table(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    if not scores:
        return []
    lines = ["| task | metric | documents | model | parent |", "|---|---|--:|--:|--:|"]
    for score in scores:
        cells = (
            plain_cell(str(score["task"])),
            plain_cell(str(score["metric"])),
            str(score["n"]),
            f"{float(score['value']):.4g}",
            f"{float(score['baseline']):.4g}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines
