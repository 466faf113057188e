"""Passes that stand still on the way through a block: what they give, how often they compute, when they are given
up."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from quantize.block.block import Block
from quantize.block.measure import moments_of
from quantize.block.passes import HeldPasses, _Held
from quantize.block.teacher import freeze_layer
from quantize.methods import Stage
from quantize.methods.awq import Awq
from quantize.methods.fireq.attention import FireqAttention
from quantize.methods.fireq.stage import Fireq
from quantize.methods.gptq import Gptq
from quantize.methods.rotate import Rotate
from quantize.methods.sbvr.stage import Sbvr

BlockMaker = Callable[..., Block]
RECIPES: dict[str, list[Stage]] = {
    "gptq": [Gptq(group_size=64)],
    "fireq": [
        Awq(weight_exponents=(1.0,), group_size=64),
        FireqAttention(group_size=32),
        Fireq(sweeps=1),
    ],
    "rotated": [Rotate(seed=3), Fireq(sweeps=1, aim="layer")],
    "sbvr": [Sbvr(bits=2, lines=8, sweeps=1)],
}


@torch.no_grad()
def after(block: Block, stages: list[Stage]) -> list[Tensor]:
    """What the block holds after the stages, then what its streams become."""
    for stage in stages:
        stage.apply(block)
    out = [
        tensor
        for name in block.packed
        for _, tensor in sorted(block.packed[name].tensors().items())
    ]
    out += [p for _, p in sorted(block.module.named_parameters())]
    out += [block.passes.finish(hidden) for hidden in block.inputs]
    out += [block.parent_passes.finish(hidden) for hidden in block.parent_inputs or []]
    return out


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as passes of the parent need to go on beside the block's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# What is held is of the walker, not of the method: experts, which take longest, with two of them in `make test`.
@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [
        pytest.param(model_type, recipe, marks=[pytest.mark.slow] if seldom else [])
        for model_type in ("llama", "gemma3_text", "qwen2_moe")
        for recipe in RECIPES
        for seldom in [model_type == "qwen2_moe" and recipe in ("rotated", "sbvr")]
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_what_is_encoded_does_not_depend_on_them(
    make_block: BlockMaker, model_type: str, recipe: str
):
    """None, some or all passes stand still, and those of the parent go on beside the others."""
    if recipe == "rotated" and model_type == "gemma3_text":
        pytest.skip("its norms stand behind the linears: nothing to rotate over")
    found = []
    for most in (0, 2, 100):
        block = make_block(model_type, with_parent=True)
        block.holds = most
        found.append(after(block, RECIPES[recipe]))
    for plain, *held in zip(*found, strict=True):
        assert all(torch.equal(plain, other) for other in held)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_encode_stage_runs_each_module_once_a_batch(
    make_block: BlockMaker, model_type: str, threads: int, two_threads: None
):
    torch.set_num_threads(threads)
    block = make_block(model_type, with_parent=True)
    block.holds = len(block.inputs)
    calls: Counter[str] = Counter()
    count = register_module_forward_hook(lambda m, args, out: calls.update([type(m).__name__]))
    try:
        after(block, [Fireq(sweeps=1)])
    finally:
        count.remove()
    attention = type(block.module.self_attn).__name__
    norm = type(block.module.post_attention_layernorm).__name__
    # The block's own pass and the parent's; there are two norms, and one stands before the attention whose
    # probabilities weigh the tokens.
    assert calls[attention] == 2 * len(block.inputs)
    assert calls[norm] == (2 * 2 + 1) * len(block.inputs)


def test_without_room_a_pass_begins_again(make_block: BlockMaker):
    block, runs = make_block("llama"), []
    forward = block.forward
    block.forward = lambda module, hidden: (runs.append(1), forward(module, hidden))[1]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
        moments_of(block, name, False)
    assert len(block.passes) == 0
    assert len(runs) == 3 * len(block.inputs)


def test_a_changed_module_is_not_passed_twice(make_block: BlockMaker):
    block = make_block("llama")
    block.holds = 100
    moments_of(block, "self_attn.o_proj", False)
    assert len(block.passes) == len(block.inputs)
    block.forget_moments("self_attn.o_proj")  # which the passes stand before
    block.forget_moments("mlp.up_proj")
    assert len(block.passes) == len(block.inputs)
    block.forget_moments("self_attn.v_proj")
    assert len(block.passes) == 0
    moments_of(block, "self_attn.o_proj", False)
    block.fold(block.arch.edge("attn_norm"), torch.full((block.shape.hidden,), 2.0))
    assert len(block.passes) == 0


def test_an_earlier_module_is_reached_from_the_start(make_block: BlockMaker):
    block = make_block("llama")
    block.holds = 100
    first = moments_of(block, "self_attn.q_proj", False).hessian
    moments_of(block, "mlp.down_proj", False)
    assert torch.equal(moments_of(block, "self_attn.q_proj", False).hessian, first)


def test_a_norm_may_change_under_passes_that_wait_before_it(make_block: BlockMaker):
    block = make_block("llama")
    block.holds = 100
    edge = next(edge for edge in block.edges if edge.source == "post_attention_layernorm")
    plain = moments_of(block, edge.sinks[0], False)
    block.forget_moments()
    held = moments_of(block, edge.sinks[0], False, source=edge.source)
    assert torch.equal(held.hessian, plain.hessian)
    scale = torch.rand(block.shape.hidden) + 0.5
    block.fold(edge, scale)
    assert len(block.passes) == len(block.inputs) - 1  # the first one told that this can be done
    moved = moments_of(block, edge.sinks[0], False)
    torch.testing.assert_close(moved.absmean, held.absmean / scale, rtol=1e-2, atol=0)


def test_a_copy_of_a_layer_is_not_held(make_block: BlockMaker):
    block = make_block("llama", with_parent=True)
    block.holds = 100
    moments_of(block, "self_attn.o_proj", False)
    freeze_layer(block)
    assert block.frozen is not None
    for module in (*block.frozen.modules(), *block.module.modules()):
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
    hidden = block.inputs[0]
    assert torch.equal(block.forward(block.frozen, hidden), block.passes.finish(hidden))


def test_passes_end_with_their_block(make_block: BlockMaker):
    block = make_block("llama")
    block.holds = 100
    (entering,) = block.passes.inputs(block.inputs[0], ["mlp.down_proj"])
    seen = weakref.ref(entering)
    del entering
    gc.disable()
    try:
        before = seen() is not None
        del block
        after = seen() is not None
    finally:
        gc.enable()
    assert (before, after) == (True, False)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.breaks:
            raise ZeroDivisionError("in the layer")
        return self.second(x)


def test_a_pass_goes_on_where_the_collector_ends_another(monkeypatch: pytest.MonkeyPatch):
    """What stands still is part of a cycle, which the collector may find at any time."""

    class Collecting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            gc.collect()
            return super().forward(x)

    def forward(layer: nn.Module, hidden: Tensor) -> Tensor:
        out: Tensor = layer(hidden)
        return out

    ended_in: list[object] = []
    stop = _Held.stop

    def watched(held: _Held) -> None:
        ended_in.append(getcurrent())
        stop(held)

    monkeypatch.setattr(_Held, "stop", watched)
    left = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layer, hidden = nn.Sequential(Collecting(4, 4), nn.Linear(4, 4)), torch.randn(1, 2, 4)
    gc.disable()
    try:
        waiting = HeldPasses(forward, left, (), 9)
        waiting.inputs(torch.randn(1, 2, 4), ("1",))
        cycle: list[object] = [waiting]
        cycle.append(cycle)
        del waiting, cycle
        (entering,) = HeldPasses(forward, layer, (), 9).inputs(hidden, ("1",))
    finally:
        gc.enable()
    assert ended_in[0] is not getcurrent()  # in the midst of the other pass
    assert torch.equal(entering, nn.functional.linear(hidden, layer[0].weight, layer[0].bias))


LEFT_STANDING = """
import torch
from torch import nn
from quantize.block.passes import HeldPasses

def main():
    passes = HeldPasses(lambda layer, x: layer(x), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (), 9)
    passes.inputs(torch.randn(1, 2, 4), ("1",))
    raise ZeroDivisionError("of the script's own")

main()
"""


def test_an_error_that_ends_a_process_is_the_last_thing_it_says():
    command = [sys.executable, "-c", LEFT_STANDING]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("ZeroDivisionError: of the script's own\n")


def test_an_error_in_a_layer_is_raised_and_leaves_nothing():
    layer = Breaks()
    passes = HeldPasses(lambda module, x: module(x), layer, (), 9)
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    passes.inputs(x, ["first"])
    layer.breaks = True
    with pytest.raises(ZeroDivisionError, match="in the layer"):
        passes.inputs(x, ["second"])
    assert len(passes) == 0
    assert "forward" not in vars(layer.second)
    layer.breaks = False
    torch.testing.assert_close(passes.inputs(y, ["second"])[0], layer.first(y))
    assert copy.deepcopy(layer)(y).shape == y.shape


def test_a_module_that_a_layer_does_not_run_is_named():
    layer = Breaks()
    layer.spare = nn.Linear(4, 4)
    passes = HeldPasses(lambda module, x: module(x), layer, (), 9)
    with pytest.raises(KeyError, match="spare"):
        passes.inputs(torch.randn(2, 3, 4), ["spare"])


class Steps(nn.Module):
    """Four linears in a row, of which the third one can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.threads: list[threading.Thread] = []
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.threads.append(threading.current_thread())
        for place, step in enumerate(self.steps):
            if place == 2 and self.fails:
                raise ZeroDivisionError("in the layer")
            x = step(x)
        return x

    def before(self, x: Tensor, place: int) -> Tensor:
        """What enters a step."""
        for step in list(self.steps)[:place]:
            x = nn.functional.linear(x, step.weight, step.bias)
        return x


@pytest.fixture
def layer() -> Steps:
    return Steps().requires_grad_(False)


def beside(layer: Steps, most: int = 9) -> HeldPasses:
    return HeldPasses(lambda module, x: module(x), layer, ("steps.1",), most, threads=1)


def test_passes_go_ahead_in_a_thread_of_their_own(layer: Steps):
    passes, stream = beside(layer), [torch.randn(2, 3, 4) for _ in range(5)]
    for place, behind in ((1, "steps.3"), (3, None)):
        passes.go_ahead(stream, f"steps.{place}")
        for x in stream:
            (found,) = passes.inputs(x, [f"steps.{place}"])
            torch.testing.assert_close(found, layer.before(x, place))
        passes.go_ahead(stream, behind)
    for x in stream:
        torch.testing.assert_close(passes.finish(x), layer.before(x, 4))
    assert len(passes) == 0
    assert len(layer.threads) == len(stream)  # none began twice
    assert {*layer.threads} != {threading.current_thread()}
    assert len({*layer.threads}) == 1
    assert not any("forward" in vars(step) for step in layer.steps)


def test_a_module_that_a_pass_is_on_its_way_to_is_the_same_for_others(layer: Steps):
    """Its `forward` is another one while the pass goes on: to that pass alone."""
    passes, stream = beside(layer), [torch.randn(2, 3, 4) for _ in range(2)]
    entered, go_on = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            go_on.wait(20)

    passes.go_ahead(stream[:1], "steps.1")
    passes.settle()
    layer.steps[0].register_forward_pre_hook(wait)
    passes.go_ahead(stream[1:], "steps.1")
    assert entered.wait(20)
    try:
        (made,) = passes.results(stream[0], ["steps.1"])
    finally:
        go_on.set()
    torch.testing.assert_close(made, layer.before(stream[0], 2))
    torch.testing.assert_close(passes.inputs(stream[1], ["steps.1"])[0], layer.before(stream[1], 1))


def test_passes_without_room_run_here(layer: Steps):
    passes, stream = beside(layer, most=2), [torch.randn(2, 3, 4) for _ in range(4)]
    passes.go_ahead(stream, "steps.2")
    for x in stream:
        torch.testing.assert_close(passes.inputs(x, ["steps.2"])[0], layer.before(x, 2))
    assert len(passes) == 2
    assert [one is threading.current_thread() for one in layer.threads] == [False] * 2 + [True] * 2
    for x in stream:
        torch.testing.assert_close(passes.finish(x), layer.before(x, 4))


def test_an_error_beside_is_raised_where_something_is_asked(layer: Steps):
    passes, x = beside(layer), torch.randn(2, 3, 4)
    passes.inputs(x, ["steps.1"])
    layer.fails = True
    passes.go_ahead([x], "steps.3")
    passes.settle()
    with pytest.raises(ZeroDivisionError, match="in the layer"):
        passes.inputs(x, ["steps.3"])
    assert len(passes) == 0
    layer.fails = False
    torch.testing.assert_close(passes.inputs(x, ["steps.3"])[0], layer.before(x, 3))


def test_a_change_of_the_layer_waits_for_passes_that_go_ahead(layer: Steps):
    passes, x = beside(layer), torch.randn(2, 3, 4)
    passes.go_ahead([x], "steps.3")
    passes.changed(["steps.1"])
    assert len(passes) == 0
    layer.steps[1].weight.mul_(2)
    torch.testing.assert_close(passes.inputs(x, ["steps.3"])[0], layer.before(x, 3))


def test_what_stands_beside_ends_with_the_passes(layer: Steps):
    passes, x = beside(layer), torch.randn(2, 3, 4)
    seen = weakref.ref(passes.inputs(x, ["steps.2"])[0])
    gc.disable()
    try:
        before = seen() is not None
        del passes
        layer.threads.pop().join(20)
        after = seen() is not None
    finally:
        gc.enable()
    assert (before, after) == (True, False)


def test_a_process_may_end_while_passes_go_ahead():
    script = LEFT_STANDING.replace(", (), 9)", ", (), 9, threads=1)")
    assert script != LEFT_STANDING
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr.endswith("ZeroDivisionError: of the script's own\n")
    assert done.returncode == 1


def test_the_collector_may_end_passes_in_another_thread(
    layer: Steps, recwarn: pytest.WarningsRecorder
):
    """Theirs is this one: what stands there is left to it."""
    passes = HeldPasses(lambda module, x: module(x), layer, (), 9)
    x = torch.randn(2, 3, 4)
    passes.inputs(x, ["steps.1"])
    collected = threading.Thread(target=passes._standing.pop(id(x)).stop)
    collected.start()
    collected.join(20)
    assert not recwarn.list
    torch.testing.assert_close(passes.inputs(x, ["steps.2"])[0], layer.before(x, 2))
