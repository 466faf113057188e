"""A model as an engine serves it: bytes a GPU, bytes a token, work a token; sizes alone.

Where these come from a checkpoint, `checkpoint` reads them; here they are only added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

COMPUTE = ("bf16", "fp8", "int8", "fp4")
"""What matrices are multiplied in. Formats that pack weights alone multiply in bf16."""


@dataclass(frozen=True)
class WeightPart:
    """Weights that are sharded alike."""

    name: str
    bytes: int
    """Of all its tensors, before they are sharded."""
    units: int | None = None
    """Equal pieces that no shard cuts: heads, groups, rows of the vocabulary in their padding.
    A GPU holds ⌈units / tp⌉ of them. None: each GPU holds the whole."""
    experts: int = 0
    """Routed experts that lie in it; 0: a step reads all of it."""
    active: float = 0
    """Of these, how many one token visits."""
    looked_up: bool = False
    """Whether a step reads but a row a token: an embedding that is not also the head."""
    cut: str = "even"
    """What an engine does where tp does not divide `units`: it refuses (`even`), or pads the last
    shard (`pad`); `repeat`: it refuses too, but for tp that are multiples of them, when GPUs hold
    copies."""

    def refuses(self, tp: int) -> bool:
        """Whether engines do not shard it so."""
        if self.units is None or self.cut == "pad" or self.units % tp == 0:
            return False
        return not (self.cut == "repeat" and tp % self.units == 0)

    def shard(self, tp: int) -> int:
        """Bytes of one of `tp` GPUs: of the fullest."""
        if self.units is None:
            return self.bytes
        return math.ceil(self.bytes * math.ceil(self.units / tp) / self.units)

    def hit(self, tokens: int) -> float:
        """Share of it that a step of so many tokens reads. Of routed experts those that some token
        visits, with routers taken as uniform: E·(1 − (1 − k/E)ⁿ) of E."""
        if self.looked_up:
            return 0.0
        if not self.experts:
            return 1.0
        return float(1.0 - (1.0 - self.active / self.experts) ** tokens)


@dataclass(frozen=True)
class KvLayer:
    """What one layer of attention keeps of a sequence."""

    heads: int
    """Of keys and values; 1 for latent attention (MLA), of which every GPU keeps all."""
    head_bytes: float
    """Of a key and a value of one head and token, scales counted."""
    window: int | None = None
    """Tokens it looks back; None: all."""
    fixed_bytes: int = 0
    """Of a sequence, whatever its length: the state of linear attention, on one GPU of one."""

    def bytes_per_token(self, tp: int = 1) -> float:
        """On one GPU of `tp`: heads are spread, and repeated where there are fewer than GPUs."""
        return math.ceil(self.heads / tp) * self.head_bytes

    def bytes(self, context: float, tp: int = 1) -> float:
        """Of one sequence of `context` tokens, on one GPU."""
        kept = context if self.window is None else min(context, self.window)
        return kept * self.bytes_per_token(tp) + self.fixed_bytes / tp


@dataclass(frozen=True)
class ServedModel:
    """Sizes of one model in one format."""

    name: str
    parts: tuple[WeightPart, ...]
    layers: int
    hidden: int
    heads: int
    """Of queries."""
    kv_heads: int
    head_dim: int
    parameters_per_token: int
    """Weights that a token is multiplied by: of its experts only those it visits; no embedding,
    no head."""
    head_parameters: int
    """Weights of the head, which multiplies only the last token of a sequence."""
    compute: str
    """What most of its matrices are multiplied in: bf16, fp8 or fp4."""
    kv: tuple[KvLayer, ...]
    """One a layer that keeps something."""
    score_dim: int = 0
    """Channels of a query and its value together that one attended token costs, by head;
    0: 2·head_dim."""
    latent_dim: int = 0
    """The same while decoding, where latent attention (MLA) works on what it keeps; 0: as above."""
    ffn_width: int = 0
    """Channels between gate, up and down that one token makes: of its experts together."""
    max_context: int | None = None
    """Tokens that config.json allows for."""
    notes: tuple[str, ...] = ()
    """What of it is counted coarsely or not at all, a line each."""

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise ValueError(f"compute is one of {', '.join(COMPUTE)}, not {self.compute!r}")

    def refuses(self, tp: int) -> str | None:
        """Why engines do not run it on `tp` GPUs; None where they do."""
        for part in self.parts:
            if part.refuses(tp):
                return f"{part.name} come in {part.units:,}, which {tp} GPUs do not share evenly"
        return None

    def weights(self, tp: int = 1) -> int:
        """Bytes of its weights on one of `tp` GPUs."""
        return sum(part.shard(tp) for part in self.parts)

    def read_bytes(self, tp: int, tokens: int) -> float:
        """Bytes of weights that one GPU reads in a step of so many tokens."""
        return sum(part.shard(tp) * part.hit(tokens) for part in self.parts)

    @property
    def routed(self) -> bool:
        """Whether it has routed experts."""
        return any(part.experts for part in self.parts)

    @property
    def visits(self) -> float:
        """Routed experts that a token visits; 0 without any."""
        return max((part.active for part in self.parts), default=0)

    @cached_property
    def _kv_kinds(self) -> tuple[tuple[KvLayer, int], ...]:
        """Layers that keep alike, with how many there are."""
        counts: dict[KvLayer, int] = {}
        for layer in self.kv:
            counts[layer] = counts.get(layer, 0) + 1
        return tuple(counts.items())

    def kv_bytes(self, context: float, tp: int = 1) -> float:
        """Bytes that one sequence of `context` tokens keeps on one of `tp` GPUs."""
        return sum(n * layer.bytes(context, tp) for layer, n in self._kv_kinds)

    def kv_bytes_per_token(self, tp: int = 1) -> float:
        """Bytes that one more token takes on one GPU while no window is full."""
        return sum(n * layer.bytes_per_token(tp) for layer, n in self._kv_kinds)

    def attention_flops(self, context: float, decode: bool = False) -> float:
        """Operations of one token that attends to `context` tokens, in all layers, on all GPUs."""
        work = 0.0
        for layer, n in self._kv_kinds:
            seen = context if layer.window is None else min(context, layer.window)
            work += n * seen if layer.heads else 0.0
        dim = (self.latent_dim if decode else 0) or self.score_dim or 2 * self.head_dim
        return 2.0 * self.heads * dim * work


def dense(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    weight_bits: float = 16.0,
    kv_head_bytes: float | None = None,
    compute: str = "bf16",
    tied: bool = False,
) -> ServedModel:
    """A decoder of Llama's shape without a checkpoint, for tables and tests.

    weight_bits: of the blocks' linears, scales counted; embedding and head are of 16.
    kv_head_bytes: of a key and a value of one head and token; None: 16 bits each.
    """
    qkv = hidden * (heads + 2 * kv_heads) * head_dim
    rest = heads * head_dim * hidden + 3 * hidden * intermediate
    table = hidden * vocab
    size = weight_bits / 8
    parts = [
        WeightPart("q", round(layers * hidden * heads * head_dim * size), heads),
        WeightPart(
            "k, v", round(2 * layers * hidden * kv_heads * head_dim * size), kv_heads, cut="repeat"
        ),
        WeightPart("o, gate, up, down", round(layers * rest * size), intermediate),
        WeightPart("norms", 2 * (2 * layers + 1) * hidden),
        WeightPart("head", 2 * table, vocab, cut="pad"),
    ]
    if not tied:
        parts.append(WeightPart("embedding", 2 * table, vocab, looked_up=True, cut="pad"))
    layer = KvLayer(kv_heads, 4.0 * head_dim if kv_head_bytes is None else kv_head_bytes)
    return ServedModel(
        name=name,
        parts=tuple(parts),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        parameters_per_token=layers * (qkv + rest),
        head_parameters=table,
        compute=compute,
        kv=(layer,) * layers,
        ffn_width=intermediate,
    )
