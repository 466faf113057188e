from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import row_of
from rows import ARCHITECTURES, architecture_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.measure import moments_of
from quantize.block.teacher import freeze_layer
from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.fp8 import quantize_activations
from quantize.model.arch import Shape
from quantize.model.linear import PackedLinear
from quantize.model.skeleton import Skeleton
from quantize.solvers.grid import Grid
from quantize.solvers.products import gram

CPU = torch.device("cpu")
BlockMaker = Callable[..., Block]
EDGES = [(name, edge.name) for name in ARCHITECTURES for edge in row_of(name).edges]
GROUPED = [(name, group[0]) for name in ARCHITECTURES for group in row_of(name).calibration_order]


def outputs(block: Block) -> Tensor:
    with torch.no_grad():
        return torch.cat([block.forward(block.module, x) for x in block.inputs])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def encode_nearest(block: Block, name: str, bits: int = 4, fp8: bool = False) -> None:
    grid, weight = Grid(bits, 64), block.linear(name).weight
    scale, factor = grid.absmax_scale(weight)
    block.encode(name, grid.pack(grid.round(weight, scale, factor)[0], scale), fp8)


# Replaying the model


def walk(folder: Path, tokens: Tensor) -> list[Tensor]:
    """Hidden states before each block and after the last, block by block."""
    source = Checkpoint(folder)
    arch, shape = architecture_of(source.config), Shape.of(source.config)
    skeleton = Skeleton(folder, CPU, torch.float32)
    states = [skeleton.embed(source.tensors(""), tokens)]
    for i in range(shape.n_blocks):
        layer = skeleton.layer(i, source.tensors(f"{arch.blocks}.{i}."))
        states.append(skeleton.forward(i, layer, states[-1]))
    return states


@pytest.mark.parametrize("length", [24, 5])
def test_walking_the_blocks_is_running_the_model(
    tiny: Callable[..., Path], model_type: str, length: int
):
    tokens = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tiny(model_type), dtype=torch.float32).eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    states = walk(tiny(model_type), tokens)
    assert len(states) == len(seen) == 3
    for ours, theirs in zip(states, seen, strict=True):
        assert difference(ours, theirs) < 1e-6


def test_the_sliding_window_is_replayed(tiny: Callable[..., Path]):
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    windowed, full = (
        walk(tiny("mistral"), tokens),
        walk(tiny("mistral", sliding_window=None), tokens),
    )
    assert torch.equal(windowed[0], full[0])
    assert difference(windowed[1][:, :8], full[1][:, :8]) < 1e-6
    assert difference(windowed[1][:, 8:], full[1][:, 8:]) > 1e-3


def test_layers_of_different_kinds_get_their_own_masks(tiny: Callable[..., Path]):
    sizes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    mixed, plain = tiny("qwen2", **sizes), tiny("qwen2")
    assert Checkpoint(mixed).config["layer_types"] == ["full_attention", "sliding_attention"]
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    ours, full = walk(mixed, tokens), walk(plain, tokens)
    assert torch.equal(ours[1], full[1])
    assert difference(ours[2][:, 8:], full[2][:, 8:]) > 1e-3
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    assert difference(ours[2], seen[0]) < 1e-6


def test_batches_do_not_mix(make_block: BlockMaker, model_type: str):
    block = make_block(model_type)
    x = block.inputs[0]
    both = block.forward(block.module, x)
    apart = torch.cat([block.forward(block.module, x[i : i + 1]) for i in range(2)])
    assert difference(apart, both) < 1e-6
    shorter = block.forward(block.module, x[:, :10])
    assert difference(shorter, both[:, :10]) < 1e-6


# Scale edges


@pytest.mark.parametrize(("model_type", "edge_name"), EDGES)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_folding_leaves_the_function_alone(
    make_block: BlockMaker, model_type: str, edge_name: str, spread: float
):
    block = make_block(model_type)
    before = outputs(block)
    edge = block.arch.edge(edge_name)
    source = block.module.get_submodule(edge.source)
    old_source, old_sink = source.weight.clone(), block.linear(edge.sinks[0]).weight.clone()
    scale = torch.exp(
        spread * torch.randn(len(source.weight), generator=torch.Generator().manual_seed(1))
    )
    block.fold(edge, scale)
    assert difference(outputs(block), before) < 5e-6
    assert difference(source.weight, old_source) > 0.1
    assert difference(block.linear(edge.sinks[0]).weight, old_sink) > 0.1
    if edge.source_kind == "norm":
        assert torch.equal(source.weight.to(torch.bfloat16).float(), source.weight)


def test_folding_every_edge_one_after_the_other(make_block: BlockMaker, model_type: str):
    block = make_block(model_type)
    before = outputs(block)
    for edge in block.arch.edges:
        channels = len(block.module.get_submodule(edge.source).weight)
        block.fold(
            edge, torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(2)))
        )
    assert difference(outputs(block), before) < 1e-5


def test_a_channel_that_a_norm_switches_off_stays_finite(make_block: BlockMaker, model_type: str):
    block = make_block(model_type)
    edge = block.arch.edge("mlp_norm")
    block.module.get_submodule(edge.source).weight.data[3] = 0
    before = outputs(block)
    block.fold(edge, torch.full((128,), 2.0))
    assert difference(outputs(block), before) < 5e-6


def test_kv_scales_reach_every_query_head_of_their_group(make_block: BlockMaker):
    block = make_block("llama")
    columns = block.sink_columns(block.arch.edge("v_o"), torch.arange(128.0))
    assert columns.shape == (256,)
    heads = columns.view(4, 64)
    assert torch.equal(heads[0], torch.arange(64.0))
    assert torch.equal(heads[1], heads[0])
    assert torch.equal(heads[2], torch.arange(64.0, 128.0))
    assert torch.equal(heads[3], heads[2])


def test_an_unknown_edge_lists_the_edges():
    with pytest.raises(
        ModelError, match=r"llama has no scale edge 'x'; it has attn_norm, v_o, mlp_norm, up_down"
    ):
        ARCHITECTURES["llama"].edge("x")


# Statistics


def captured(block: Block, module: nn.Module, stream: list[Tensor], name: str) -> Tensor:
    """Inputs [tokens, K] of one submodule, from whole passes, in float64."""
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        for x in stream:
            block.forward(module, x)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


@pytest.mark.parametrize(("model_type", "name"), GROUPED)
@pytest.mark.parametrize("fp8", [False, True])
def test_moments_are_those_of_the_inputs(
    make_block: BlockMaker, model_type: str, name: str, fp8: bool
):
    block = make_block(model_type)
    x = captured(block, block.module, block.inputs, name)
    x = quantize_activations(x.float()).double() if fp8 else x
    moments = moments_of(block, name, fp8)
    everything = sum(hidden.shape[0] * hidden.shape[1] for hidden in block.inputs)
    assert len(x) == moments.tokens
    assert (len(x) < everything) if block.arch.is_routed(name) else (len(x) == everything)
    assert difference(moments.hessian.double(), x.T @ x / len(x)) < 1e-5
    assert difference(moments.absmean.double(), x.abs().mean(0)) < 1e-5
    assert moments.cross is None
    assert moments.wanted is None


@pytest.mark.parametrize(("model_type", "name"), GROUPED)
def test_moments_against_the_parent(make_block: BlockMaker, model_type: str, name: str):
    block = make_block(model_type, with_parent=True)
    assert block.parent_inputs is not None
    noise = torch.Generator().manual_seed(5)
    block.inputs = [x + 0.3 * torch.randn(x.shape, generator=noise) for x in block.inputs]
    freeze_layer(block)
    assert block.frozen is not None
    for earlier in ("self_attn.q_proj", "self_attn.v_proj"):
        if name.startswith("mlp") or name.endswith("o_proj"):
            encode_nearest(block, earlier, bits=2)
    x, parents = (
        captured(block, module, stream, name)
        for module, stream in (
            (block.module, block.inputs),
            (block.frozen, block.parent_inputs),
        )
    )
    moments = moments_of(block, name, False, with_parent=True)
    if block.arch.expert_of(name) is not None:  # the parent's tokens may go elsewhere
        assert moments.cross is None
        assert moments.wanted is None
        return
    assert difference(moments.hessian.double(), x.T @ x / len(x)) < 1e-5

    before = {
        "self_attn.o_proj": "input_layernorm",
        "mlp.down_proj": "post_attention_layernorm",
    }.get(name)
    if before is None:
        assert moments.wanted is None
        assert moments.cross is not None
        assert difference(moments.cross.double(), parents.T @ x / len(x)) < 1e-5
        return
    r, parents_r = (
        captured(block, module, stream, before)
        for module, stream in (
            (block.module, block.inputs),
            (block.frozen, block.parent_inputs),
        )
    )
    made = parents @ block.frozen.get_submodule(name).weight.double().T
    assert moments.cross is None
    assert moments.wanted is not None
    assert difference(moments.wanted.double(), (made + parents_r - r).T @ x / len(x)) < 1e-5


def test_what_is_wanted_of_a_linear_leaves_its_bias_out(make_block: BlockMaker):
    block = make_block("llama", with_parent=True)
    block.add_bias("self_attn.o_proj")
    block.linear("self_attn.o_proj").bias.data.normal_(generator=torch.Generator().manual_seed(1))
    block.holds = len(block.inputs)
    freeze_layer(block)
    weight = block.linear("self_attn.o_proj").weight.double()
    moments = moments_of(block, "self_attn.o_proj", False, with_parent=True)
    assert moments.wanted is not None
    assert difference(moments.wanted.double(), weight @ moments.hessian.double()) < 1e-5


@pytest.mark.parametrize("K", [48, 768, 1700])
def test_gram_is_the_product(K: int):
    x = torch.randn(900, K, generator=torch.Generator().manual_seed(K))
    assert torch.equal(gram(x), gram(x).T)
    assert difference(gram(x).double(), x.double().T @ x.double()) < 1e-6


def test_statistics_need_inputs(make_block: BlockMaker):
    block = make_block("llama")
    block.inputs = []
    with pytest.raises(ModelError, match="no finite calibration inputs"):
        moments_of(block, "mlp.up_proj", False)


def test_measuring_leaves_no_hooks(make_block: BlockMaker):
    block = make_block("llama")
    moments_of(block, "mlp.up_proj", False)
    next(inputs_of(block, ["mlp.up_proj"]))
    assert not any(m._forward_pre_hooks for m in block.module.modules())


# Encoding


@pytest.mark.parametrize("fp8", [False, True])
def test_encoded_linears_compute_with_their_codes(
    make_block: BlockMaker, model_type: str, fp8: bool
):
    block = make_block(model_type)
    name = "self_attn.v_proj"  # the one with a bias in qwen2 and qwen2_moe
    bias = block.linear(name).bias
    encode_nearest(block, name, fp8=fp8)
    linear = block.module.get_submodule(name)
    assert isinstance(linear, PackedLinear)
    assert (bias is not None) == (model_type in ("qwen2", "qwen2_moe"))
    packed, x = block.packed[name], torch.randn(5, 128)
    weight = packed.kernel_weight() if fp8 else packed.unpack()
    expected = (quantize_activations(x) if fp8 else x) @ weight.T + (0 if bias is None else bias)
    assert difference(linear(x), expected) < 1e-6
    with pytest.raises(ModelError, match=r"block 0: self_attn\.v_proj was encoded twice"):
        encode_nearest(block, name)


def test_a_frozen_layer_does_not_move(make_block: BlockMaker, model_type: str):
    block = make_block(model_type, with_parent=True)
    before = outputs(block)
    freeze_layer(block)
    frozen = block.frozen
    encode_nearest(block, block.arch.of_role("up"), bits=2)
    block.fold(block.arch.edge("v_o"), torch.full((128,), 3.0))
    freeze_layer(block)
    assert block.frozen is frozen
    after = torch.cat([block.forward(frozen, x) for x in block.inputs])
    assert torch.equal(after, before)
    assert difference(outputs(block), before) > 1e-3


def test_without_parent_inputs_nothing_is_copied(make_block: BlockMaker):
    block = make_block("llama")
    freeze_layer(block)
    assert block.frozen is None


def test_notes_accumulate(make_block: BlockMaker):
    block = make_block("llama", index=1)
    block.note("mlp.up_proj", a=1)
    block.note("mlp.up_proj", b=2)
    assert block.report == {"mlp.up_proj": {"a": 1, "b": 2}}
    assert block.full_name("mlp.up_proj") == "model.layers.1.mlp.up_proj"
