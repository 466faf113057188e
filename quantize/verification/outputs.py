"""Running blocks of a conversion beside the parent's on the same hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantize.block.walk import Pass, Route, Streams, walk
from quantize.calibration.fit import context_of
from quantize.calibration.tokens import check_vocab, evaluation_tokens
from quantize.errors import DataError, VerifyError
from quantize.methods.basis import Basis
from quantize.model.arch import CONTAINER, Architecture
from quantize.model.load import load_block, routing, tensors_of
from quantize.model.moe import Router
from quantize.model.skeleton import Skeleton
from quantize.model.tokenizer import load_tokenizer
from quantize.recipe.recipe import Recipe
from quantize.verification.layout import Layout
from quantize.verification.parent import Parent, Tick

_PARENT = "parent"
"""The stream through the parent's blocks."""
# Text that goes through parent and child: the errors looked for are large, few tokens show them.
_WINDOWS = 4
_SEQLEN = 128
_USELESS = 0.9
"""An output of zeros has a relative squared error of 1."""
_FLOOR = 0.1
_SLACK = 10.0
"""Least limit, and what recorded errors are multiplied by: errors of a block's linears add up within
it, and the text is another than in calibration."""
_MEASURED = {"output_error", "ffn_error"}
_ERRORS = ("output_error", "ffn_error", "weight_error", "kv_error")
_RANDOM = 3.0
"""Times more is granted on random tokens, which calibration never saw the like of."""


def check_outputs(
    layout: Layout,
    parent: Parent,
    recipe: Recipe | None,
    layers: Mapping[str, Any] | None,
    blocks: Sequence[int],
    seed: int,
    tick: Tick,
) -> str:
    """Linears of the sampled blocks give about the parent's outputs, with the serving
    kernel's numerics in float32.

    Both blocks get the hidden states that enter the parent's block, each in its own basis of the
    residual stream, which recipe tells (None: the parent's). Compared is every linear whose output
    no scale edge rescales, its bias left out, and of a Mixture of Experts the routers; then tokens
    visit the experts that the parent's scores choose.
    layers: facts of pq.json, whose output errors set the limit; None: unknown.
    VerifyError when a relative squared error is above its limit or not finite.
    """
    policies = routing(layout.source) if parent.skeleton.outer.model_type == CONTAINER else {}
    skeleton = Skeleton(parent.source.folder, layout.skeleton.device, torch.float32, policies)
    basis = Basis(recipe.stages if recipe else ())
    tokens, text, slack = _tokens(parent, seed)
    hidden = skeleton.embed(tensors_of(parent.source, parent.arch.before), tokens)
    streams = Streams({_PARENT: [hidden]}, drops=False)
    found, problems = [], []
    last = max(blocks)

    def open_parent(index: int) -> tuple[int, nn.Module]:
        tick(index, last + 1)
        return index, skeleton.layer(index, parent.source.tensors(f"{parent.arch.blocks}.{index}."))

    def visit(opened: tuple[int, nn.Module]) -> Mapping[str, Route[str]] | None:
        index, teacher = opened
        if index in blocks:
            (entering,) = streams.batches[_PARENT]
            errors = _errors(layout, skeleton, basis, teacher, index, entering)
            limit = min(_USELESS, slack * _limit(layout, layers, index))
            figures = _figures(errors, layout.skeleton.block_arch(index))
            line = f"block {index}: {figures} (limit {limit:.2g})"
            found.append(line)
            if not all(error <= limit for error in errors.values()):  # NaN is above every limit
                problems.append(line)
        return (
            {_PARENT: (_PARENT, partial(Pass(skeleton, index), teacher))} if index < last else None
        )

    walk(streams, range(last + 1), open_parent, visit)
    if problems:
        raise VerifyError(f"relative squared errors of outputs on {text}: {'; '.join(problems)}")
    return f"relative squared errors on {text}: {'; '.join(found)}"


def _tokens(parent: Parent, seed: int) -> tuple[Tensor, str, float]:
    """Windows [B, T] of the built-in text, or of random tokens for want of a
    tokenizer; their name, their slack."""
    vocab = parent.shape.vocab
    seqlen = min(_SEQLEN, context_of(parent.source.config) or _SEQLEN)
    try:
        tokenizer = load_tokenizer(parent.source.folder)
        text = evaluation_tokens(tokenizer, dataset="builtin", seqlen=seqlen, max_windows=_WINDOWS)
        check_vocab(text.tokens, vocab)
        return text.tokens, f"{text.tokens.numel()} tokens of text", 1.0
    except DataError:
        tokens = torch.randint(
            vocab, (_WINDOWS, seqlen), generator=torch.Generator().manual_seed(seed)
        )
        return tokens, f"{tokens.numel()} random tokens", _RANDOM


def _figures(errors: Mapping[str, float], arch: Architecture) -> str:
    """The largest error of each role."""
    by_role: dict[str, list[float]] = {}
    for name, error in errors.items():
        role = "experts" if name in _ffn(arch) else arch.roles.get(name, "router")
        by_role.setdefault(role, []).append(error)
    # NaN is the largest of all.
    worst = {
        role: max(found, key=lambda e: math.inf if math.isnan(e) else e)
        for role, found in by_role.items()
    }
    return " ".join(f"{role} {error:.2g}" for role, error in worst.items())


def _errors(
    layout: Layout, skeleton: Skeleton, basis: Basis, teacher: nn.Module, index: int, hidden: Tensor
) -> dict[str, float]:
    """Relative squared output error of each compared linear of block `index`,
    by name within the block."""
    arch = layout.skeleton.block_arch(index)
    before = skeleton.block_arch(index)
    routers = [name for name, module in teacher.named_modules() if isinstance(module, Router)]
    names = [*_comparable(arch, layout.attention is not None), *routers]
    if arch != before:  # experts took the place of a dense FFN: they are compared as a whole
        names = [*(name for name in names if name in before.roles), *_ffn(arch)]
    student = load_block(
        layout.source, layout.skeleton, layout.schemes, index, "kernel", layout.attention
    )
    # A token at the edge of an expert may visit it in one block and not in the other,
    # and there is no row to compare.
    routing = [*routers, *(_choosing(teacher, arch) if arch == before else ())]
    seen = list(dict.fromkeys((*names, *routing)))
    wanted, whole = _outputs(teacher, seen, Pass(skeleton, index), hidden)
    instead = {name: whole[name] for name in routing}
    given, _ = _outputs(student, seen, Pass(layout.skeleton, index), basis.enter(hidden), instead)
    for name in {*arch.writers, *_ffn(arch)} & set(given):
        given[name] = basis.leave(given[name])
    return {name: _relative(wanted[name], given[name]) for name in names}


def _choosing(layer: nn.Module, arch: Architecture) -> list[str]:
    """Modules beside the routed experts that choose among them and are no linears: they have a row of
    weights for each (Mixtral's router)."""
    if not any(map(arch.is_routed, arch.roles)) or arch.experts is None:
        return []
    place, _, _ = arch.experts.routed.rpartition(".")
    count = len({arch.expert_of(name) for name in arch.roles if arch.is_routed(name)})
    return [
        f"{place}.{name}" if place else name
        for name, module in layer.get_submodule(place).named_children()
        if not isinstance(module, nn.Linear)
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.dim() == 2
        and len(weight) == count
    ]


def _ffn(arch: Architecture) -> list[str]:
    """Name of a block's FFN where that has experts."""
    return [arch.experts.ffn] if arch.experts and any(map(arch.is_routed, arch.roles)) else []


def _comparable(arch: Architecture, rounds_keys: bool) -> list[str]:
    """Linears of a block whose outputs no stage rescales. rounds_keys: whether it
    attends on an INT4 cache."""
    rescaled = {edge.source for edge in arch.edges}
    if rounds_keys and arch.qk_norm is None:
        rescaled |= {
            n for n, role in arch.roles.items() if role in ("q", "k")
        }  # by the pre-RoPE scale
    return [name for name in arch.roles if name not in rescaled]


def _outputs(
    layer: nn.Module,
    names: Sequence[str],
    send: Pass,
    hidden: Tensor,
    instead: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs [..., N] of the named linears without their biases, as hidden states
    [B, T, D] go through the layer; and all that they return, which of some routers is more.

    instead: what the layer goes on with in place of that.
    """
    seen: dict[str, Tensor] = {}
    whole: dict[str, Any] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], Any]:
        def record(linear: nn.Module, _: tuple[Tensor, ...], out: Any) -> Any:
            whole[name] = out
            # Some routers return what they made of their scores too, before them.
            scores: Tensor = out[-1] if isinstance(out, tuple) else out
            # A large bias would hide what became of the weights.
            bias = getattr(linear, "bias", None)
            if isinstance(bias, Tensor) and not isinstance(out, tuple):
                scores = scores - bias
            seen[name] = scores
            return instead.get(name)

        return record

    for name in names:
        layer.get_submodule(name).register_forward_hook(recorder(name))
    send(layer, hidden)
    return seen, whole


def _relative(wanted: Tensor, given: Tensor) -> float:
    size = wanted.double().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float((given.double() - wanted.double()).square().sum() / size)


def _limit(layout: Layout, layers: Mapping[str, Any] | None, index: int) -> float:
    if layers is None:
        return _USELESS
    arch = layout.skeleton.block_arch(index)
    facts = [
        layers.get(f"{arch.blocks}.{index}.{name}", {})
        for name in (*arch.roles, arch.attention, *_ffn(arch))
    ]
    if not any(_MEASURED & f.keys() for f in facts):
        # A data-free recipe: what the errors of its weights do to outputs depends
        # on the outliers of the text.
        return _USELESS
    recorded = [next((f[key] for key in _ERRORS if key in f), 0.0) for f in facts]
    numbers = [
        float(error)
        for error in recorded
        if isinstance(error, int | float) and math.isfinite(error)
    ]
    return max(_FLOOR, _SLACK * max(numbers, default=0.0))
