"""Writes a gate file from measured figures, commented so that it can be read without the manual."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import DataError
from quantize.files.yaml_scalars import is_text
from quantize.gate.checks import HIGHER_IS_BETTER, stderr_of
from quantize.gate.entries import Settings
from quantize.version import __version__

ERRORS = 3.0
"""Standard errors that a figure may get worse by: of figures on other text, one in 700 would."""
_MEASURED = ("kld_mean", "delta_nll", "top1_agreement")
"""Figures that have a standard error."""
_FORMAT = "bits_per_weight"
_WORDS = {
    "kld_mean": "KL(parent || model), nats per token; less is better",
    "delta_nll": "mean NLL of the model minus the parent's, nats per token; less is better",
    "top1_agreement": "share of tokens with the parent's likeliest token; more is better",
    "bits_per_weight": "of quantized weights, scales counted; the format alone decides it",
}
_SAFE = re.compile(r"[A-Za-z./][\w./@+-]*")


@dataclass(frozen=True)
class Candidate:
    """A recipe or checkpoint that was measured."""

    name: str
    figures: Mapping[str, Any]
    """An Evaluation, as a dict."""
    folder: str | None = None
    """Of a checkpoint, from the gate file's folder, or a Hub id; None for a recipe."""
    recipe: str | None = None
    """Of a recipe's file, where it is not the name."""


def gate_text(
    candidates: Sequence[Candidate],
    model: str,
    settings: Settings,
    errors: float = ERRORS,
    command: str = "",
) -> str:
    """The text of a gate file. model: the parent, as the file names it.

    DataError where there are no standard errors, which takes two windows.
    """
    first = candidates[0].figures
    lines = [
        "# What these models must reach against their parent, checked by `pq gate run FILE`.",
        f"# Measured by pq {__version__} on {datetime.date.today().isoformat()}: "
        f"{first['tokens']} predictions in {first['windows']} windows",
        f"# of {_comment(first['data'])} (SHA-256 of the tokens {first['data_sha256'][:16]}).",
    ]
    if command:
        lines += [f"# Written by: {_comment(command)}"]
    lines += [
        "#",
        "# value: the figure measured. stderr: one standard error of it, windows being the independent",
        "# units. tolerance: how much worse it may get; '3 se' is three standard errors, 20% a fifth of",
        "# the value, 0.02 the metric's own unit. `recovery: 0.97` instead is the least share of the",
        "# parent's figure. A change within one standard error is no news; the same software on the same",
        "# machine moves nothing at all, so a tolerance may be made as narrow as you like.",
        "# Figures that got better are told of, and kept with --update-baselines --reason '...'.",
        f"model: {_word(model)}",
        f"evaluation: {_settings(settings)}",
        "# tasks: [arc_easy]  # lm-eval's; checked as `arc_easy/acc: {recovery: 0.97}`",
        "# task_limit: 200",
    ]
    checkpoints = [c for c in candidates if c.folder is not None]
    recipes = [c for c in candidates if c.folder is None]
    if checkpoints:
        lines += [
            "",
            "# Folders (from this file's) or Hub ids, whoever wrote them.",
            "checkpoints:",
        ]
        lines += [line for c in checkpoints for line in _entry(c, errors)]
    if recipes:
        lines += ["", "# Each is converted anew before it is measured.", "recipes:"]
        lines += [line for c in recipes for line in _entry(c, errors)]
    return "\n".join(lines) + "\n"


def _settings(settings: Settings) -> str:
    shown = {
        "protocol": settings.protocol,
        "dataset": settings.dataset,
        "text_field": settings.text_field,
        "chat_template": settings.chat_template,
        "seqlen": settings.seqlen,
        "max_windows": settings.max_windows,
        "context": settings.context or None,
        "numerics": settings.numerics,
        "bos": settings.bos,
        "dtype": settings.dtype,
    }
    pairs = [f"{key}: {_scalar(value)}" for key, value in shown.items() if value is not None]
    return f"{{{', '.join(pairs)}}}"


def _entry(candidate: Candidate, errors: float) -> list[str]:
    figures = candidate.figures
    lines = [f"  {_word(candidate.name)}:"]
    if candidate.folder not in (None, candidate.name):
        lines.append(f"    folder: {_word(str(candidate.folder))}")
    if candidate.recipe not in (None, candidate.name):
        lines.append(f"    recipe: {_word(str(candidate.recipe))}")
    lines.append(f"    protocol: {figures['protocol']}")
    for metric in _MEASURED:
        value, stderr = figures.get(metric), stderr_of(figures, metric)
        if value is None or stderr is None:
            raise DataError(
                f"{candidate.name}: {metric} has no standard error on {figures['windows']} window; "
                "give more text, or a smaller --seqlen"
            )
        lines += _check(metric, _rounded(value, stderr), f"{stderr:.2g}", errors, value)
    if (bits := figures.get(_FORMAT)) is not None:
        lines.append(f"    {_FORMAT}: {{value: {bits!r}, tolerance: 0}}  # {_WORDS[_FORMAT]}")
    return lines


def _check(metric: str, value: str, stderr: str, errors: float, exact: float) -> list[str]:
    margin = errors * float(stderr)
    limit = exact - margin if HIGHER_IS_BETTER[metric] else exact + margin
    sign = ">=" if HIGHER_IS_BETTER[metric] else "<="
    return [
        f"    # {_WORDS[metric]}; passes {sign} {limit:.4g}",
        f"    {metric}: {{value: {value}, stderr: {stderr}, tolerance: {errors:g} se}}",
    ]


def _rounded(value: float, stderr: float) -> str:
    """A figure to a hundredth of its standard error: the rounding takes nothing from the limit."""
    numbers = (f"{value:.{digits}g}" for digits in range(3, 17))
    return next((n for n in numbers if abs(float(n) - value) <= stderr / 100), repr(value))


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _word(value) if isinstance(value, str) else str(value)


def _word(text: str) -> str:
    """A text as YAML, in quotes where it needs them."""
    return text if _SAFE.fullmatch(text) and is_text(text) else json.dumps(text)


def _comment(text: object) -> str:
    return " ".join(str(text).split())


def folder_name(folder: Path, base: Path) -> str:
    """How a gate file in `base` names a folder: from itself where the folder is not far, so that
    both can move together."""
    whole = os.path.abspath(folder)
    near = os.path.relpath(whole, os.path.abspath(base))
    return whole if near.startswith("../../..") else near
