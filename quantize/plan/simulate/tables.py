"""Costs from a table of measurements, with the columns of FineServe's profiles.

model, qformat, tp, mps_percentage, batch_size, input_len, prefill_time, tpot (seconds), one row a
measurement; other columns are not looked at.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantize.errors import UsageError
from quantize.plan.simulate.costs import StepCosts

LONGEST = 512
"""Decoding sequences up to which a table is continued; its rows end at 32."""
SHARERS = (1, 2, 3, 4, 5)
"""Engines on one GPU of which the rows at 100/m % tell something; 20 % is the least."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    model: str
    format: str
    tp: int
    share: float
    """Percent of the GPU's multiprocessors that it had."""
    batch: int
    tokens: int
    """Of each prompt."""
    prefill: float
    """Seconds of the batch's prompts."""
    decode: float
    """Seconds of a step after."""


@dataclass(frozen=True)
class Profile:
    """What the rows of one model, format and tp say."""

    costs: StepCosts
    token_seconds: float
    """Mean time of a prompt's token at batch 1, which FineServe reckons with."""
    error: float
    """Median of |fitted − measured| / measured of the prompts' times."""


def read_rows(path: Path) -> list[Row]:
    """Raises UsageError with the line of a mistake."""
    found = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for row in reader:
                try:
                    found.append(_row(row))
                except (KeyError, TypeError, ValueError) as error:
                    reason = f"line {reader.line_num}: {type(error).__name__} {error}"
                    raise UsageError(f"--profile {path}: {reason}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--profile {path}: cannot be read ({error})") from None
    if not found:
        raise UsageError(f"--profile {path}: holds no rows")
    return found


def _row(row: dict[str, str]) -> Row:
    made = Row(
        row["model"],
        row["qformat"],
        int(row["tp"]),
        float(row["mps_percentage"]),
        int(row["batch_size"]),
        int(row["input_len"]),
        float(row["prefill_time"]),
        float(row["tpot"]),
    )
    if not min(made.tp, made.share, made.batch, made.tokens, made.prefill, made.decode) > 0:
        raise ValueError("all figures must be above 0")
    return made


def profiles(rows: Iterable[Row]) -> dict[tuple[str, str, int], Profile]:
    """(model, format, tp) → its profile, for each that has rows of the whole GPU."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.format, row.tp), []).append(row)
    return {key: _profile(own) for key, own in groups.items() if any(r.share == 100 for r in own)}


def with_stretch(profile: Profile, of: Profile) -> Profile:
    """A profile that was measured on whole GPUs alone, with another's stretch."""
    return replace(profile, costs=replace(profile.costs, stretch=of.costs.stretch))


def _profile(rows: Sequence[Row]) -> Profile:
    whole = [row for row in rows if row.share == 100]
    first, each, error = _line(whole)
    batches = sorted({row.batch for row in whole})
    steps = [statistics.fmean(r.decode for r in whole if r.batch == b) for b in batches]
    more = 0.0
    if len(batches) > 1:  # beyond the last batch as between the last two
        more = max(0.0, (steps[-1] - steps[-2]) / (batches[-1] - batches[-2]))
    decoding = [0.0]
    for n in range(1, LONGEST + 1):
        inside = float(np.interp(n, batches, steps))
        decoding.append(inside + more * max(0, n - batches[-1]))
    ones = [row.prefill / row.tokens for row in whole if row.batch == batches[0]]
    costs = StepCosts(
        weights=(0.0,),
        decoding=tuple(decoding),
        token=each,
        prefill=first,
        stretch=(_stretch(rows, "prefill"), _stretch(rows, "decode")),
    )
    return Profile(costs, statistics.fmean(ones) / batches[0], error)


def _line(rows: Sequence[Row]) -> tuple[float, float, float]:
    """(a, b, median relative error) of prefill = a + b · tokens, least squares of relative errors,
    a ≥ 0."""
    tokens = np.array([row.batch * row.tokens for row in rows], dtype=float)
    times = np.array([row.prefill for row in rows])
    table = np.stack([1 / times, tokens / times], axis=1)
    (a, b), *_ = np.linalg.lstsq(table, np.ones(len(rows)), rcond=None)
    if a < 0:
        a, b = 0.0, float((tokens / times).sum() / ((tokens / times) ** 2).sum())
    error = float(np.median(np.abs(a + b * tokens - times) / times))
    return float(a), float(b), error


def _stretch(rows: Sequence[Row], what: str) -> tuple[float, ...]:
    """Time on a share of 100/m % over that on all of it, for m = 1, 2, …; () without such rows.

    The median over batches and lengths, never below 1 nor less than with fewer engines.
    """
    cells: dict[tuple[int, int], dict[float, float]] = {}
    for row in rows:
        value = row.prefill if what == "prefill" else row.decode
        cells.setdefault((row.batch, row.tokens), {})[row.share] = value
    ratios: dict[float, list[float]] = {}
    for cell in cells.values():
        if 100.0 in cell:
            for share, value in cell.items():
                ratios.setdefault(share, []).append(value / cell[100.0])
    shares = sorted(ratios)
    if len(shares) < 2:
        return ()
    medians = [statistics.median(ratios[share]) for share in shares]
    at = [float(np.interp(100 / m, shares, medians)) for m in SHARERS if 100 / m >= shares[0]]
    return tuple(np.maximum.accumulate(np.maximum(at, 1.0)).tolist())
