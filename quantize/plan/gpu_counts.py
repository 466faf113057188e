"""On which GPUs of the table a model can be served with so many sequences of so many tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantize.plan.gpus import GPUS, Gpu
from quantize.plan.memory import Fit, engine_for, fit
from quantize.plan.served import ServedModel

COUNTS = (1, 2, 4, 8)
"""GPUs of one server, as they are sold."""


@dataclass(frozen=True)
class Needed:
    """What a model takes whatever the GPU, in bytes."""

    weights: int
    """On one GPU."""
    kv: int
    """Of all sequences, in whole blocks of the cache where it is cut."""
    context: int
    sequences: int


@dataclass(frozen=True)
class Placed:
    """The fewest GPUs of one kind that hold it."""

    gpu: Gpu
    count: int | None
    """None: not on any of `COUNTS`."""
    found: Fit
    """With that many, or with the most."""


def needed(model: ServedModel, context: int, sequences: int) -> Needed:
    """Weights, and the cache of so many sequences of `context` tokens, on one GPU."""
    return Needed(model.weights(), round(sequences * model.kv_bytes(context)), context, sequences)


def placed(
    model: ServedModel,
    context: int,
    sequences: int,
    runs_on: Callable[[Gpu], bool] = lambda gpu: True,
) -> list[Placed]:
    """For each GPU of the table on which it runs the fewest of them on which all sequences fit at
    once in vLLM, in the order of the table."""
    out = []
    for gpu in GPUS:
        if not runs_on(gpu):
            continue
        engine = engine_for(gpu)
        counts = [n for n in COUNTS if model.refuses(n) is None]
        fits = {n: fit(model, gpu, n, engine, context) for n in counts}
        count = next(
            (n for n, f in fits.items() if f.memory.fits and f.sequences >= sequences), None
        )
        out.append(Placed(gpu, count, fits[counts[-1] if count is None else count]))
    return out
