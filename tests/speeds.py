"""Small sizes for tests of benchmarks, made-up figures, and kernels that are wrong in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from quantize.bench.speed import llama, run, stand
from quantize.bench.speed.attention import Heads
from quantize.bench.speed.rows import Row, Spread
from quantize.bench.speed.stand import Stand

HEADS = Heads(4, 2, 64)
SIZES = llama.Sizes(128, 256, 100, HEADS)
MEASURES: dict[str, Callable[[Stand], Iterator[Row]]] = {
    "kernels": partial(run.kernels, shapes=[(256, 128)], batches=(1, 3), ffn_rows=(5,)),
    "decode": partial(run.decode, contexts=(20,), batches=(1, 2), layers=2, model_contexts=(9,)),
    "prefill": partial(run.prefill, lengths=(70,), ffns=[(256, 128)], ffn_rows=(7,)),
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, ceilings and operands that a test has the time for."""
    monkeypatch.setattr(llama, "LLAMA_3_8B", SIZES)
    monkeypatch.setattr(stand, "_COPIED_ELSEWHERE", 1 << 16)
    monkeypatch.setattr(stand, "_SQUARE_ELSEWHERE", 64)
    monkeypatch.setattr(stand.Stand.__init__, "__defaults__", (20, 0))


def wrong(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def made(*arguments: Any, **options: Any) -> Any:
        y = function(*arguments, **options)
        y[(-1,) * y.ndim] += factor * y.abs().max()
        return y

    return made


def figure(what: str, M: int, size: int, ratio: float, bandwidth: float = 0.5) -> Row:
    spread = Spread(1.0, 1.0, 1.0)
    return Row(
        what,
        "",
        M,
        size,
        spread,
        1,
        1,
        "fp8",
        bandwidth,
        None,
        {"bf16": Spread(ratio, ratio, ratio)},
    )
