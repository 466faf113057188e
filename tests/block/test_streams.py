from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.streams import Streams
from quantize.errors import ModelError
from quantize.parallel.ranks import ALONE


def block(forward: Callable[[Any, Tensor], Tensor], reference: Any = None, parent: Any = None) -> Any:
    return SimpleNamespace(forward=forward, module="ours", reference=reference, parent=parent, index=3, ranks=ALONE)


@pytest.mark.parametrize("kept", [{"reference": "parent's"}, {"parent": "parent's", "reference": "restructured"}])
def test_both_streams_advance_through_their_own_layer(kept: dict[str, str]) -> None:
    streams = Streams([torch.ones(2, 3, 4), torch.ones(1, 3, 4)], [torch.ones(2, 3, 4), torch.ones(1, 3, 4)])
    factors = {"ours": 2, "parent's": 3, "restructured": 5}
    streams.advance(block(lambda module, hidden: hidden * factors[module], **kept))
    assert [float(h.mean()) for h in streams.quantized] == [2, 2]
    assert streams.reference is not None
    assert [float(h.mean()) for h in streams.reference] == [3, 3]


@pytest.mark.parametrize("spoiled", ["ours", "parent's"])
def test_a_sequence_that_overflows_leaves_both_streams(spoiled: str) -> None:
    def forward(module: str, hidden: Tensor) -> Tensor:
        out = hidden.clone()
        if module == spoiled:
            out[hidden[:, 0, 0] == 7, 1, 2] = torch.inf
        return out

    first = torch.zeros(3, 2, 4)
    first[1] = 7
    streams = Streams([first, torch.full((1, 2, 4), 7.0)], [first.clone(), torch.full((1, 2, 4), 7.0)])
    streams.advance(block(forward, reference="parent's"))
    assert streams.dropped == 2
    assert [h.shape[0] for h in streams.quantized] == [2]  # the batch that lost its only sequence is gone
    assert streams.reference is not None
    assert [h.shape[0] for h in streams.reference] == [2]


def test_no_finite_sequence_is_an_error_that_names_the_block() -> None:
    streams = Streams([torch.ones(2, 2, 4)], None)
    with pytest.raises(ModelError, match=r"block 3: .*float32"):
        streams.advance(block(lambda _, hidden: hidden * torch.nan))


def test_tokens_that_overflow_are_left_out_of_the_moments(make_block: Callable[..., Block]) -> None:
    clean, spoiled = make_block("llama"), make_block("llama")
    name = "self_attn.q_proj"
    norm = spoiled.module.get_submodule("input_layernorm")

    def overflow(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0] = torch.nan
        return out

    norm.register_forward_hook(overflow)
    tokens = sum(h.shape[0] * h.shape[1] for h in clean.inputs)
    hessian = spoiled.moments(name, False).hessian
    assert torch.isfinite(hessian).all()
    assert spoiled.report[name]["dropped_tokens"] == sum(h.shape[0] for h in clean.inputs)
    kept = torch.cat(
        [x.view(h.shape)[:, 1:].flatten(0, 1) for (x,), h in zip(clean.inputs_of((name,)), clean.inputs, strict=True)]
    )
    assert len(kept) < tokens
    torch.testing.assert_close(hessian, kept.T @ kept / len(kept), rtol=1e-4, atol=1e-6)
