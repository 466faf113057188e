"""What the kernels should reach on an H200, and whether they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from quantize.bench.speed.rows import Row

PEER = "bf16"
"""The peer that targets speak of; on machines where it was not timed there are none."""


@dataclass(frozen=True)
class Target:
    """A figure that is wanted, and the lowest that was found."""

    name: str
    wanted: float
    found: float
    met: bool


@dataclass(frozen=True)
class _Rule:
    name: str
    wanted: float
    section: str
    chosen: Callable[[Row], bool]
    value: Callable[[Row], float]
    largest: bool = False  # only rows of the largest size among the chosen


def _ratio(row: Row) -> float:
    return row.ratios[PEER]


_RULES = (
    _Rule(
        "decode linears (M ≤ 16), × bf16",
        2.0,
        "kernels",
        lambda r: r.what == "folded" and r.M <= 16,
        _ratio,
    ),
    _Rule(
        "decode linears, largest shapes, × bf16",
        3.0,
        "kernels",
        lambda r: r.what == "folded" and r.M <= 16,
        _ratio,
        largest=True,
    ),
    _Rule(
        "decode linears, largest shapes, of the copy's bandwidth",
        0.75,
        "kernels",
        lambda r: r.what == "folded" and r.M <= 16,
        lambda r: r.bandwidth,
        largest=True,
    ),
    _Rule(
        "prefill linears (M ≥ 2048), × bf16",
        1.4,
        "kernels",
        lambda r: r.what == "folded" and r.M >= 2048,
        _ratio,
    ),
    _Rule(
        "FFN (M = 16 · 1024), × bf16",
        1.24,
        "prefill",
        lambda r: r.what == "FFN" and r.M == 16 * 1024,
        _ratio,
    ),
    _Rule(
        "prefill attention, × SDPA",
        1.0,
        "prefill",
        lambda r: r.what.startswith("attention"),
        _ratio,
    ),
    _Rule(
        "decode attention (32K), × SDPA",
        2.5,
        "decode",
        lambda r: r.what == "attention" and r.size == 32 * 1024,
        _ratio,
    ),
    _Rule("end-to-end decode, × bf16", 2.5, "decode", lambda r: r.what == "model", _ratio),
)


def targets(sections: Mapping[str, Iterable[Row]]) -> list[Target]:
    """Each target that some row speaks of, with the lowest figure of those rows."""
    out = []
    for rule in _RULES:
        rows = [
            row for row in sections.get(rule.section, ()) if PEER in row.peers and rule.chosen(row)
        ]
        if rule.largest:
            rows = [row for row in rows if row.size == max(other.size for other in rows)]
        if rows:
            found = min(map(rule.value, rows))
            out.append(Target(rule.name, rule.wanted, found, found >= rule.wanted))
    return out
