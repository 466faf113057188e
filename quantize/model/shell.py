"""What a model does outside its layers: from tokens to the first, from the last to logits.

It is the model's own forward (`transformers_decoder`), run on copies that hold no layers and only
the tensors that are needed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UnderivedError
from quantize.model.derive import Outer
from quantize.model.edges import norm_offset
from quantize.model.flow import is_norm
from quantize.model.shell_fill import NoHead, filled, note_used
from quantize.model.stream import Stream, StreamCall
from quantize.model.stream_find import (
    LARGE,
    SMALL,
    Entry,
    depends,
    find_stream,
    is_plain,
    require_independent,
)
from quantize.model.transformers_decoder import (
    Recorder,
    enter,
    leave,
    parts_of,
    plain_tokens,
    renew_buffers,
    returns_tuple,
    say_device,
    text_config,
    use_attention,
    without_layers,
)

Tail = Callable[[Tensor], Tensor]
"""The stream [B, T, W] behind the last layer → logits [B, T, V]."""


@dataclass(frozen=True)
class Found:
    """What running a model without its layers has shown."""

    outer: Outer
    returns_tuple: tuple[bool, ...]
    """Whether each layer returns its states first of a tuple."""
    stream: Stream
    """What goes from layer to layer."""


class Shell:
    """A model without its layers.

    model: on the meta device; it stays as it is. known: what another shell of the same config found.
    """

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, known: Found | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        parts = parts_of(model)
        self._layers = list(model.get_submodule(parts.blocks))
        self._model = without_layers(model, parts.blocks)
        renew_buffers(self._model, model, device)
        self._kind = type(model).__name__
        self._holders = self._bare_holders(parts.blocks)
        self._tokens = plain_tokens(model)
        self._blocks, self._embedding, self._head = parts.blocks, parts.embedding, parts.head
        if known is not None:
            self.outer, self._tuples = known.outer, list(known.returns_tuple)
            self.stream = known.stream
            return
        self._tuples = [returns_tuple(layer) for layer in self._layers]
        before, self.stream = self._find_before()
        self.outer = self._outer(model.config.model_type, before, self._find_after())

    def _bare_holders(self, blocks: str) -> frozenset[str]:
        """What holds the layers and has parameters of its own: whether these act before or behind the
        layers is not seen by which modules are called."""
        holders = {"", *(blocks[:at] for at, sign in enumerate(blocks) if sign == ".")}
        parameters = {name: self._model.get_submodule(name)._parameters for name in holders}
        return frozenset(
            n for n, own in parameters.items() if any(p is not None for p in own.values())
        )

    def _require_idle(self, same: bool) -> None:
        """UnderivedError unless text does what it did, the holders' own parameters being NaN: those
        that join pieces of an image do nothing (LLaVA-NeXT), others do (ZAYA)."""
        if same:
            return
        holder = min(self._holders)
        own = self._model.get_submodule(holder)._parameters
        name = next(name for name, held in own.items() if held is not None)
        raise UnderivedError(
            f"{self._kind}: {holder}.{name} stands beside the layers in no module of its own, and pq "
            "does not know where it acts"
        )

    @property
    def found(self) -> Found:
        """What can be given to another shell of the same config."""
        return Found(self.outer, tuple(self._tuples), self.stream)

    def calls(self, batch: int, length: int, attention: str | None = None) -> list[StreamCall]:
        """How every layer is called on streams [batch, length, W].

        attention: name of another implementation than the model's own.
        """
        shell = self._filled()
        if attention is not None:
            use_attention(shell, attention)
        tokens = torch.full((batch, length), self._tokens[0], device=self.device)
        calls = self._enter(shell, tokens).calls
        return [StreamCall(call, self.stream, index) for index, call in enumerate(calls)]

    def embed(self, outside: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """tokens [B, T] → the stream [B, T, W] that enters the first layer.

        outside: full name → tensor of at least the modules `outer.before`.
        """
        shell = copy.deepcopy(self._model)
        tokens = tokens.to(self.device)
        given = {n: t for n, t in outside.items() if _owner(n) in self.outer.before}
        vocabulary = shell.get_submodule(self._embedding).num_embeddings
        for name in self.outer.before:
            table = shell.get_submodule(name)
            if isinstance(table, nn.Embedding) and (
                name == self._embedding or table.num_embeddings >= vocabulary
            ):
                self._place_rows(table, given.pop(f"{name}.weight"), tokens)
        _place(shell, given, self.device, self.dtype)
        found = self._enter(shell, tokens)
        return self.stream.entering(found.states, found.calls)

    def _place_rows(self, table: nn.Embedding, weight: Tensor, tokens: Tensor) -> None:
        """Give a table the rows of these tokens alone, unless it is asked for others: a whole one in
        another dtype may take gigabytes."""
        asked, places = torch.unique(tokens, return_inverse=True)

        def put(rows: Tensor) -> None:
            moved = rows.to(self.device, self.dtype)
            table._parameters["weight"] = nn.Parameter(moved, requires_grad=False)

        def narrow(module: nn.Module, args: Any) -> Any:
            if not torch.equal(args[0], tokens):
                put(weight)
                return None
            put(weight[asked.to(weight.device)])
            table.padding_idx = None
            return (places,)

        put(weight[asked.to(weight.device)])  # models look at its device and dtype
        table.register_forward_pre_hook(narrow)

    def tail(self, outside: Mapping[str, Tensor], head: nn.Module | None = None) -> Tail:
        """What the model does behind its last layer.

        outside: full name → tensor of at least the modules `outer.after`; head: stands in for the
        model's own, whose weight is then not needed. A head without a weight has the embedding's.
        """
        shell = self._filled()
        given = {n: t for n, t in outside.items() if _owner(n) in self.outer.after}
        if head is not None:
            shell.set_submodule(self._head, head)
            given = {n: t for n, t in given.items() if _owner(n) != self._head}
        elif f"{self._head}.weight" not in given:
            given[f"{self._head}.weight"] = outside[f"{self._embedding}.weight"]
        _place(shell, given, self.device, self.dtype)
        say_device(shell, self.device, self.dtype)

        def logits(stream: Tensor) -> Tensor:
            states = self.stream.states.unpack(stream)
            shape = (stream.shape[0], stream.shape[1])
            return leave(shell, self._layers, self._tuples, self._blocks, states, shape)

        return logits

    def _enter(self, shell: Any, tokens: Tensor, draw: torch.Generator | None = None) -> Entry:
        last = len(self._layers) - 1
        recorders = [
            Recorder(layer, several, index == last, draw)
            for index, (layer, several) in enumerate(zip(self._layers, self._tuples, strict=True))
        ]
        shell.set_submodule(self._blocks, nn.ModuleList(recorders))
        say_device(shell, self.device, self.dtype)
        states = enter(shell, recorders, tokens)
        return Entry(states, [recorder.call for recorder in recorders])

    def _filled(self, seed: int = 0, spoiled: Collection[str] = ()) -> Any:
        """A copy whose modules get tensors of random values when they are called first; those of
        `spoiled` modules are NaN."""
        return filled(copy.deepcopy(self._model), self.device, self.dtype, seed, spoiled)

    def _enter_noting(
        self,
        used: list[str],
        seed: int,
        size: tuple[int, int] = SMALL,
        draw: torch.Generator | None = None,
        spoiled: Collection[str] = (),
    ) -> Entry:
        """So many windows and tokens up to the first layer; modules with parameters that run go into
        `used`. draw: of what layers return; None: what they are given. spoiled: as `_filled`."""
        shell = self._filled(seed, spoiled)
        note_used(shell, used, self._holders)
        draw = torch.Generator().manual_seed(seed)
        places = torch.randint(len(self._tokens), size, generator=draw)
        tokens = torch.tensor(self._tokens)[places].to(self.device)
        return self._enter(shell, tokens, draw)

    def _find_before(self) -> tuple[tuple[str, ...], Stream]:
        """(modules with tensors that run before the first layer, what goes from layer to layer).

        Also finds how layers return their states where they do not say.
        """
        used: list[str] = []
        one = self._first_entry(used)
        require_independent(
            self._kind, one, self._enter_noting(used, 0, draw=torch.Generator().manual_seed(2))
        )
        if self._holders:
            idle = self._enter_noting(used, 0, spoiled=self._holders)
            self._require_idle(torch.equal(one.states, idle.states) and not any(depends(one, idle)))
        other = self._enter_noting(used, 1)
        if is_plain(one, other):
            return tuple(used), Stream.plain(one.states.shape[-1])
        large = self._enter_noting(used, 0, LARGE)
        return tuple(used), find_stream(self._kind, self._layers, one, other, large)

    def _first_entry(self, used: list[str]) -> Entry:
        """One pass with every kind of layer returning its states as it says, else in any other way
        that the model can take: what a layer says of its forward is not always what it does."""
        kinds = list(dict.fromkeys(map(type, self._layers)))
        said, failures = self._tuples, list[Exception]()
        others = itertools.product((False, True), repeat=min(len(kinds), _KINDS))
        for flips in ((False,) * len(kinds), (True,) * len(kinds), *others):
            flipped = {kind for kind, flip in zip(kinds, flips, strict=False) if flip}
            pairs = zip(self._layers, said, strict=True)
            self._tuples = [several ^ (type(layer) in flipped) for layer, several in pairs]
            try:
                return self._enter_noting(used, 0)
            except (UnderivedError, RuntimeError, AttributeError, TypeError, IndexError) as error:
                failures.append(error)
        # Rather what pq says of a model than what a model says of a tuple in the place of a tensor.
        raise min(failures, key=lambda error: not isinstance(error, UnderivedError))

    def _find_after(self) -> tuple[str, ...]:
        """Modules with tensors that run behind the last layer, the head last."""
        shell = self._filled()
        shell.set_submodule(self._head, NoHead(self.dtype))
        used: list[str] = []
        stream = torch.zeros(1, 2, self.stream.width, device=self.device, dtype=self.dtype)
        states = self.stream.states.unpack(stream)

        note_used(shell, used, self._holders)
        say_device(shell, self.device, self.dtype)
        places = (self._layers, self._tuples, self._blocks, states, (1, 2))
        # What ran before the first layer is forgotten.
        alike = leave(shell, *places, used.clear)
        after = (*used, self._head)
        if tuple(alike.shape[:-1]) != (1, 2):
            raise UnderivedError(
                f"{self._kind}: what it puts out is no logits for every token; pq takes language models"
            )
        if self._holders:
            spoiled = self._filled(spoiled=self._holders)
            say_device(spoiled, self.device, self.dtype)
            spoiled.set_submodule(self._head, NoHead(self.dtype))
            self._require_idle(torch.equal(alike, leave(spoiled, *places)))
        drawn = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
        if not torch.equal(alike, leave(shell, *places, earlier=drawn.to(states))):
            raise UnderivedError(
                f"{self._kind}: what follows the last layer also reads what earlier ones put out; pq "
                "takes decoders whose layers follow one another"
            )
        return after

    def _wider(self) -> str:
        """What to say of hidden states that are not as wide as config.json says; empty where they
        are."""
        hidden = getattr(text_config(self._model), "hidden_size", None)
        if hidden in (None, self.stream.width):
            return ""
        return f"hidden states of {self.stream.width} channels go from layer to layer, not {hidden}"

    def _beside(self, before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
        """The fewest modules and tensors that hold all which neither runs on text nor is a layer."""
        used = (self._blocks, *before, *after)
        found: dict[str, None] = {}
        for name in self._model.state_dict():
            levels = name.split(".")
            if any(name.startswith(f"{part}.") for part in used):
                continue
            paths = (".".join(levels[: count + 1]) for count in range(len(levels)))
            found[next(p for p in paths if not any(f"{u}.".startswith(f"{p}.") for u in used))] = (
                None
            )
        return tuple(found)

    def _outer(self, model_type: str, before: tuple[str, ...], after: tuple[str, ...]) -> Outer:
        norms = [n for n in after if n != self._head and is_norm(self._model.get_submodule(n))]
        norm = norms[0] if len(norms) == 1 and len(after) == 2 else None
        offset = None if norm is None else norm_offset(self._model.get_submodule(norm))
        return Outer(
            model_type,
            self._blocks,
            self._embedding,
            self._head,
            None if offset is None else norm,
            before,
            after,
            self._beside(before, after),
            offset or 0.0,
            self.stream.extra or self._wider(),
            bool(self.stream.shared),
        )


_KINDS = 3
"""Most kinds of layers that are tried to return their states in all ways."""


def _place(
    shell: Any, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = shell.get_submodule(owner)
        placed = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        if attribute in module._buffers:
            module._buffers[attribute] = placed
        else:
            module._parameters[attribute] = nn.Parameter(placed, requires_grad=False)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
