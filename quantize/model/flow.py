"""What one pass through a decoder block shows: which linears share an input, in which order they
are called, which norm they read, and what is added to the residual stream as it is.

Every tensor gets a number for its values. Views, casts and copies keep it, so that two modules with
the same number read the same thing, whatever the code between them is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.model.attention import watch_attention

_KEEPS_VALUES = frozenset(
    (
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "expand",
        "_to_copy",
        "to",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "lift_fresh",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "t",
        "native_dropout",
    )
)
"""Operators whose output holds the values of their first operand, and nothing else."""
_MULTIPLIES = frozenset(("mul", "mul_", "div", "div_"))
_ADDS = frozenset(("add", "add_"))
_GATHERS = frozenset(("index", "index_select", "slice", "select", "cat", "sum", "where", "gather"))
_PUTS = frozenset(
    ("index_add", "index_add_", "index_put", "index_put_", "scatter_add", "scatter_add_")
)
_CUTS = frozenset(("split", "split_with_sizes", "chunk", "slice"))
_MAKES = ("zeros", "new_zeros", "zero_", "empty_like", "ones_like", "full_like", "new_empty")
"""How operators begin that read no values of what they are given."""
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"))


@dataclass(frozen=True)
class Call:
    """One call of a module with parameters of its own."""

    name: str
    reads: int
    gives: int


@dataclass(frozen=True)
class Attending:
    """One call of the attention function: who asked, and what values it was given."""

    module: str
    query: int
    key: int
    value: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    options: frozenset[str]
    """Names of what it was given beside the mask and the scaling (`s_aux`, `softcap`)."""


@dataclass
class Flow:
    """What was seen in one pass."""

    calls: list[Call] = field(default_factory=list)
    """Calls of linears and norms, in order."""
    projections: list[Call] = field(default_factory=list)
    """Products with a matrix that is a module's parameter: linears, and routers that are none."""
    attending: list[Attending] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    """Values of the residual stream: what enters, then after each addition."""
    added: list[tuple[str, bool, int]] = field(default_factory=list)
    """(linear, whether its output was added as it is, values of the stream it was added to)."""
    joined: list[tuple[int, int]] = field(default_factory=list)
    """(values of which nothing more is known, values of the stream they were added to)."""
    readers: dict[int, set[str]] = field(default_factory=dict)
    """Values → modules that read them; `` for the block's own code."""
    parts: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    """Values → the linear that puts them out, and which of its outputs [first, end) they are."""
    products: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Values of an elementwise product → values of its factors."""

    def reads_of(self, name: str) -> int | None:
        """The values that a module read in its first call; None for one that was not called."""
        return next((call.reads for call in self.calls if call.name == name), None)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the values of all tensors of a pass."""

    def __init__(self, parameters: Mapping[int, str], modules: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Flow()
        self._parameters = parameters
        self._within = modules
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._count = 0
        self._matrix: dict[int, str] = {}
        # Values → linears whose outputs they are a sum of, and whether each is in it as it is.
        self._sums: dict[int, dict[str, bool]] = {}
        # Values joined along the last dimension → those of the pieces, and their widths.
        self._joined: dict[int, list[tuple[int, int]]] = {}

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's values."""
        found = self._numbers.get(id(tensor))
        if found is None:
            found = self.renew(tensor)
            if name := self._parameters.get(id(tensor)):
                self._matrix[found] = name
        return found

    def renew(self, tensor: Tensor, number: int | None = None) -> int:
        """Give a tensor a new number, or this one."""
        if number is None:
            self._count += 1
            number = self._count
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        return number

    def is_output_of(self, tensor: Tensor, linear: str) -> None:
        """Note that a linear has put this out."""
        number = self.number(tensor)
        self._sums[number] = {linear: True}
        self.flow.parts[number] = (linear, 0, tensor.shape[-1])

    def stream(self, tensor: Tensor) -> None:
        """Note that this is the residual stream."""
        self.flow.streams.append(self.number(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operator = func.overloadpacket.__name__
        given = list(_flat((args, kwargs or {})))
        # In-place operators change what their first operand holds: its number is read before.
        before = [self.number(value) for value in given]
        out = func(*args, **(kwargs or {}))
        found = list(_flat(out))
        if operator in _KEEPS_VALUES and given:
            for tensor in found[:1]:
                self.renew(tensor, before[0])
            return out
        numbers = [self.renew(tensor) for tensor in found]
        if operator == "cat" and given and args[-1] in (-1, given[0].ndim - 1):
            widths = [tensor.shape[-1] for tensor in given]
            self._joined[numbers[0]] = list(zip(before, widths, strict=True))
        if operator in _CUTS and given:
            self._note_cut(given[0], before[0], found, args)
        if numbers:
            self._note(operator, given, before, found[0], numbers[0], args)
        return out

    def _note(
        self,
        operator: str,
        given: list[Tensor],
        before: list[int],
        result: Tensor,
        number: int,
        args: tuple[Any, ...],
    ) -> None:
        reader = self._within[-1] if self._within else ""
        for value in () if operator.startswith(_MAKES) else before:
            self.flow.readers.setdefault(value, set()).add(reader)
        if operator in _PRODUCTS:
            self._note_product(before, number)
        elif operator.startswith(("zeros", "new_zeros", "zero_")):
            self._sums[number] = {}
        elif operator in _ADDS and len(before) == 2:
            self._note_sum(before, number, args, given)
        elif operator in _MULTIPLIES and before:
            self._note_scaled(given, before, number)
        elif operator in _GATHERS or operator in _PUTS:
            self._note_gathered(given, before, number)

    def _note_gathered(self, given: list[Tensor], before: list[int], number: int) -> None:
        pairs = zip(given, before, strict=True)
        floats = [value for tensor, value in pairs if tensor.is_floating_point()]
        if all(value in self._sums for value in floats):
            self._sums[number] = {name: False for value in floats for name in self._sums[value]}

    def _note_cut(
        self, whole: Tensor, number: int, pieces: list[Tensor], args: tuple[Any, ...]
    ) -> None:
        """Note which outputs of a linear the pieces are that it was cut into along its outputs."""
        joined = self._joined.get(number, ())
        if [size for _, size in joined] == [piece.shape[-1] for piece in pieces]:
            for piece, (original, _) in zip(pieces, joined, strict=True):
                self.renew(piece, original)
            return
        part = self.flow.parts.get(number)
        if part is None or whole.shape[-1] != part[2] - part[1]:
            return
        if sum(piece.shape[-1] for piece in pieces) == whole.shape[-1]:
            start = 0
        elif len(pieces) == 1 and args[1] in (-1, whole.ndim - 1):  # slice(x, dim, start, …)
            start = args[2] or 0
            start = start + whole.shape[-1] if start < 0 else start
        else:
            return
        for piece in pieces:
            first = part[1] + start
            self.flow.parts[self.number(piece)] = (part[0], first, first + piece.shape[-1])
            start += piece.shape[-1]

    def _note_product(self, before: list[int], number: int) -> None:
        named = [self._matrix[value] for value in before if value in self._matrix]
        others = [value for value in before if value not in self._matrix]
        if named and others:  # a bias comes first, so that the last one is the input
            self.flow.projections.append(Call(named[0], others[-1], number))

    def _note_sum(
        self, before: list[int], number: int, args: tuple[Any, ...], given: list[Tensor]
    ) -> None:
        first, second = before
        streams = self.flow.streams
        for stream, other in ((first, second), (second, first)):
            if streams and stream == streams[-1] and other in self._sums:
                for name, exact in self._sums[other].items():
                    self.flow.added.append((name, exact, stream))
                streams.append(number)
                return
            if streams and stream == streams[-1] and given[0].shape == given[1].shape:
                self.flow.joined.append((other, stream))
                streams.append(number)
                return
        if first in self._sums and second in self._sums:
            self._sums[number] = self._sums[first] | self._sums[second]

    def _note_scaled(self, given: list[Tensor], before: list[int], number: int) -> None:
        if len(given) == 2:
            self.flow.products[number] = (before[0], before[1])
        wide = [
            value
            for tensor, value in zip(given, before, strict=True)
            if tensor.ndim and tensor.shape[-1] > 1
        ]
        # By a number, or by one number a token.
        if len(wide) == 1 and wide[0] in self._sums:
            self._sums[number] = dict.fromkeys(self._sums[wide[0]], False)


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _flat(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _flat(one)


def record(
    block: nn.Module, hidden: Tensor, forward: Callable[[nn.Module, Tensor], Tensor]
) -> Flow:
    """Run a block once on hidden states [B, T, D] and say what was seen.

    forward: runs the block with its masks and rotary tables. The block may be on the meta device;
    its parameters are told apart by identity, so that it must not be run by others meanwhile.
    """
    parameters: dict[int, str] = {}
    for name, module in block.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim == 2:
                parameters[id(parameter)] = name
    within: list[str] = []
    recorder = _Recorder(parameters, within)
    names = {module: name for name, module in block.named_modules()}
    with ExitStack() as stack:
        for name, module in block.named_modules():
            if name and any(parameter is not None for parameter in module._parameters.values()):
                stack.enter_context(_noting(recorder, within, name, module))

        def attended(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Any) -> None:
            recorder.flow.attending.append(
                Attending(
                    names.get(module, ""),
                    recorder.number(q),
                    recorder.number(k),
                    recorder.number(v),
                    q.shape[1],
                    k.shape[1],
                    k.shape[3],
                    v.shape[3],
                    frozenset(options),
                )
            )

        stack.enter_context(watch_attention(attended))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        recorder.stream(hidden)
        forward(block, hidden)
    return recorder.flow


def is_norm(module: nn.Module) -> bool:
    """Whether a module has the parameters of a norm: a vector `weight`, perhaps a `bias`, no more."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        "weight" in own
        and own.keys() <= {"weight", "bias"}
        and all(parameter.ndim == 1 for parameter in own.values())
        and not any(True for child in module.children() for _ in child.parameters())
    )


@contextmanager
def _noting(recorder: _Recorder, within: list[str], name: str, module: nn.Module) -> Iterator[None]:
    linear, norm = isinstance(module, nn.Linear), is_norm(module)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        within.append(name)
        entered.append(next((recorder.number(x) for x in _flat((args, kwargs))), 0))

    def leave(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        within.pop()
        reads = entered.pop()
        result = next(_flat(out), None)
        if result is None or not (linear or norm):
            return
        calls = recorder.flow.calls
        if norm:
            recorder.renew(result)  # also of a norm that passes on what it was given
        calls.append(Call(name, reads, recorder.number(result)))
        recorder.flow.readers.setdefault(reads, set()).add(name)
        if linear:
            recorder.is_output_of(result, name)

    entered: list[int] = []
    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
