"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(text: str) -> int:
    """`6GB` or `6G` (10⁹), `6GiB` (2³⁰), `900MB`, or a number of bytes;
    ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write 6GB, 5.5GiB or 900MB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def gigabytes(size: float) -> str:
    """Two digits behind the point, rounded up: what is needed must not be shown as less."""
    return f"{-(-int(size) // 10**7) / 100:.2f}GB"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
