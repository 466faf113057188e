"""The walk through blocks: what streams go on through, what leaves them, and how many blocks are
there at once."""

from __future__ import annotations

import ast
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantize
from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.measure import moments_of
from quantize.block.standin import stand_in
from quantize.block.teacher import teacher_of
from quantize.block.walk import Pass, Streams, walk
from quantize.errors import ModelError

BlockMaker = Callable[..., Block]


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden * factor


def spoil(hidden: Tensor) -> Tensor:
    """Overflow in windows that begin with a seven."""
    out = hidden.clone()
    out[hidden[:, 0, 0] == 7, 1, 2] = torch.inf
    return out


def means(streams: Streams[Any]) -> dict[Any, list[float]]:
    return {
        name: [float(hidden.mean()) for hidden in batches]
        for name, batches in streams.batches.items()
    }


def test_every_stream_goes_on_through_its_own_layer():
    batches = [torch.ones(2, 3, 4), torch.ones(1, 3, 4)]
    streams = Streams({"ours": list(batches), "parent's": list(batches)})
    held = streams.batches["ours"]
    streams.advance(3, {"ours": ("ours", times(2)), "parent's": ("parent's", times(3))})
    assert means(streams) == {"ours": [2, 2], "parent's": [3, 3]}
    assert streams.batches["ours"] is held  # which may be a file


@pytest.mark.parametrize("kept", [("frozen",), ("parent",), ("parent", "frozen")])
def test_the_teacher_is_the_oldest_copy(make_block: BlockMaker, kept: tuple[str, ...]):
    block = make_block("llama")
    assert teacher_of(block) is block.module
    for name in kept:
        setattr(block, name, nn.Identity())
    assert teacher_of(block) is getattr(block, kept[0])


def test_streams_part_and_end():
    streams = Streams({"root": [torch.ones(2, 3, 4)], "other": [torch.ones(2, 3, 4) * 5]})
    streams.advance(
        0, {"left": ("root", times(2)), "right": ("root", times(3)), "root": ("other", times(1))}
    )
    assert means(streams) == {"left": [2], "right": [3], "root": [5]}
    streams.advance(1, {"left": ("right", times(10))})
    assert means(streams) == {"left": [30]}


@pytest.mark.parametrize("spoiled", ["ours", "parent's"])
def test_a_window_that_overflows_leaves_all_streams(spoiled: str, caplog: pytest.LogCaptureFixture):
    first = torch.zeros(3, 2, 4)
    first[1] = 7
    streams = Streams(
        {name: [first.clone(), torch.full((1, 2, 4), 7.0)] for name in ("ours", "parent's")},
    )
    streams.advance(
        3, {name: (name, spoil if name == spoiled else times(1)) for name in streams.batches}
    )
    assert streams.dropped == 2
    # The batch that lost its only window is gone.
    assert {name: [h.shape[0] for h in hidden] for name, hidden in streams.batches.items()} == {
        "ours": [2],
        "parent's": [2],
    }
    assert "block 3: 2 sequences became non-finite" in caplog.text


def test_windows_stay_where_overflow_is_what_is_measured():
    streams = Streams({"hidden": [torch.full((2, 2, 4), 7.0)]}, drops=False)
    streams.advance(0, {"hidden": ("hidden", spoil)})
    assert streams.batches["hidden"][0].shape[0] == 2
    assert streams.dropped == 0


def test_no_finite_window_is_an_error_that_names_the_block():
    streams = Streams({"hidden": [torch.ones(2, 2, 4)]})
    with pytest.raises(ModelError, match=r"block 3: .*float32"):
        streams.advance(3, {"hidden": ("hidden", times(torch.nan))})


def test_blocks_are_opened_visited_passed_and_left_one_at_a_time():
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    seen: list[tuple[str, int, float]] = []
    streams = Streams({"hidden": [torch.ones(1, 2, 4)]})

    def note(what: str, index: int) -> None:
        seen.append((what, index, float(streams.batches["hidden"][0].mean())))

    def open_block(index: int) -> nn.Module:
        gc.collect()
        assert not alive, "two blocks in memory"
        block = nn.Module()
        block.index = index  # type: ignore[assignment]
        alive.add(block)
        note("open", index)
        return block

    def visit(block: Any) -> Any:
        note("visit", block.index)
        assert not torch.is_grad_enabled()
        return {"hidden": ("hidden", times(2))} if block.index < 2 else None

    walk(streams, range(3), open_block, visit, lambda block: note("leave", block.index))  # type: ignore[arg-type]
    assert seen == [
        *(("open", 0, 1), ("visit", 0, 1), ("leave", 0, 2)),
        *(("open", 1, 2), ("visit", 1, 2), ("leave", 1, 4)),
        *(("open", 2, 4), ("visit", 2, 4), ("leave", 2, 4)),
    ]


def test_a_walk_without_hidden_states():
    seen: list[int] = []
    walk(
        None,
        [4, 2],
        lambda index: index,
        lambda index: seen.append(index),
        lambda index: seen.append(-index),
    )
    assert seen == [4, -4, 2, -2]


def test_a_pass_brings_back_what_was_put_away(make_block: BlockMaker):
    block = make_block("llama")
    assert isinstance(block.forward, Pass)
    back: list[nn.Module] = []

    class Parking:
        def back(self, module: nn.Module) -> None:
            back.append(module)

    expected = block.forward(block.module, block.inputs[0])
    parked = Pass(block.forward.skeleton, 0, Parking())  # type: ignore[arg-type]
    assert torch.equal(parked(block.module, block.inputs[0]), expected)
    assert back == [block.module]


def test_only_a_pass_sends_hidden_states_through_a_layer():
    root = Path(quantize.__file__).parent
    users = []
    for path in sorted(root.rglob("*.py")):
        calls = [
            node.func
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        ]
        if any(ast.unparse(call).endswith("skeleton.forward") for call in calls):
            users.append(path.relative_to(root).as_posix())
    assert users == ["block/walk.py"]


def test_a_stand_in_leaves_when_it_fails(make_block: BlockMaker):
    block = make_block("llama")
    own, plain = block.module.get_submodule("mlp"), block.forward(block.module, block.inputs[0])
    with stand_in(block.module, {"mlp": nn.Identity(), "self_attn.q_proj": nn.Identity()}):
        assert isinstance(block.module.get_submodule("self_attn.q_proj"), nn.Identity)
    with stand_in(block.module, {"mlp": nn.Identity()}):
        assert not torch.equal(block.forward(block.module, block.inputs[0]), plain)
    with pytest.raises(ZeroDivisionError), stand_in(block.module, {"mlp": nn.Identity()}):
        raise ZeroDivisionError
    with (
        pytest.raises(AttributeError),
        stand_in(block.module, {"mlp": nn.Identity(), "absent": nn.Identity()}),
    ):
        pass
    with stand_in(block.module, {}):
        assert torch.equal(block.forward(block.module, block.inputs[0]), plain)
    assert block.module.get_submodule("mlp") is own


def test_a_stand_in_sees_what_the_linear_sees(make_block: BlockMaker):
    block = make_block("llama")
    block.rotate_inputs("mlp.down_proj")
    own = block.linear("mlp.down_proj")
    with torch.no_grad():
        plain = block.forward(block.module, block.inputs[0])
        trial = nn.Linear(own.in_features, own.out_features, bias=False)
        trial.weight.copy_(own.weight)
        for _ in range(2):  # and does not rotate twice where it stands in again
            with stand_in(block.module, {"mlp.down_proj": trial}):
                assert torch.equal(block.forward(block.module, block.inputs[0]), plain)


def test_tokens_that_overflow_are_left_out_of_the_moments(make_block: BlockMaker) -> None:
    clean, spoiled = make_block("llama"), make_block("llama")
    name = "self_attn.q_proj"
    norm = spoiled.module.get_submodule("input_layernorm")

    def overflow(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0] = torch.nan
        return out

    norm.register_forward_hook(overflow)
    tokens = sum(h.shape[0] * h.shape[1] for h in clean.inputs)
    hessian = moments_of(spoiled, name, False).hessian
    assert torch.isfinite(hessian).all()
    assert spoiled.report[name]["dropped_tokens"] == sum(h.shape[0] for h in clean.inputs)
    kept = torch.cat(
        [
            x.view(h.shape)[:, 1:].flatten(0, 1)
            for (x,), h in zip(inputs_of(clean, (name,)), clean.inputs, strict=True)
        ]
    )
    assert len(kept) < tokens
    torch.testing.assert_close(hessian, kept.T @ kept / len(kept), rtol=1e-4, atol=1e-6)
