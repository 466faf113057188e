"""What is told of a source that is stored small and read as a 16-bit model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dequantized:
    """What was stored small, for provenance."""

    format: str
    """FP8 in blocks of 128x128."""
    tensors: int
    """That were dequantized."""
    dtype: str
    """That they were dequantized to."""
    dropped: int
    """Scales of activations and KV caches that were left out."""
    stored_bytes: int
    """Of the files with the weights."""

    def __str__(self) -> str:
        left = f", {self.dropped} scales of activations left out" if self.dropped else ""
        return f"{self.format}, {self.tensors} tensors dequantized to {self.dtype}{left}"

    @classmethod
    def read(cls, data: Any) -> Dequantized | None:
        """Undo `asdict`; None for anything else, such as the pq.json of a plain source."""
        hints = {"format": str, "tensors": int, "dtype": str, "dropped": int, "stored_bytes": int}
        fits = isinstance(data, dict) and {k: type(v) for k, v in data.items()} == hints
        return cls(**data) if fits else None
