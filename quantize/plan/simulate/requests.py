"""Requests to serve: from a trace in a file, or drawn."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.errors import UsageError

TRACES = {
    "azure-code": "azure_2023_code.csv",
    "azure-conv": "azure_2023_conv.csv",
    "mooncake": "mooncake_conversation.csv",
}
"""Names of public traces and the files they are looked for in. pq brings none of them."""
_HASHED = 512
"""Tokens of a block of Mooncake's hash_ids."""
TRACE_DIR = "PQ_TRACE_DIR"
"""Environment variable with the folder that holds them."""
COLUMNS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "time": (("timestamp_s", 1.0), ("timestamp_ms", 1e-3), ("timestamp", 1.0), ("TIMESTAMP", 1.0)),
    "input": (("input_tokens", 1.0), ("ContextTokens", 1.0), ("input", 1.0)),
    "output": (("output_tokens", 1.0), ("GeneratedTokens", 1.0), ("output", 1.0)),
    "prefix": (("prefix_tokens_seen_before", 1.0), ("prefix_tokens", 1.0), ("prefix", 1.0)),
}
"""Column of a request → the headers it may have, with what their values are multiplied by."""


@dataclass(frozen=True)
class Requests:
    """Requests in the order in which they arrive."""

    arrival: NDArray[np.float64]
    """Seconds after the start."""
    input: NDArray[np.int64]
    """Tokens of the prompt, at least 1."""
    output: NDArray[np.int64]
    """Tokens to generate, at least 1."""
    prefix: NDArray[np.int64]
    """Leading tokens of the prompt that a cache without bounds would hold."""
    model: NDArray[np.int64]
    """Which of the served models it is for."""
    source: NDArray[np.int64] | None = None
    """The earlier request whose prompt begins with these leading tokens; −1: none does. None where it
    was not told: see `sources`."""

    def __len__(self) -> int:
        return len(self.arrival)

    def at_rate(self, rate: float) -> Requests:
        """The same requests, their gaps scaled so that `rate` arrive a second in the mean."""
        return replace(self, arrival=self.arrival * (self.rate / rate))

    def for_model(self, index: int) -> Requests:
        """The same requests for another model."""
        return replace(self, model=np.full(len(self), index))

    def first(self, count: int) -> Requests:
        """No more than `count` requests."""
        return Requests(
            self.arrival[:count],
            self.input[:count],
            self.output[:count],
            self.prefix[:count],
            self.model[:count],
            None if self.source is None else self.source[:count],
        )

    @cached_property
    def sources(self) -> NDArray[np.int64]:
        """`source`, or where it was not told the latest earlier request of the model whose prompt is
        as long as the prefix: the best case for a cache that keeps what was used last."""
        if self.source is not None:
            return self.source
        found = np.full(len(self), -1, dtype=np.int64)
        inputs, models = self.input.tolist(), self.model.tolist()
        for i in np.flatnonzero(self.prefix).tolist():
            wanted, model = int(self.prefix[i]), models[i]
            earlier = range(i - 1, -1, -1)
            found[i] = next((j for j in earlier if inputs[j] >= wanted and models[j] == model), -1)
        return found

    @property
    def rate(self) -> float:
        """Requests a second in the mean; 0 where all arrive at once."""
        span = float(self.arrival[-1] - self.arrival[0]) if len(self) > 1 else 0.0
        return (len(self) - 1) / span if span else 0.0


def merged(parts: list[Requests]) -> Requests:
    """Requests of several streams as one, by arrival; at equal times those of the first go first."""
    arrival = np.concatenate([part.arrival for part in parts])
    order = np.argsort(arrival, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.cumsum([0, *(len(part) for part in parts)])
    sources = [
        np.where(part.sources >= 0, place[np.maximum(part.sources, 0) + start], -1)
        for part, start in zip(parts, starts, strict=False)
    ]
    inputs, outputs, prefix, model = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("input", "output", "prefix", "model")
    )
    return Requests(arrival[order], inputs, outputs, prefix, model, np.concatenate(sources)[order])


def poisson(
    rate: float,
    count: int,
    rng: np.random.Generator,
    input_mean: float = 512.0,
    output_mean: float = 256.0,
    spread: float = 1.0,
) -> Requests:
    """Poisson arrivals with log-normal lengths of the means given; `spread` is the standard
    deviation of their logarithm, 0 for lengths that are all alike."""

    def lengths(mean: float) -> NDArray[np.int64]:
        drawn = mean * np.exp(spread * rng.standard_normal(count) - spread**2 / 2)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)

    arrival = np.cumsum(rng.exponential(1.0 / rate, count))
    zeros = np.zeros(count, dtype=np.int64)
    return Requests(arrival, lengths(input_mean), lengths(output_mean), zeros, zeros)


def requests(source: str, seed: int = 0, folder: Path | None = None) -> Requests:
    """Requests from `poisson:RATE[:COUNT[:INPUT[:OUTPUT]]]`, a name of TRACES or a CSV file.

    Names are looked for in `folder`, or else where PQ_TRACE_DIR points. Raises UsageError.
    """
    if source.startswith("poisson:"):
        return _drawn(source, seed)
    if source not in TRACES:
        return read_trace(Path(source))
    place = folder or (Path(os.environ[TRACE_DIR]) if os.environ.get(TRACE_DIR) else None)
    if place is None:
        reason = f"pq brings no traces; set {TRACE_DIR} to the folder that holds"
        raise UsageError(f"--trace {source}: {reason} {TRACES[source]}, or give the file")
    return read_trace(place / TRACES[source])


def _drawn(source: str, seed: int) -> Requests:
    try:
        rate, count, inputs, outputs = (
            float(given or default)
            for given, default in zip(
                [*source.split(":")[1:], "", "", ""], ("", "5000", "512", "256"), strict=False
            )
        )
    except ValueError:
        shape = "poisson:RATE[:COUNT[:INPUT[:OUTPUT]]], all numbers"
        raise UsageError(f"--trace {source}: write {shape}") from None
    if min(rate, count, inputs, outputs) <= 0 or len(source.split(":")) > 5:
        raise UsageError(f"--trace {source}: give up to four numbers above 0")
    return poisson(rate, int(count), np.random.default_rng(seed), inputs, outputs)


def read_trace(path: Path) -> Requests:
    """Read a CSV with a header: time, input and output tokens and, if there, prefix tokens.

    Headers are those of COLUMNS; times are seconds, milliseconds or dates. A file `.jsonl` is read as
    Mooncake's, whose `hash_ids` tell which prompts begin alike. Raises UsageError with the line of a
    mistake.
    """
    if path.suffix == ".jsonl":
        return _read_hashed(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            places = {name: _column(path, header, name) for name in COLUMNS}
            rows = [_row(path, reader.line_num, row, places) for row in reader if row]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace {path}: cannot be read ({error})") from None
    if not rows:
        raise UsageError(f"--trace {path}: holds no requests")
    table = np.array(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    whole = table[:, 1:].astype(np.int64)
    start = table[:, 0] - table[0, 0]
    # An answer of nothing, as a cancelled request has it, still costs its prompt and one step.
    return Requests(
        start,
        np.maximum(whole[:, 0], 1),
        np.maximum(whole[:, 1], 1),
        whole[:, 2],
        np.zeros(len(whole), dtype=np.int64),
    )


def _column(path: Path, header: list[str], name: str) -> tuple[int, float] | None:
    for known, factor in COLUMNS[name]:
        if known in header:
            return header.index(known), factor
    if name == "prefix":
        return None
    names = ", ".join(known for known, _ in COLUMNS[name])
    raise UsageError(f"--trace {path}: line 1: no column for {name}; call it one of {names}")


def _read_hashed(path: Path) -> Requests:
    """A line a request: timestamp (ms), input_length, output_length, hash_ids of blocks of 512 tokens,
    each of which stands for the whole prompt up to its end."""
    rows: list[tuple[float, int, int, list[int]]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_hashed(path, number, line))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace {path}: cannot be read ({error})") from None
    if not rows:
        raise UsageError(f"--trace {path}: holds no requests")
    rows.sort(key=lambda row: row[0])
    holder: dict[int, int] = {}
    prefix, source = [], []
    for i, (_, inputs, _, ids) in enumerate(rows):
        shared = next((n for n, one in enumerate(ids) if one not in holder), len(ids))
        prefix.append(min(shared * _HASHED, inputs))
        source.append(holder[ids[shared - 1]] if shared else -1)
        holder.update(dict.fromkeys(ids, i))
    times = np.array([row[0] for row in rows])
    inputs, outputs = (np.maximum(1, np.array([row[k] for row in rows])) for k in (1, 2))
    zeros = np.zeros(len(rows), dtype=np.int64)
    return Requests(times - times[0], inputs, outputs, np.array(prefix), zeros, np.array(source))


def _hashed(path: Path, number: int, line: str) -> tuple[float, int, int, list[int]]:
    try:
        row = json.loads(line)
        ids = [int(one) for one in row["hash_ids"]]
        found = float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"])
        if min(found) < 0 or not np.isfinite(found[0]):
            raise ValueError("figures below 0")
    except (KeyError, TypeError, ValueError) as error:
        wanted = "timestamp, input_length, output_length and hash_ids"
        raise UsageError(
            f"--trace {path}: line {number}: {error}; a line must be a JSON object with {wanted}"
        ) from None
    return *found, ids


def _row(
    path: Path, line: int, row: list[str], places: Mapping[str, tuple[int, float] | None]
) -> list[float]:
    values = []
    for name, place in places.items():
        if place is None:
            values.append(0.0)
            continue
        index, factor = place
        try:
            values.append(_number(row[index], name) * factor)
        except (ValueError, IndexError):
            found = repr(row[index]) if index < len(row) else "nothing"
            raise UsageError(f"--trace {path}: line {line}: {name} is {found}") from None
    return values


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        if name != "time":
            raise
        # Python 3.10 reads no more than six digits of a second.
        date, _, rest = text.partition(".")
        day = datetime.fromisoformat(date).replace(tzinfo=timezone.utc)
        return day.timestamp() + float(f"0.{rest or 0}")
    if not np.isfinite(value) or value < 0:
        raise ValueError(text)
    return value
