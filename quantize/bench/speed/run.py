"""The three benchmarks with the sizes that they measure unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from quantize.bench.speed import attention, linears, llama
from quantize.bench.speed.linears import Shape
from quantize.bench.speed.rows import Row
from quantize.bench.speed.stand import Stand

LLAMA_2_7B_FFN: Shape = (11008, 4096)
LLAMA_3_8B_FFN: Shape = (14336, 4096)
FFNS = (LLAMA_2_7B_FFN, LLAMA_3_8B_FFN)
"""Shapes [intermediate, hidden]."""
SHAPES: tuple[Shape, ...] = (
    (1024, 4096),
    (4096, 4096),
    (6144, 4096),
    *FFNS,
    (4096, 11008),
    (4096, 14336),
)
"""[N, K] of both models' linears: k and v; q and o; q, k and v together; gate and up; down."""
BATCHES = (1, 4, 16, 2048)
"""Rows of products: a token of one sequence, of a few, of many, and a prompt."""
FFN_ROWS = 16 * 1024
"""Rows of FFNs in one more batch: 16 prompts of 1024 tokens."""
CONTEXTS = (1024, 8192, 32768)
"""Cached tokens of a sequence: from where weights dominate a step to where the cache does."""
MODEL_CONTEXTS = (1024, 8192)
"""Cached tokens in steps of a whole block: 8192 is the context of Llama-3-8B."""
SEQUENCES = (1, 16)
"""Sequences decoded together."""
PREFILLED = (1024, 4096, 8192)
"""Tokens of a prompt."""


def kernels(
    stand: Stand,
    shapes: Sequence[Shape] = (),
    batches: Sequence[int] = BATCHES,
    ffn_rows: Sequence[int] = (FFN_ROWS,),
) -> Iterator[Row]:
    """Products of all kinds, gated fronts (of the given shapes, else of both models'
    FFNs), and rounding to E4M3."""
    yield from linears.time_linears(stand, shapes or SHAPES, batches)
    yield from linears.time_gated(stand, shapes or FFNS, (*batches, *ffn_rows))
    yield from linears.time_rounding(stand, sorted({K for _, K in shapes or SHAPES}), batches)


def decode(
    stand: Stand,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = SEQUENCES,
    layers: int = 32,
    model_contexts: Sequence[int] = MODEL_CONTEXTS,
) -> Iterator[Row]:
    """Attention of Llama-3-8B's heads to the INT4 cache, and, unless `layers` is 0, steps
    of so many of its blocks."""
    sizes = llama.LLAMA_3_8B
    yield from attention.time_decode(stand, contexts, batches, sizes.heads)
    if layers:
        yield from llama.time_model(stand, sizes, layers, model_contexts, batches)


def prefill(
    stand: Stand,
    lengths: Sequence[int] = PREFILLED,
    ffns: Sequence[Shape] = FFNS,
    ffn_rows: Sequence[int] = (FFN_ROWS,),
) -> Iterator[Row]:
    """Attention of Llama-3-8B's heads to new keys and values, and whole FFNs."""
    yield from attention.time_prefill(stand, lengths, llama.LLAMA_3_8B.heads)
    yield from linears.time_ffn(stand, ffns, ffn_rows)


SECTIONS: dict[str, Callable[[Stand], Iterator[Row]]] = {
    "kernels": kernels,
    "decode": decode,
    "prefill": prefill,
}
