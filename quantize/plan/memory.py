"""What fits a GPU beside a model's weights: an engine's own memory, tokens of the KV cache, sequences.

The budget is vLLM's: a share of all memory, of which weights, the peak of a trial run, captured
graphs and what CUDA and NCCL take are subtracted; the rest is cut into blocks (vLLM 0.32,
v1/worker/gpu_worker.py and v1/core/kv_cache_utils.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from quantize.plan.gpus import Gpu
from quantize.plan.served import ServedModel

GIB = 2**30
_LOGIT = 18
"""Bytes a logit that the trial of the sampler takes: 16 bits, 32 bits, a sorted copy and its places."""
_GRAPHS = int(0.9 * GIB)
"""Captured graphs. Start-up messages of vLLM 0.2x in public reports name 0.2 to 1.3 GiB."""
_CUDA = int(0.5 * GIB)
"""Of CUDA's context and libraries: 0.1 to 0.5 GiB in such messages."""
_NCCL = int(1.2 * GIB)
"""Beside it with several GPUs: 1.2 more in them."""


@dataclass(frozen=True)
class Engine:
    """Settings of vLLM that memory depends on; `engine_for` has its defaults."""

    utilization: float = 0.92
    """--gpu-memory-utilization, of all memory of a GPU."""
    batched_tokens: int = 8192
    """--max-num-batched-tokens."""
    max_sequences: int = 1024
    """--max-num-seqs."""
    block: int = 16
    """Tokens of a block of the KV cache."""
    steps_in_flight: int = 2
    """Batches that are scheduled and not yet answered: two, as it schedules while a step runs."""


def engine_for(gpu: Gpu) -> Engine:
    """What `vllm serve` takes on a GPU where nothing is said (vLLM 0.32, engine/arg_utils.py)."""
    if gpu.memory_gib >= 160:
        return Engine(batched_tokens=16384)
    if gpu.memory_gib >= 70 and not gpu.name.startswith("a100"):
        return Engine(batched_tokens=8192)
    return Engine(batched_tokens=2048, max_sequences=256)


@dataclass(frozen=True)
class Memory:
    """How one GPU's memory is spent, in bytes."""

    total: int
    budget: int
    """What the engine takes of it."""
    weights: int
    activations: int
    """At the peak of its trial run, the sampler's logits among them."""
    overhead: int
    """Graphs, CUDA, NCCL."""
    kv: int
    """What is left for the cache; below 0 where the weights do not fit."""

    @property
    def fits(self) -> bool:
        """Whether weights and engine leave anything."""
        return self.kv > 0


def memory_of(model: ServedModel, gpu: Gpu, tp: int, engine: Engine) -> Memory:
    """How one of `tp` GPUs would be spent."""
    budget = int(gpu.memory_bytes * engine.utilization)
    weights, activations = model.weights(tp), activation_bytes(model, tp, engine)
    overhead = _GRAPHS + _CUDA + (_NCCL if tp > 1 else 0)
    kv = budget - weights - activations - overhead
    return Memory(gpu.memory_bytes, budget, weights, activations, overhead, kv)


def activation_bytes(model: ServedModel, tp: int, engine: Engine) -> int:
    """Peak of a trial step of all batched tokens, and of the sampler with all sequences.

    Of a layer: the residual stream, its norm, gate and up and their product, in 16 bits; of routed
    experts the same for each that a token visits.
    """
    width = 2 * model.hidden + 3 * model.ffn_width / tp
    if model.routed:
        width += model.visits * model.hidden
    vocab = model.head_parameters // max(1, model.hidden)
    return int(2 * engine.batched_tokens * width + _LOGIT * engine.max_sequences * vocab)


@dataclass(frozen=True)
class Blocks:
    """The KV cache of one GPU as vLLM cuts it."""

    count: int
    """Blocks there are, of all groups."""
    block: int
    groups: tuple[tuple[int | None, int], ...]
    """Window of the layers of a group (None: all tokens), and how many such groups there are. Each
    takes blocks of its own for a sequence."""
    fixed: float = 0.0
    """Blocks that a sequence takes whatever its length."""

    def of(self, context: int, in_flight: int = 0) -> float:
        """Blocks of one sequence. in_flight: tokens whose blocks a window keeps until they are
        answered."""
        total = self.fixed
        for window, groups in self.groups:
            blocks = math.ceil(context / self.block)
            if window is not None and window < context:
                kept = min(window - 1 + in_flight, context)
                blocks = min(blocks, math.ceil(kept / self.block) + 1)
            total += groups * blocks
        return total

    def sequences(self, context: int) -> int:
        """How many of so many tokens fit at once."""
        return int(self.count / self.of(context)) if self.count > 0 else 0

    def tokens(self, context: int) -> int:
        """Tokens that fit, in sequences of so many."""
        return int(self.count / self.of(context) * context) if self.count > 0 else 0

    def startup_tokens(self, max_len: int, in_flight: int) -> int:
        """The figure that vLLM prints when it starts (`GPU KV cache size`)."""
        # A window's blocks are counted with one to spare even where it holds the whole length.
        total = self.fixed
        for window, groups in self.groups:
            blocks = math.ceil(max_len / self.block)
            if window is not None:
                kept = min(window - 1 + in_flight, max_len)
                blocks = math.ceil(kept / self.block) + 1
            total += groups * blocks
        return int(self.count / total * max_len)


def blocks_of(model: ServedModel, tp: int, available: int, block: int = 16) -> Blocks:
    """Cut `available` bytes of one GPU into blocks.

    Layers that keep alike stand in groups of the same number of layers, each with blocks of its
    own, since all blocks are of one size: as many layers as the smaller kind has, or as the larger
    where that is less than half as many again.
    """
    kinds = Counter((layer.window, layer.bytes_per_token(tp)) for layer in model.kv if layer.heads)
    states = sum(layer.fixed_bytes / tp for layer in model.kv)
    if not kinds:
        return Blocks(0, block, ())
    counts = Counter[int | None]()
    widths: dict[int | None, float] = {}
    for (window, width), n in kinds.items():
        counts[window] += n
        widths[window] = widths.get(window, 0.0) + n * width
    least, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * least else least
    # Layers of different widths are counted by their bytes, as groups are packed by these.
    page = max(widths[w] / counts[w] for w in counts) * block
    groups = tuple((window, math.ceil(n / size)) for window, n in counts.items())
    per_block = page * size if len(counts) > 1 else sum(widths.values()) * block
    return Blocks(int(max(0, available) // per_block), block, groups, states / per_block)


@dataclass(frozen=True)
class Fit:
    """What fits one engine of `tp` GPUs."""

    memory: Memory
    blocks: Blocks
    context: int

    @property
    def kv_tokens(self) -> int:
        """Tokens of sequences of `context` that fit."""
        return self.blocks.tokens(self.context)

    @property
    def sequences(self) -> int:
        """Sequences of `context` tokens that fit."""
        return self.blocks.sequences(self.context)


def fit(model: ServedModel, gpu: Gpu, tp: int, engine: Engine, context: int) -> Fit:
    """What fits beside the weights for sequences of `context` tokens."""
    memory = memory_of(model, gpu, tp, engine)
    return Fit(memory, blocks_of(model, tp, memory.kv, engine.block), context)


def short_of(model: ServedModel, found: Fit, tp: int, sequences: int = 1) -> int:
    """Bytes that a GPU lacks for so many sequences; 0 or less where they fit."""
    needed = sequences * model.kv_bytes(found.context, tp)
    return math.ceil(needed - found.memory.kv)
