"""Parts of a model card that are told of any checkpoint: figures as a table, and how to serve it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import PqError
from quantize.formats.engines import TRANSFORMERS
from quantize.inspect.commands import context_in, start_commands, usual_context
from quantize.inspect.engines import loadings


@dataclass(frozen=True)
class Figures:
    """One comparison with the parent; nats and fractions."""

    text: str
    """Which text, and in what windows."""
    tokens: int
    """Predictions."""
    kld: float | None
    kld_stderr: float | None
    top1: float | None
    perplexity: float
    parent_perplexity: float | None


def quality_table(rows: Sequence[Figures]) -> list[str]:
    """Lines of a markdown table."""
    head = ("text", "tokens", "KL divergence", "same first choice", "perplexity", "parent's")
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        error = "" if row.kld_stderr is None else f" ± {row.kld_stderr:.1g}"
        cells = (
            plain_cell(row.text),
            f"{row.tokens:,}",
            "" if row.kld is None else f"{row.kld:.3g}{error}",
            "" if row.top1 is None else f"{100 * row.top1:.1f} %",
            f"{row.perplexity:.4g}",
            "" if row.parent_perplexity is None else f"{row.parent_perplexity:.4g}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plain_cell(text: str) -> str:
    """Text of others as one cell of a table, without markup of its own."""
    return re.sub(r"([|`<>\[\]*])", r"\\\1", " ".join(text.split()))


def loads_row(folder: Path) -> str:
    """Cells of a table: which engines load a checkpoint."""
    try:
        return f"| {loadings(folder).line.replace(': ', ' | ', 1)} |"
    except PqError:
        return "| loads in | not told |"


def serving_lines(
    name: str, folder: Path, config: Mapping[str, Any], on_hub: bool = False
) -> list[str]:
    """Markdown that says how a checkpoint is started, by engine.

    name: what it is called there. folder: where it is now. config: its config.json.
    """
    try:
        found = loadings(folder)
    except PqError:  # which names this machine's folder
        return ["Not told: pq reads no checkpoints of this format."]
    context = usual_context(context_in(config))
    lines: list[str] = []
    for engine, commands in start_commands(name, folder, found, context, on_hub=on_hub).items():
        language = "python" if engine == TRANSFORMERS.name else "bash"
        lines += [f"{engine}:", "", f"```{language}", *commands, "```", ""]
    lines.append(
        f"`pq serve-check {name}` says more: GPUs on which it fits, and what is missing where."
    )
    return lines
