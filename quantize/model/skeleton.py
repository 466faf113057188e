"""A transformers model without weights, from which single decoder blocks are brought to life."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import ModelError, UnderivedError
from quantize.model.arch import Architecture, Shape
from quantize.model.attention import ATTENTION
from quantize.model.build import meta_model, split_model
from quantize.model.derive import Outer, derive
from quantize.model.experts import Experts as SplitExperts
from quantize.model.flow import Flow, record
from quantize.model.moe import MoeFfn, Policy, Router
from quantize.model.rope import rotary_dim
from quantize.model.shell import Found, Shell, Tail
from quantize.model.stream import Stream, StreamCall
from quantize.model.transformers_api import LayerCall, attention_name, build_model
from quantize.model.transformers_decoder import (
    mapped,
    parts_of,
    renew_buffers,
    stock_attention,
    text_config,
    use_attention,
)


class Skeleton:
    """Builds decoder layers on demand and replays the arguments the full model would give them.

    routing: full names of FFNs with experts → how they route, where
    that is not as config.json says. model: `meta_model` of the folder where there is one already,
    which becomes the skeleton's own.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        routing: Mapping[str, Policy] = MappingProxyType({}),
        model: Any = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        built = meta_model(folder, dtype) if model is None else model
        self.model = split_model(built, routing)
        self._settle()

    @classmethod
    def of_config(cls, config: Any, dtype: torch.dtype) -> Skeleton:
        """The same of a config of transformers, on the CPU."""
        found = cls.__new__(cls)
        found.device, found.dtype = torch.device("cpu"), dtype
        with torch.device("meta"):
            model = build_model(config, dtype, ATTENTION)
        found.model = split_model(model.eval().requires_grad_(False))
        found._settle()
        return found

    def _settle(self) -> None:
        self.config = self.model.config
        self.parts = parts_of(self.model)
        self._layers = self.model.get_submodule(self.parts.blocks)
        self._calls: dict[tuple[int, int], list[StreamCall]] = {}
        facts = self.config.to_json_string(use_diff=False)
        key = (type(self.model), facts, self.dtype, self.device.type)
        self._known = _KNOWN.setdefault(key, _Known())

    @cached_property
    def _shell(self) -> Shell:
        """Made when it is needed: sizes are checked before, by which absurd ones are found."""
        try:
            shell = Shell(self.model, self.device, self.dtype, self._known.shell)
        except _FAILURES as err:
            raise UnderivedError(
                f"{type(self.model).__name__}: pq cannot run what stands around its layers without "
                f"them ({_reason(err)})"
            ) from None
        self._known.shell = shell.found
        return shell

    @property
    def outer(self) -> Outer:
        """What stands around the blocks."""
        return self._shell.outer

    @property
    def stream(self) -> Stream:
        """What goes from block to block."""
        return self._shell.stream

    @cached_property
    def arch(self) -> Architecture:
        """What is derived of all blocks together."""
        blocks = [self.block_arch(index) for index in range(len(self._layers))]
        different = {id(arch): arch for arch in blocks}
        return blocks[0].with_others(different.values())

    def check(self, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """ModelError unless a checkpoint's tensors (full name → shape) are
        those that config.json implies.

        tied: the head may be absent.
        """
        expected = {name: tuple(p.shape) for name, p in self.model.state_dict().items()}
        if surplus := sorted(set(shapes) - set(expected)):
            raise ModelError(
                f"tensor {surplus[0]} has no place in a {self.config.model_type} model of "
                f"{len(self._layers)} layers; config.json and weights disagree"
            )
        for name, shape in expected.items():
            found = shapes.get(name)
            if found is None and not (tied and name == f"{self.parts.head}.weight"):
                raise ModelError(f"tensor {name} is missing from the checkpoint; download it again")
            if found not in (None, shape):
                raise ModelError(
                    f"tensor {name} is {list(found or ())}, config.json implies {list(shape)}"
                )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] of every nn.Linear of all blocks, by full name."""
        return {
            f"{self.parts.blocks}.{index}.{name}": size
            for index in range(len(self._layers))
            for name, size in self.linear_shapes(index).items()
        }

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] of every linear of block `index` but its routers, by
        name relative to the block."""
        linears = {n: m for n, m in self._layers[index].named_modules() if isinstance(m, nn.Linear)}
        return {
            n: (m.out_features, m.in_features)
            for n, m in linears.items()
            if not isinstance(m, Router)
        }

    def linears_outside(self) -> list[str]:
        """Full names of the linears outside the blocks but the head, which are never quantized: of
        towers, or of what enters the first block."""
        modules = self.model.named_modules()
        linears = [name for name, module in modules if isinstance(module, nn.Linear)]
        inside = f"{self.parts.blocks}."
        return [n for n in linears if not n.startswith(inside) and n != self.parts.head]

    def routers(self) -> list[str]:
        """Full names of the linears that decide how much of an expert a token gets,
        which are never quantized."""
        return [name for name, module in self.model.named_modules() if isinstance(module, Router)]

    def block_arch(self, index: int) -> Architecture:
        """What is derived of block `index`; nothing of it is proved yet."""
        layer = self._layers[index]
        kind = _kind(layer)
        if kind not in self._known.blocks:
            flow, block = self._flow(index)
            leaves = any(one.writer == index for one in self.stream.shared)
            self._known.blocks[kind] = derive(
                block, flow, self.outer, _routed(layer), self._rotary_dim(flow), leaves
            )
        return self._known.blocks[kind]

    def _require_own_attention(self, index: int, layer: nn.Module) -> None:
        """UnderivedError where a layer computes something else than with the attention that
        transformers would take: its code does otherwise for names that it does not know."""
        kind, stock = _kind(self._layers[index]), stock_attention(self.model)
        if kind in self._known.attends or not attention_name(self.model).startswith(ATTENTION):
            return
        draw = torch.Generator().manual_seed(0)
        hidden = self.stream.draw(1, _SEEN, draw, self.dtype).to(self.device)
        # It shares its weights with the layer, and has configs of its own.
        usual = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
        use_attention(usual, stock)
        with torch.no_grad():
            ours = self._call(1, _SEEN)[index].run(layer, hidden).float()
            theirs = self._shell.calls(1, _SEEN, stock)[index].run(usual, hidden).float()
        error = (ours - theirs).abs().max()
        size = self.stream.states_of(theirs - hidden.float()).abs().max()
        if not error <= _SAME * size and bool(theirs.isfinite().all()):
            raise UnderivedError(
                f"{self.parts.blocks}.{index}: computes something else with pq's attention than with "
                f"transformers' {stock!r} (difference {float(error / size):.2g})"
            )
        self._known.attends.add(kind)

    def block_shape(self, index: int, shape: Shape) -> Shape:
        """The model's sizes with those of the attention of block `index`."""
        heads = self.block_arch(index).heads
        if heads is None:
            return shape
        return replace(
            shape, n_heads=heads.n_heads, n_kv_heads=heads.n_kv_heads, head_dim=heads.head_dim
        )

    def _rotary_dim(self, flow: Flow) -> int | None:
        facts = text_config(self.model).to_dict()
        return rotary_dim(facts, flow.attending[0].head_dim) if flow.attending else None

    def _flow(self, index: int) -> tuple[Flow, nn.Module]:
        """One pass through block `index` → (what was seen, the module that ran): on the meta device,
        or with random weights where that cannot run it."""
        name = f"{self.parts.blocks}.{index}"
        call = self._call(1, _SEEN)[index]
        try:
            return self._record(index, call, torch.device("meta"))
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            try:
                return self._record(index, call, self.device)
            except (RuntimeError, TypeError, ValueError, AttributeError) as err:
                reason = " ".join(str(err).split())[:200]
                raise UnderivedError(f"{name}: pq cannot run this layer alone ({reason})") from None

    def _record(self, index: int, call: StreamCall, device: torch.device) -> tuple[Flow, nn.Module]:
        block: nn.Module = copy.deepcopy(self._layers[index])
        for module in block.modules():
            if isinstance(module, MoeFfn | SplitExperts):
                module.every_token = True
        if device.type != "meta":
            renew_buffers(block, self.model, device, index)
            draw = torch.Generator().manual_seed(0)
            for module in block.modules():
                for name, held in module._parameters.items():
                    if held is not None:
                        made = 0.1 * torch.randn(held.shape, generator=draw)
                        made = made.to(device, self.dtype)
                        module._parameters[name] = nn.Parameter(made, requires_grad=False)
        hidden = self.stream.draw(1, _SEEN, torch.Generator().manual_seed(1), self.dtype)
        states, beside = call.opened(hidden.to(device))
        args, kwargs = mapped((beside.args, dict(beside.kwargs)), lambda tensor: tensor.to(device))
        return record(block, states, LayerCall(args, kwargs).run), block

    def layer(
        self,
        index: int,
        weights: Mapping[str, Tensor],
        packed: Mapping[str, nn.Module] | None = None,
        placed: bool = False,
    ) -> nn.Module:
        """Materialize block `index` from tensors named relative to it;
        ModelError names what does not fit.

        packed: modules that stand in for linears of the block. placed: the tensors have their
        dtype and stay where they are.
        """
        layer: nn.Module = copy.deepcopy(self._layers[index])
        renew_buffers(layer, self.model, self.device, index)
        for name in packed or {}:
            layer.set_submodule(name, nn.Identity())  # has no tensors to look for
        expected = {n: tuple(p.shape) for n, p in layer.state_dict().items()}
        for name, shape in expected.items():
            if name not in weights:
                raise ModelError(f"block {index}: tensor {name} is missing from the checkpoint")
            if tuple(weights[name].shape) != shape:
                raise ModelError(
                    f"block {index}: {name} is {list(weights[name].shape)}, config.json implies "
                    f"{list(shape)}"
                )
        if surplus := sorted(set(weights) - set(expected)):
            raise ModelError(
                f"block {index}: tensor {surplus[0]} is in the checkpoint but not in the "
                "architecture"
            )
        moved = (
            weights
            if placed
            else {n: as_computed(w, self.device, self.dtype) for n, w in weights.items()}
        )
        layer.load_state_dict(moved, assign=True)
        for name, module in (packed or {}).items():
            layer.set_submodule(name, module)
        layer.requires_grad_(False)
        if not packed:
            self._require_own_attention(index, layer)
        return layer

    def forward(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run block `index` on a stream [B, T, W] (in most models hidden states [B, T, D]), with the
        masks and rotary tables of that batch shape."""
        return self._call(hidden.shape[0], hidden.shape[1])[index].run(layer, hidden)

    def embed(self, outside: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """tokens [B, T] → the stream [B, T, W] that enters block 0.

        outside: full name → tensor of the modules `arch.before`.
        """
        return self._shell.embed(outside, tokens)

    def tail(self, outside: Mapping[str, Tensor], head: nn.Module | None = None) -> Tail:
        """What turns the stream behind the last block into logits.

        outside: full name → tensor of the modules `arch.after`; the embedding's, where the head shares
        it. head: stands in for the model's.
        """
        return self._shell.tail(outside, head)

    def _call(self, batch: int, length: int) -> list[StreamCall]:
        if (batch, length) not in self._calls:
            self._calls[batch, length] = self._shell.calls(batch, length)
        return self._calls[batch, length]


def as_computed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A stored tensor as a model computes with it: floats in `dtype`, integers (tables that route
    tokens) as they are."""
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises where it is run in another way than it was written for."""


def _reason(err: Exception) -> str:
    return " ".join(f"{type(err).__name__}: {err}".split())[:200]


_SEEN = 8
"""Tokens of the pass that a block's architecture is derived from."""


# Of what a layer adds to the stream, in the coarsest dtype.
_SAME = 5e-2


@dataclass
class _Known:
    """What is known of a config, whose models all are alike."""

    shell: Found | None = None
    blocks: dict[Any, Architecture] = field(default_factory=dict)
    """Kind of layer → what was derived of it."""
    attends: set[Any] = field(default_factory=set)
    """Kinds of layers that compute with pq's attention what they do with transformers'."""


_KNOWN: dict[Any, _Known] = {}


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What layers have in common that do the same: their modules, sizes and settings."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, tuple(p.shape)) for n, p in module._parameters.items() if p is not None),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str) and key not in _NUMBERS
            ),
        )
        for name, module in layer.named_modules()
    )


_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes that tell layers apart and nothing more."""


def _routed(layer: nn.Module) -> tuple[str, ...]:
    """Names within a layer of the modules whose children are its routed experts."""
    found = [n for n, m in layer.named_modules() if isinstance(m, SplitExperts)]
    found += [f"{n}.experts" for n, m in layer.named_modules() if isinstance(m, MoeFfn)]
    return tuple(found)
