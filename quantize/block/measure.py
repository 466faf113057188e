"""Measuring second moments on a block: which inputs, whose tokens, and what is measured along."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.moments import Moments, Sums
from quantize.block.passes import HeldPasses
from quantize.block.post_norm import PostNorm
from quantize.block.token_weights import TokenWeights, weights_of
from quantize.cost.footprint import FEWEST_WINDOWS, KEPT_TOKENS, LONGEST_KEPT, ROUTED_BYTES
from quantize.errors import ModelError


def moments_of(
    block: Block,
    name: str,
    fp8_activations: bool,
    with_parent: bool = False,
    source: str | None = None,
    tokens: int | None = None,
    token_weights: TokenWeights = "equal",
) -> Moments:
    """Second moments of the inputs of `name`; FP8-rounded where the layer will round its
    activations.

    with_parent: also the moments against the parent (`freeze_layer` must have been called),
    but for the FFN of a block with experts: the parent's tokens may go to others, or through a
    dense FFN.
    source: the norm before the linear, where it is about to be changed: passes then wait before it
    (`HeldPasses.outputs`). tokens: as many as are looked at, about; None: all. Routed experts see
    few of them and always take all, each the same. token_weights: how much each token counts.
    A routed expert that no token visits has moments of zero; ModelError for any other linear
    without tokens.
    """
    found = _moments(block, name, fp8_activations, with_parent, source, tokens, token_weights)
    if block.parking:
        block.parking.away(block.module, block.frozen, block.parent)
    return found


def _moments(
    block: Block,
    name: str,
    fp8_activations: bool,
    with_parent: bool,
    source: str | None,
    tokens: int | None,
    token_weights: TokenWeights,
) -> Moments:
    if block.arch.is_routed(name) and not waits_for_experts(block):
        if name not in block.waiting or block.waiting_fp8 != fp8_activations:
            sums = routed_sums(block, name, fp8_activations)
            block.waiting = {inside: _mean(block, inside, total) for inside, total in sums.items()}
            block.waiting_fp8 = fp8_activations
        return block.waiting.pop(name)
    with_parent = with_parent and block.arch.expert_of(name) is None
    if block.arch.is_routed(name):
        tokens, token_weights = None, "equal"
    total = sums_of(block, name, fp8_activations, with_parent, source, tokens, token_weights)
    return _mean(block, name, total)


def waits_for_experts(block: Block) -> bool:
    """Whether passes wait for one routed expert after the other: not where ranks share experts out,
    nor where a pass that finds no room would be run from the start for each."""
    return block.ranks.size == 1 and len(block.inputs) <= block.holds


def _mean(block: Block, name: str, sums: Sums) -> Moments:
    if sums.dropped:
        before = block.report.get(name, {}).get("dropped_tokens", 0)
        block.note(name, dropped_tokens=before + sums.dropped)
    if not sums.totals or (not sums.tokens and not block.arch.is_routed(name)):
        full = block.full_name(name)
        raise ModelError(f"{full}: no finite calibration inputs; try --dtype float32")
    return sums.mean()


def sums_of(
    block: Block,
    name: str,
    fp8_activations: bool,
    with_parent: bool,
    source: str | None = None,
    tokens: int | None = None,
    token_weights: TokenWeights = "equal",
) -> Sums:
    """Run the first batches that hold so many tokens, or all, up to the linear `name`; with_parent:
    the parent's too, through `block.frozen`."""
    residual = block.arch.residual.get(name) if with_parent else None
    norm = _post_norm(block, name) if residual is not None else None
    if norm is None and name in block.arch.post_norms:
        residual = None
    names = (name,) if residual is None else (residual, name)
    sums = Sums(fp8_activations, block.ranks)
    batches = _first(block.inputs, tokens)
    parent: Iterator[tuple[Tensor, ...] | None] = itertools.repeat(None)
    if with_parent:
        theirs_of = _entering if residual is None else _leaving
        stream = block.parent_stream
        block.parent_passes.go_ahead(_own_batches(block, stream, batches), name)
        parent = theirs_of(block.parent_passes, names, _own_batches(block, stream, batches))
    rounds = block.ranks.rounds(batches)
    kept = _kept(block.inputs[:batches]) if with_parent else {}
    own = _entering(block.passes, names, _own_batches(block, block.inputs, batches), source)
    for (batch, present), ours, theirs in zip(rounds, own, parent, strict=False):
        weights = weights_of(block, batch, token_weights)
        if norm is not None and theirs is not None:
            ours, theirs, weights = _through(norm, ours, theirs, weights)
        sums.add(ours, theirs, present, weights, (batch, kept.get(batch, 0)))
        del ours, theirs  # before the next pass, which takes most
    if with_parent:
        block.look_ahead(name, _own_batches(block, block.parent_stream, batches))
    _complete(block, (sums,))
    return sums


def _post_norm(block: Block, name: str) -> PostNorm | None:
    """The norm that the outputs of a linear of `residual` go through in the parent; None where they
    are added as they are, or the norm is of another kind."""
    norm = block.arch.post_norms.get(name)
    if norm is None:
        return None
    layer = block.frozen or block.module
    return PostNorm.of(layer.get_submodule(norm), block.linear(name).out_features)


def _through(
    norm: PostNorm, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], weights: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """(r̂, x̂), (r, y) and weights [M] for a linear whose outputs y go through a norm: r − r̂ as it must
    be before the norm, and errors counted in the size of y, which is what the norm makes of them."""
    (r_ours, x), (r, y) = ours, theirs
    sizes = norm.sizes(y)
    share = sizes.squeeze(1) ** -2
    share = share if weights is None else share * weights
    share = torch.where(share.isfinite(), share, 0)
    share = share / share.mean().clamp_min(1e-30)
    return (r_ours, x), (r_ours + norm.before(r - r_ours, sizes), y), share


def _entering(
    passes: HeldPasses,
    names: tuple[str, ...],
    stream: Iterable[Tensor],
    source: str | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """The inputs [B·T, K] of the named modules, batch by batch, in float32."""
    for hidden in stream:
        found = (
            passes.inputs(hidden, names)
            if source is None
            else (passes.outputs(hidden, source, names[-1]),)
        )
        yield tuple(x.flatten(0, -2).float() for x in found)


def _leaving(
    passes: HeldPasses, names: tuple[str, ...], stream: Iterable[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """The inputs [B·T, N] of all named modules but the last, and what that linear makes of its
    own without its bias, batch by batch, in float32."""
    linear = passes.layer.get_submodule(names[-1])
    assert isinstance(linear, nn.Linear)
    bias = linear.bias
    for hidden in stream:
        *before, made = (x.flatten(0, -2).float() for x in passes.results(hidden, names))
        yield (*before, made if bias is None else made - bias.float())


def routed_sums(block: Block, name: str, fp8_activations: bool) -> dict[str, Sums]:
    """Sums of the linear `name` of an expert and, from the same pass, that of as many experts
    behind it as fit.

    A real model has dozens of experts, and none changes what another one sees. Encoded linears are
    left out.
    """
    inside = name.rpartition(".")[2]
    experts = [n for n in block.arch.roles if block.arch.is_routed(n) and n.endswith(f".{inside}")]
    behind = [n for n in experts[experts.index(name) :] if n == name or n not in block.packed]
    inputs = block.module.get_submodule(name).get_parameter("weight").shape[1]
    fitting = max(1, ROUTED_BYTES // (4 * inputs**2))
    sums = {n: Sums(fp8_activations, block.ranks) for n in behind[:fitting]}
    batches = len(block.inputs)
    rounds = block.ranks.rounds(batches)
    entering = inputs_of(block, tuple(sums), stream=_own_batches(block, block.inputs, batches))
    for (_, present), seen in zip(rounds, entering, strict=True):
        for total, x in zip(sums.values(), seen, strict=True):
            total.add((x,), present=present)
    _complete(block, sums.values())
    return sums


def _first(stream: Sequence[Tensor], tokens: int | None) -> int:
    """How many batches [B, T, D] of a stream hold so many tokens; None: all there are."""
    if tokens is None:
        return len(stream)
    sizes = itertools.accumulate(batch.shape[0] * batch.shape[1] for batch in stream)
    return next((count for count, seen in enumerate(sizes, 1) if seen >= tokens), len(stream))


def _kept(stream: Sequence[Tensor]) -> dict[int, int]:
    """How many of the first tokens of which batches [B, T, D] are kept by themselves: whole windows but for
    very long ones, since tokens of one window err alike, from batches spread over the text."""
    windows = sum(len(batch) for batch in stream)
    if windows < FEWEST_WINDOWS:
        return {}
    count = max(1, min(KEPT_TOKENS // stream[0].shape[1], windows // FEWEST_WINDOWS))
    chosen = min(count, len(stream))
    places = {(2 * i + 1) * len(stream) // (2 * chosen) for i in range(chosen)}
    whole = -(-count // chosen)
    return {i: min(min(whole, len(stream[i])) * stream[i].shape[1], LONGEST_KEPT) for i in places}


def _own_batches(block: Block, stream: Sequence[Tensor], batches: int) -> Iterator[Tensor]:
    """Those of the first batches of a stream that this rank runs."""
    return (stream[batch] for batch, _ in block.ranks.rounds(batches))


def _complete(block: Block, sums: Collection[Sums]) -> None:
    counts = block.ranks.gather([[one.tokens, one.dropped] for one in sums])
    for one, found in zip(sums, zip(*counts, strict=True), strict=True):
        tokens, dropped = (sum(column) for column in zip(*found, strict=True))
        one.complete(tokens, dropped)
