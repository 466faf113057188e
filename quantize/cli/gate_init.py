"""The work of `pq gate init`, which needs torch."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantize.cli.common import local_model
from quantize.cli.progress import Progress
from quantize.files.disk import write_text
from quantize.gate.entries import Settings
from quantize.gate.file import parse_gate
from quantize.gate.init import candidates_of, targets_of
from quantize.gate.reports import scalars
from quantize.gate.write import Candidate, folder_name, gate_text

if TYPE_CHECKING:
    import torch

    from quantize.evaluation.parents import ParentCache

_SHOWN = ("kld_mean", "delta_nll", "top1_agreement", "bits_per_weight")


def write_first(
    models: Sequence[str],
    baseline: str,
    output: Path,
    errors: float,
    settings: Settings,
    device: torch.device,
    progress: Progress,
    parents: ParentCache | None,
) -> list[Candidate]:
    """Measure and write the file; what is written is what `pq gate run` reads."""
    base = output.parent
    targets = targets_of(models, base, local_model)
    found = candidates_of(
        targets,
        local_model(baseline),
        settings,
        device=device,
        progress=progress,
        parents=parents,
    )
    named = Path(baseline).expanduser()
    model = folder_name(named, base) if named.is_dir() else baseline
    if settings.dataset != "builtin" and Path(settings.dataset).is_file():
        dataset = folder_name(Path(settings.dataset), base)
        settings = dataclasses.replace(settings, dataset=dataset)
    text = gate_text(found, model, settings, errors, shlex.join(["pq", *sys.argv[1:]]))
    parse_gate(text.encode(), output)
    write_text(output, text)
    return found


def print_first(found: Sequence[Candidate], output: Path, as_json: bool) -> None:
    """Say what was measured, and what comes next."""
    if as_json:
        entries = {one.name: scalars(one.figures) for one in found}
        typer.echo(json.dumps({"file": str(output), "entries": entries}, indent=1))
        return
    for one in found:
        figures = scalars(one.figures)
        known = [f"{key} {figures[key]:.4g}" for key in _SHOWN if key in figures]
        typer.echo(f"{one.name}: {', '.join(known)}")
    name = shlex.quote(str(output))
    typer.echo(f"{output} written; keep it in the repository and check with pq gate run {name}")
