"""Models that give their logits piece by piece: streamed by decoder block, or whole in memory."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantize.block.walk import Pass, Route, Streams, walk
from quantize.errors import ModelError, UnderivedError
from quantize.evaluation.model import Logits, Model, Span, Tick
from quantize.evaluation.whole import WholeModel
from quantize.model.attention_cache import CacheNumerics
from quantize.model.dequantized import open_source
from quantize.model.linear import Numerics
from quantize.model.load import (
    KV_TENSORS,
    PACKED_SUFFIXES,
    attention_numerics,
    load_block,
    load_model,
    packed_linear,
    packed_schemes,
    require_layers,
    require_readable,
    rotated_inputs,
    routing,
    shape_of,
    tensors_of,
)
from quantize.model.load_others import load_others, of_others
from quantize.model.moe import MoeFfn
from quantize.model.positions import require_positions
from quantize.model.shell import Tail
from quantize.model.skeleton import Skeleton
from quantize.model.stored import open_stored
from quantize.model.tied import settle_tie

if TYPE_CHECKING:
    from quantize.evaluation.parents import HiddenStates
    from quantize.parallel.ranks import Ranks

log = logging.getLogger(__name__)

_ONLY = "hidden"
"""The one stream of an evaluation."""

_BATCH_TOKENS = 4096
"""Tokens per forward pass. More would take more memory; far fewer would leave the products of a
layer small. Figures depend on it in their last bits alone, through the shapes of products."""


def open_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
    attention: CacheNumerics | None = None,
) -> Model:
    """A checkpoint ready to be evaluated: streamed where the architecture is known, and what
    others quantized is read by pq; else whole in memory, as transformers loads it.

    attention: how to attend where the checkpoint does not say, None: in full precision.
    """
    source = open_source(folder)
    others, refused = attention is None and of_others(source), ""
    try:
        return StreamedModel(folder, device, dtype, numerics, attention)
    except UnderivedError:
        if source.config.get("quantization_config") or attention is not None:
            raise
    except ModelError as err:
        if not others:
            raise
        refused = str(err)
    if not others:
        return WholeModel(folder, load_model(folder, device, dtype), device)
    try:
        return WholeModel(folder, load_others(folder, device, dtype), device)
    except ModelError as err:
        raise ModelError(f"{refused}; {err}" if refused else str(err)) from None


def windows_of_a_pass(tokens: int) -> int:
    """How many windows of so many tokens a streamed model reads in one forward pass."""
    return max(1, _BATCH_TOKENS // tokens)


class StreamedModel:
    """Runs a checkpoint one decoder block at a time: memory holds one block, the
    hidden states and the head."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        numerics: Numerics,
        attention: CacheNumerics | None = None,
    ) -> None:
        on_disk = open_source(folder)
        require_readable(on_disk)
        self.device = device
        self.dtype = dtype
        self.numerics = numerics
        self.shape = shape_of(on_disk)
        require_layers(on_disk, self.shape)
        self.source, model = open_stored(on_disk, dtype)
        self.skeleton = Skeleton(folder, device, dtype, routing(self.source), model)
        self.linears = self.skeleton.linears()
        rotated_inputs(self.source, self.linears)
        head = self.skeleton.parts.head
        self.linears[head] = (self.shape.vocab, self.shape.hidden)
        self.schemes = packed_schemes(self.source, list(self.linears))
        self._check()
        self.arch = self.skeleton.arch
        self.shape = settle_tie(self.source, self.arch, self.shape)
        for note in self.source.notes:
            log.warning("%s", note)
        self.attention = attention_numerics(self.source) or attention
        self.kv_cache = (
            "16-bit" if self.attention is None else self.attention.label(self.shape.head_dim)
        )
        self.units = self.shape.n_blocks
        self._visits: dict[int, tuple[int, int]] = {}  # block: visits, tokens
        self.kept: HiddenStates | None = None
        """Where hidden states are looked up and kept; None: nowhere."""
        self._logits = self._tail()

    def _check(self) -> None:
        """Refuse what does not fit before any block is run; block by
        block, a fault would show late."""
        for name, scheme in self.schemes.items():
            for suffix in scheme.suffixes:
                if f"{name}.{suffix}" not in self.source:
                    raise ModelError(
                        f"{self.source.folder}: tensor {name}.{suffix} is missing from the "
                        "checkpoint"
                    )
        try:
            self.skeleton.check(self._sizes(), self.shape.tied)
        except ModelError as err:
            raise ModelError(f"{self.source.folder}: {err}") from None

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors as they would be without packing."""
        sizes = {
            n: s
            for n, s in self.source.shapes.items()
            if not n.endswith((*PACKED_SUFFIXES, *KV_TENSORS))
        }
        return sizes | {f"{name}.weight": self.linears[name] for name in self.schemes}

    def _tail(self) -> Tail:
        """What turns the hidden states behind the last block into logits."""
        head, after = self.arch.head, self.arch.after
        if head in self.schemes:
            packed = packed_linear(
                self.source, head, self.schemes[head], self.device, self.dtype, self.numerics
            )
            others = tensors_of(self.source, [name for name in after if name != head])
            return self.skeleton.tail(others, packed)
        outside = tensors_of(self.source, after)
        if f"{head}.weight" not in outside:
            outside |= tensors_of(self.source, [self.arch.embedding])
        return self.skeleton.tail(outside)

    def require_positions(self, length: int) -> None:
        """UsageError where the model cannot read so many tokens at once."""
        require_positions(self.skeleton.model, length)

    def hidden_bytes(self, tokens: int) -> int:
        """Bytes of hidden states of so many tokens."""
        return tokens * self.skeleton.stream.width * self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float | None:
        """Mean stored bits of quantized weights, scales counted; None without any."""
        sizes = {name: math.prod(self.linears[name]) for name in self.schemes}
        total = sum(
            s.stored_bits(*self.linears[name]) * sizes[name] for name, s in self.schemes.items()
        )
        return total / sum(sizes.values()) if sizes else None

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """Bits that inputs of linears are rounded to, smallest first; 16 for none."""
        inside = {name for name in self.linears if name.startswith(f"{self.arch.blocks}.")}
        fp8 = {name for name, scheme in self.schemes.items() if scheme.fp8_activations}
        return tuple(sorted({8 if name in fp8 else 16 for name in inside}))

    @property
    def kv_bits(self) -> float:
        """Stored bits of a cached key or value, scales counted."""
        if self.attention is None:
            return 16.0
        return self.attention.bits_per_value(self.shape.head_dim)

    @property
    def experts_visited(self) -> Mapping[str, float]:
        """Block with experts → mean number of routed ones that a token visited in what was read."""
        return {
            str(index): visits / tokens for index, (visits, tokens) in sorted(self._visits.items())
        }

    @property
    def activated_parameters(self) -> float:
        """Parameters that a token is multiplied with, on average over what was read; the
        embedding table's are not."""
        return self._met({name: math.prod(size) for name, size in self._sizes().items()})

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the stored weights that a token is multiplied with, on average over what was
        read."""
        return self._met({name: self.source.bytes_of(name) for name in self.source.shapes})

    def _met(self, sizes: Mapping[str, float]) -> float:
        """Sum over the tensors that a token meets. sizes: full name → what counts of each; a head
        that shares the embedding's weight counts, the embedding itself does not."""
        table = f"{self.arch.embedding}."
        total = sum(
            size
            for name, size in sizes.items()
            if not name.startswith(table) and not self.arch.is_beside(name)
        )
        if self.shape.tied:
            total += sum(size for name, size in sizes.items() if name.startswith(table))
        for block, visited in self.experts_visited.items():
            experts = self.skeleton.block_arch(int(block)).experts
            assert experts is not None
            inside = f"{self.arch.blocks}.{block}.{experts.routed}."
            routed = sum(size for name, size in sizes.items() if name.startswith(inside))
            n = len(self.skeleton.model.get_submodule(inside.removesuffix(".")))
            total -= routed * (1 - visited / n)
        return float(total)

    def read(self, inputs: Tensor, tick: Tick) -> Logits:
        """Run all blocks over inputs [B, T] int64; the head is applied
        when logits are asked for."""
        batch = windows_of_a_pass(inputs.shape[1])
        hidden = self._kept_hidden(inputs, batch, tick)

        @torch.no_grad()
        def logits(spans: Sequence[Span]) -> Iterator[Tensor]:
            for window, first, end in spans:
                states = hidden[window // batch][window % batch]
                yield self._logits(states[None, first:end])[0]

        return logits

    def _kept_hidden(self, inputs: Tensor, batch: int, tick: Tick) -> MutableSequence[Tensor]:
        """`_hidden`, from what is kept where there is something."""
        if self.kept is None:
            return self._hidden(inputs, batch, tick)
        before, found = self._visits, self.kept.recall(inputs)
        self._visits = {}
        if found is None:
            hidden = self._hidden(inputs, batch, tick)
            self.kept.keep(inputs, hidden, self._visits)
        else:
            hidden, self._visits = found
            for _ in range(self.units):
                tick()
        for index, (visits, tokens) in before.items():
            more = self._visits.get(index, (0, 0))
            self._visits[index] = visits + more[0], tokens + more[1]
        return hidden

    def _hidden(self, inputs: Tensor, batch: int, tick: Tick) -> MutableSequence[Tensor]:
        """inputs [B, T] → hidden states [B, T, D] that leave the last
        block, `batch` windows each."""
        outside = tensors_of(self.source, self.arch.before)
        embedded = [self.skeleton.embed(outside, part) for part in torch.split(inputs, batch)]
        del outside
        # What overflows is what is measured: no window is left out.
        streams = Streams({_ONLY: embedded}, drops=False)
        del embedded

        def visit(opened: tuple[int, nn.Module]) -> Mapping[str, Route[str]]:
            index, layer = opened
            self._count_visits(index, layer)
            return {_ONLY: (_ONLY, partial(Pass(self.skeleton, index), layer))}

        walk(streams, range(self.shape.n_blocks), self._open, visit, leave=lambda opened: tick())
        return streams.batches[_ONLY]

    def _open(self, index: int) -> tuple[int, nn.Module]:
        return index, load_block(
            self.source, self.skeleton, self.schemes, index, self.numerics, self.attention
        )

    def _count_visits(self, index: int, layer: nn.Module) -> None:
        """Let a block that is about to run count who visits its experts."""
        for ffn in (module for module in layer.modules() if isinstance(module, MoeFfn)):

            def count(
                router: nn.Module, args: tuple[Tensor, ...], scores: Tensor, ffn: MoeFfn = ffn
            ) -> None:
                visits, tokens = self._visits.get(index, (0, 0))
                self._visits[index] = (
                    visits + int(ffn.policy.select(scores).sum()),
                    tokens + len(scores),
                )

            ffn.gate.register_forward_hook(count)

    def count_together(self, ranks: Ranks) -> None:
        """Add up who visited the experts on all ranks."""
        found = ranks.gather([[index, *counts] for index, counts in self._visits.items()])
        self._visits = {}
        for index, visits, tokens in itertools.chain.from_iterable(found):
            before = self._visits.get(index, (0, 0))
            self._visits[index] = before[0] + visits, before[1] + tokens
