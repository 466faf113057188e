"""How a transformers model runs its text decoder: what it does before the first layer, what it gives
every layer, and what it does behind the last.

All of it is the model's own forward, run with other modules in the place of its layers, so that
embedding multipliers, masks by layer type, learned positions and capped logits are the model's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UnderivedError
from quantize.model.transformers_api import Cache, LayerCall, release, text_model


@dataclass(frozen=True)
class Parts:
    """Full names of the parts of a text decoder."""

    blocks: str
    """The list of its layers, `model.layers`."""
    embedding: str
    head: str


def _head_of(model: Any) -> Any:
    """The head: the model's own, else that of the one model within that has one (Nemotron Omni's
    class does not hand on its text model's)."""
    head = model.get_output_embeddings()
    if head is not None:
        return head
    inner = [m for m in model.modules() if m is not model and hasattr(m, "get_output_embeddings")]
    found = {found for m in inner if (found := m.get_output_embeddings()) is not None}
    return found.pop() if len(found) == 1 else None


def parts_of(model: Any) -> Parts:
    """Find them; UnderivedError names what is not as in other decoders."""
    kind = type(model).__name__
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), _head_of(model)
    if not isinstance(embedding, nn.Embedding):
        raise UnderivedError(f"{kind}: get_input_embeddings() gives no embedding of tokens")
    if not isinstance(head, nn.Linear):
        raise UnderivedError(
            f"{kind}: get_output_embeddings() gives no linear, so that there is no head"
        )
    facts = model.config.get_text_config(decoder=True)
    place = names[embedding]
    counts = [getattr(facts, "num_hidden_layers", None), getattr(facts, "num_layers", None)]
    stacks = next(filter(None, (_stacks(model, count) for count in counts if count)), [])
    # The decoder's layers stand beside its embedding; those of a tower stand elsewhere.
    stacks.sort(key=lambda name: (-_shared(name, place), name.count(".")))
    if not stacks:
        raise UnderivedError(
            f"{kind}: no list of {counts[0]} layers (num_hidden_layers) was found, so that pq does not "
            "know its decoder"
        )
    return Parts(stacks[0], place, names[head])


def _stacks(model: nn.Module, count: int) -> list[str]:
    """Lists of so many modules that are no part of such a list themselves."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        plain = any(isinstance(layer, nn.Linear | nn.ModuleList) for layer in module.children())
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside and not plain:
            found.append(name)
    return found


def _shared(one: str, other: str) -> int:
    """How many names two paths begin with together."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count("."))
    )


def text_config(model: Any) -> Any:
    """The config of the text decoder, which checkpoints with other towers keep below their own."""
    return model.config.get_text_config(decoder=True)


def plain_tokens(model: Any) -> list[int]:
    """A few tokens that mean nothing special to a model, by what its config calls so."""
    special: set[int] = set()

    def gather(values: Any, named: bool) -> None:
        if isinstance(values, Mapping):
            for key, value in values.items():
                gather(value, named or "token" in str(key))
        elif isinstance(values, list | tuple):
            for value in values:
                gather(value, named)
        elif named and isinstance(values, int):
            special.add(values)

    gather(model.config.to_dict(), False)
    count = model.get_input_embeddings().num_embeddings
    usual = range(3, min(count, 19 + len(special)))
    return [token for token in usual if token not in special][:16] or [0]


def renew_buffers(
    root: nn.Module, model: Any, device: torch.device, index: int | None = None
) -> None:
    """Compute the buffers that checkpoints do not hold, by the model's own rule, on `device`.

    root: the model, or one of its layers, its parameters on the meta device, which stay as they are.
    index: which of its layers.
    """
    unset: list[tuple[nn.Module, list[str]]] = []
    place = "" if index is None else parts_of(model).blocks
    for name, module in root.named_modules():
        owner = _owner_of(root if index is None else model, name if index is None else place)
        absent = [
            buffer
            for buffer in module._non_persistent_buffers_set
            if (held := module._buffers.get(buffer)) is not None and held.is_meta
        ]
        if not absent:
            continue
        for buffer in absent:
            held = module._buffers[buffer]
            assert held is not None
            blank = float("nan") if held.is_floating_point() else 0
            module._buffers[buffer] = torch.full_like(held, blank, device=device)
        parameters = dict(module._parameters)
        for parameter, held in parameters.items():
            if held is not None:
                module._parameters[parameter] = nn.Parameter(held.to("meta"), requires_grad=False)
        try:
            with torch.no_grad():
                owner._init_weights(module)
        finally:
            module._parameters = parameters
        unset.append((module, absent))
    if index is not None and any(_left(*one) for one in unset):
        _set_by_owner(root, model, index)
    for module, names in unset:
        if left := _left(module, names):
            _remake_buffers(module, model, left, device)


def _owner_of(model: Any, name: str) -> Any:
    """The innermost model of transformers that holds a module, or is it: its rule makes the module's
    buffers."""
    levels = name.split(".") if name else []
    paths = [".".join(levels[:count]) for count in range(len(levels), -1, -1)]
    above = (model.get_submodule(path) for path in paths)
    return next(module for module in above if hasattr(module, "_init_weights"))


def _left(module: nn.Module, names: Sequence[str]) -> list[str]:
    return [name for name in names if _is_unset(module._buffers[name])]


def _set_by_owner(root: nn.Module, model: Any, index: int) -> None:
    """Let what holds the layers set the buffers of one, which stands in the place of its own
    (Falcon-H1: `mup_vector`)."""
    place, _, listed = parts_of(model).blocks.rpartition(".")
    owner = model.get_submodule(place)
    stand_in = copy.copy(owner)
    stand_in._modules = dict(owner._modules)
    layers = list(owner.get_submodule(listed))
    layers[index] = root
    stand_in._modules[listed] = nn.ModuleList(layers)
    with torch.no_grad():
        model._init_weights(stand_in)


def _is_unset(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any())


def _remake_buffers(
    module: nn.Module, model: Any, names: Sequence[str], device: torch.device
) -> None:
    """Take buffers from a second module of the same kind, which computes them when it is made."""
    given = (text_config(model), getattr(module, "layer_idx", None))
    for arguments in (given, given[:1], ()):
        try:
            with torch.device(device):
                made = type(module)(*arguments)
            for name in names:
                module._buffers[name] = made.get_buffer(name).to(device)
        except (TypeError, AttributeError, RuntimeError, KeyError):
            continue
        if not any(_is_unset(module._buffers[name]) for name in names):
            return
    raise UnderivedError(
        f"{type(model).__name__}: buffer {names[0]} of {type(module).__name__} is in no checkpoint, "
        "and pq does not know how to compute it"
    )


def stock_attention(model: Any) -> str:
    """The attention that transformers itself would take for a model."""
    return "sdpa" if model._supports_sdpa else "eager"


def use_attention(root: nn.Module, name: str) -> None:
    """Let all modules below, whose configs must be their own, attend by another implementation."""
    for module in root.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def needs_weights(model: Any, linears: Collection[str]) -> str | None:
    """Class of a module whose new weights, by the model's own rule, are asked of linears that have
    none: the rule runs also where a checkpoint has them packed (Falcon, GPT-BigCode). None where
    there is none. The linears are full names."""
    place = parts_of(model).blocks
    layers = model.get_submodule(place)
    for index in {0, len(layers) - 1}:
        layer = copy.deepcopy(layers[index])
        for name, module in layer.named_modules():
            if f"{place}.{index}.{name}" in linears:
                module._parameters.pop("weight", None)
        for module in layer.modules():
            try:
                with torch.no_grad():
                    model._init_weights(module)
            except AttributeError:
                return type(module).__name__
    return None


class StandIn(nn.Module):
    """Stands in for a decoder layer; other attributes are the layer's."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self._layer = (layer,)  # a tuple keeps it out of the tree of modules
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        # Models choose a layer's mask and rotary table by its attributes.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def result(self, hidden: Tensor) -> Any:
        """What the layer would return for these hidden states."""
        return (hidden, BESIDE) if self._returns_tuple else hidden


class _Beside:
    """Stands for what a layer returns beside hidden states. A model may hand it to the next layer;
    one that reads it (the chosen tokens of a sparse attention, GLM-5's shared indexer) is refused,
    where None might mean something to it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnderivedError(
            "a layer reads what the one before it returned beside hidden states, which pq does not "
            "carry from layer to layer"
        )


BESIDE = _Beside()


class Recorder(StandIn):
    """Keeps what it is given, and passes hidden states on, or others drawn by `draw`."""

    call: LayerCall
    entered: Tensor
    gave: Tensor
    versions: tuple[int, int]
    """How often these two were written to in place before."""

    def __init__(
        self,
        layer: nn.Module,
        returns_tuple: bool,
        last: bool,
        draw: torch.Generator | None = None,
    ) -> None:
        super().__init__(layer, returns_tuple)
        self._last, self._draw = last, draw

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep what a layer is given."""
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise UnderivedError(
                f"{release()} gives layers a cache where none was asked for, which pq cannot "
                "replay; install an earlier release"
            )
        self.call = LayerCall(args, kwargs)
        self.entered = self.gave = hidden_states
        if self._draw is not None:
            drawn = torch.randn(hidden_states.shape, generator=self._draw)
            self.gave = drawn.to(hidden_states)
        self.versions = tuple(getattr(x, "_version", 0) for x in (self.entered, self.gave))  # type: ignore[assignment]
        if self._last:
            raise _Stop
        return self.result(self.gave)


class _Returning(StandIn):
    """Returns given hidden states whatever it is called with."""

    def __init__(
        self, layer: nn.Module, returns_tuple: bool, states: Tensor, met: Callable[[], None]
    ) -> None:
        super().__init__(layer, returns_tuple)
        self._states, self._met = (states,), met

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give what it stands in for."""
        self._met()
        return self.result(self._states[0])


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the last layer's input was seen."""


def returns_tuple(layer: nn.Module) -> bool:
    """Whether a layer returns hidden states first of a tuple, by what its forward says of itself."""
    said = inspect.signature(layer.forward).return_annotation
    return "tuple" in str(said).lower()


def say_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let a model and the models within say that they are on `device`, which they ask of their first
    parameter: that of a tower without weights would say meta (Idefics 3)."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            asked = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
            module._parameters = {"first": asked, **module._parameters}


def enter(model: Any, recorders: Sequence[Recorder], tokens: Tensor) -> Tensor:
    """Run a model whose layers are these recorders on tokens [B, T] → the hidden states that enter
    its first layer, [B, T, D] in most models.

    UnderivedError where it does something between two layers.
    """
    try:
        with torch.no_grad():
            text_model(model)(input_ids=tokens, use_cache=False)
    except _Stop:
        pass
    for index, recorder in enumerate(recorders):
        if "entered" not in recorder.__dict__:
            raise UnderivedError(
                f"{type(model).__name__}: layer {index} does not run on text alone, so that pq "
                "cannot calibrate it; pq takes decoders of which every layer does"
            )
    for index, (before, after) in enumerate(pairwise(recorders)):
        entered = after.entered
        unchanged = isinstance(entered, Tensor) and _same(entered, before.gave)
        if not unchanged or after.versions[0] != before.versions[1]:
            raise UnderivedError(
                f"{type(model).__name__}: hidden states change between layers {index} and "
                f"{index + 1}, outside of both; pq takes decoders whose layers follow one another"
            )
    return recorders[0].entered


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two are one tensor, or a view of all of it. Equal values would not do: what averages
    the outputs of several layers (Dory) gives them back where all are the same."""
    ours, theirs = ((x.data_ptr(), x.shape, x.stride()) for x in (one, other))
    return one is other or ours == theirs


def leave(
    model: Any,
    layers: Sequence[nn.Module],
    returns: Sequence[bool],
    place: str,
    hidden: Tensor,
    size: tuple[int, int],
    met: Callable[[], None] = lambda: None,
    earlier: Tensor | None = None,
) -> Tensor:
    """Hidden states behind the last layer → logits [B, T, V], by the model's own forward.

    size: B and T. earlier: what other layers than the last one return; None: the same.
    returns: whether each layer returns a tuple. met: called where a layer would run.
    """
    given = [
        _Returning(layer, several, hidden if earlier is None else earlier, met)
        for layer, several in zip(layers[:-1], returns[:-1], strict=True)
    ]
    given.append(_Returning(layers[-1], returns[-1], hidden, met))
    model.set_submodule(place, nn.ModuleList(given))
    tokens = torch.zeros(size, dtype=torch.long, device=hidden.device)
    with torch.no_grad():
        logits: Tensor = text_model(model)(input_ids=tokens, use_cache=False).logits
    return logits


def without_layers(model: Any, place: str) -> Any:
    """A copy of a model on the meta device that has no layers."""
    layers = model.get_submodule(place)
    model.set_submodule(place, nn.ModuleList())
    try:
        return copy.deepcopy(model)
    finally:
        model.set_submodule(place, layers)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(one, change) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(mapped(one, change) for one in value)
    return value
