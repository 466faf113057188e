"""What enters the parts of a block, recorded while its calibration inputs go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from torch import Tensor, nn

from quantize.block.block import Block


class _AttentionInputs(nn.Module):
    """Stands in for a block's `kv`: keeps what reaches attention, after RoPE."""

    seen: tuple[Tensor, Tensor, Tensor, Tensor | None, float]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        self.seen = (query, key, value, mask, scaling)
        raise _Stop


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the wanted input was seen."""


def inputs_of(
    block: Block,
    names: Sequence[str],
    module: nn.Module | None = None,
    stream: Iterable[Tensor] | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the inputs [B·T, K] of the named submodules, batch by batch, in float32.

    Names in the order in which the block runs them; a pass stops as soon as the last one's input is
    known.
    module: a copy of the layer that runs instead; stream: hidden states [B, T, D] instead of the
    block's inputs.
    """
    module = module or block.module
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]
            if name == names[-1]:
                raise _Stop

        return record

    handles = [
        module.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names
    ]
    try:
        for hidden in block.inputs if stream is None else stream:
            with suppress(_Stop):
                block.forward(module, hidden.to(block.device))
            # Given away: whoever looks at one batch must not hold it while the next is computed.
            yield tuple(seen.pop(name).flatten(0, -2).float() for name in names)
    finally:
        for handle in handles:
            handle.remove()


def attention_inputs(
    block: Block, tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, float]]:
    """Yield (queries, keys, values, mask, scaling) as they reach attention, batch by batch until
    `tokens` are seen.

    Queries [B, H, T, d], keys and values [B, Hkv, T, d], after RoPE.
    """
    recorder = _AttentionInputs()
    attention = block.module.get_submodule(block.arch.attention)
    attention.kv = recorder
    try:
        for batch in block.inputs:
            hidden = batch[: max(1, tokens // batch.shape[1])]
            with suppress(_Stop):
                block.forward(block.module, hidden.to(block.device))
            yield recorder.seen
            tokens -= hidden.shape[0] * hidden.shape[1]
            if tokens <= 0:
                break
    finally:
        del attention.kv
