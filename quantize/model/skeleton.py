"""A transformers model without weights, from which single decoder blocks are brought to life."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import DataError, ModelError
from quantize.model.arch import Architecture, block_architecture
from quantize.model.attention import ATTENTION
from quantize.model.moe import Policy, Router, place_experts
from quantize.model.transformers_api import (
    LayerCall,
    build_model,
    layer_calls,
    read_config,
    read_tokenizer,
    rope_types,
)


def meta_model(folder: Path, dtype: torch.dtype) -> Any:
    """The full-precision model that config.json describes, without memory; ModelError for
    what transformers refuses."""
    try:
        config = read_config(folder)
        _require_known_rope(folder, config)
        with torch.device("meta"):
            model = build_model(config, dtype, ATTENTION)
    except ModelError:
        raise
    except Exception as err:
        # A bad field gives KeyError, AttributeError, RuntimeError,
        # AssertionError or a validator's own class.
        reason = " ".join(f"{type(err).__name__}: {err}".split())[:300]
        raise ModelError(
            f"{folder}/config.json: transformers cannot build this model ({reason})"
        ) from None
    return model.eval().requires_grad_(False)


def _require_known_rope(folder: Path, config: Any) -> None:
    # transformers would say no more than KeyError.
    parameters = getattr(config, "rope_parameters", None)
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
    known = rope_types()
    if kind not in known:
        raise ModelError(
            f"{folder}/config.json: rope_type {kind!r} is not known (known: {', '.join(known)})"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that stands beside the weights; DataError when there is none that works."""
    try:
        return read_tokenizer(folder)
    except Exception as err:
        # The tokenizers library raises plain Exception for a broken file,
        # transformers half a dozen classes.
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise DataError(
            f"{folder}: no usable tokenizer ({reason}); put tokenizer.json beside the weights"
        ) from None


class Skeleton:
    """Builds decoder layers on demand and replays the arguments the full model would give them.

    routing: full names of FFNs with experts → how they route, where
    that is not as config.json says. model: `meta_model` of the folder where there is one already,
    which becomes the skeleton's own.
    """

    def __init__(
        self,
        folder: Path,
        arch: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        routing: Mapping[str, Policy] = MappingProxyType({}),
        model: Any = None,
    ) -> None:
        self.arch, self.device, self.dtype = arch, device, dtype
        self.model = meta_model(folder, dtype) if model is None else model
        self.config = self.model.config
        self._facts = self.config.to_dict()
        place_experts(self.model, arch, self._facts, routing)
        self._layers = self.model.get_submodule(arch.blocks)
        self._calls: dict[tuple[int, int], list[LayerCall]] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """ModelError unless a checkpoint's tensors (full name → shape) are
        those that config.json implies.

        tied: the head may be absent.
        """
        expected = {name: tuple(p.shape) for name, p in self.model.state_dict().items()}
        if surplus := sorted(set(shapes) - set(expected)):
            raise ModelError(
                f"tensor {surplus[0]} has no place in a {self.arch.model_type} model of "
                f"{len(self._layers)} layers; config.json and weights disagree"
            )
        for name, shape in expected.items():
            found = shapes.get(name)
            if found is None and not (tied and name.startswith(f"{self.arch.head}.")):
                raise ModelError(f"tensor {name} is missing from the checkpoint; download it again")
            if found not in (None, shape):
                raise ModelError(
                    f"tensor {name} is {list(found or ())}, config.json implies {list(shape)}"
                )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [N, K] of every nn.Linear of all blocks, by full name."""
        return {
            f"{self.arch.blocks}.{index}.{name}": size
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

    def routers(self) -> list[str]:
        """Full names of the linears that decide how much of an expert a token gets,
        which are never quantized."""
        return [name for name, module in self.model.named_modules() if isinstance(module, Router)]

    def block_arch(self, index: int) -> Architecture:
        """Roles, groups and edges of block `index`, its experts written out."""
        return block_architecture(self.arch, self._facts, index)

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
            weights if placed else {n: w.to(self.device, self.dtype) for n, w in weights.items()}
        )
        layer.load_state_dict(moved, assign=True)
        for name, module in (packed or {}).items():
            layer.set_submodule(name, module)
        layer.requires_grad_(False)
        return layer

    def final_norm(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The norm behind the last block, with these weights."""
        norm: nn.Module = copy.deepcopy(self.model.get_submodule(self.arch.final_norm))
        norm.load_state_dict(
            {name: w.to(self.device, self.dtype) for name, w in weights.items()}, assign=True
        )
        return norm

    def forward(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run block `index` on hidden [B, T, D], with the masks and rotary
        tables of that batch shape."""
        return self._call(hidden.shape[0], hidden.shape[1])[index].run(layer, hidden)

    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """tokens [B, T] → the hidden states [B, T, D] that enter block 0."""
        hidden = torch.nn.functional.embedding(tokens.to(self.device), weight.to(self.device)).to(
            self.dtype
        )
        return self._replay(hidden)[0]

    def _call(self, batch: int, length: int) -> list[LayerCall]:
        if (batch, length) not in self._calls:
            hidden = torch.zeros(
                batch, length, self.config.hidden_size, dtype=self.dtype, device=self.device
            )
            self._calls[batch, length] = self._replay(hidden)[1]
        return self._calls[batch, length]

    def _replay(self, hidden: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Embedded tokens [B, T, D] → (input of block 0, arguments of every block)."""
        root, _, layers = self.arch.blocks.rpartition(".")
        final_norm = self.arch.final_norm.rpartition(".")[2]
        decoder = self.model.get_submodule(root)
        return layer_calls(decoder, layers, final_norm, hidden, self.config)
