"""`MoeFfn.stack`: the same function and the same tensors, computed at once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CPU, ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from quantize.files.checkpoint import Checkpoint
from quantize.model.arch import ExpertSizes
from quantize.model.hadamard import let_rotate_inputs
from quantize.model.moe import MoeFfn, Policy, Threshold, TopK, stack_experts
from quantize.model.skeleton import Skeleton

SIZES = ExpertSizes(n=5, size=24, shared=40, top_k=2, renormalize=True, dense_blocks=frozenset())
POLICIES: list[Policy] = [TopK(2), TopK(3, renormalize=True), Threshold(0.1), Threshold(1e9)]


def make(policy: Policy | None = None, activation: str = "silu") -> MoeFfn:
    torch.manual_seed(5)
    ffn = MoeFfn(32, SIZES, ACT2FN[activation], policy)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return ffn.requires_grad_(False)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "swish", "gelu_pytorch_tanh"])
def test_stacked_experts_compute_the_same(policy: Policy, activation: str):
    ffn = make(policy, activation)
    for x in (tokens(1), tokens(2, 9), tokens(0)):
        ffn.stack()
        together = ffn(x)
        torch.testing.assert_close(together, copy.copy(ffn)(x))
        assert together.shape == x.shape
    assert ffn.is_stacked


def test_tensors_keep_names_values_and_memory():
    ffn, plain = make(), make()
    assert ffn.stack()
    assert ffn.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in ffn.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    routed = [p for name, p in ffn.named_parameters() if name.startswith("experts.")]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in routed}
    assert len(storages) == 2
    assert sum(storages.values()) == sum(p.nbytes for p in routed)


def test_what_is_written_in_place_is_seen():
    ffn, other = make(), make()
    ffn.stack()
    for parameter in other.parameters():
        parameter.mul_(1.5)
    ffn.load_state_dict(other.state_dict())
    torch.testing.assert_close(ffn(tokens(7)), other(tokens(7)))


def test_casts_stack_again():
    ffn, plain = make(), make()
    ffn.stack()
    ffn.to(torch.float64)
    assert ffn.is_stacked
    assert len({p.untyped_storage().data_ptr() for p in ffn.experts.parameters()}) == 2
    x = tokens(7).double()
    torch.testing.assert_close(ffn(x), plain.double()(x))
    assert not ffn.to("meta").is_stacked


def test_copies_are_not_stacked():
    ffn = make()
    ffn.stack()
    kept = io.BytesIO()
    torch.save(ffn, kept)
    kept.seek(0)
    for other in (copy.deepcopy(ffn), torch.load(kept, weights_only=False)):
        assert not other.is_stacked
        other.experts[0].up_proj.weight.mul_(2)
        assert not torch.equal(other.experts[0].up_proj.weight, ffn.experts[0].up_proj.weight)
        assert other.stack()
    assert ffn.is_stacked


def test_views_are_saved_like_other_tensors(tmp_path: Path):
    ffn = make()
    ffn.stack()
    save_file(ffn.state_dict(), tmp_path / "m.safetensors")
    saved = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(tensor, ffn.state_dict()[name]) for name, tensor in saved.items())


def hooked(ffn: MoeFfn) -> None:
    ffn.experts[2].down_proj.register_forward_hook(lambda *_: None)


def rotated(ffn: MoeFfn) -> None:
    let_rotate_inputs(ffn.experts[1].gate_proj)


def replaced(ffn: MoeFfn) -> None:
    ffn.set_submodule("experts.3.up_proj", nn.Identity())


def offloaded(ffn: MoeFfn) -> None:
    ffn.experts[0].to("meta")


def wrapped(ffn: MoeFfn) -> None:
    linear = ffn.experts[0].up_proj
    linear.forward = lambda x: nn.Linear.forward(linear, x)


def of_two_dtypes(ffn: MoeFfn) -> None:
    ffn.experts[4].half()


@pytest.mark.parametrize("change", [hooked, rotated, replaced, offloaded, wrapped, of_two_dtypes])
def test_what_is_no_plain_linear_is_left_alone(change: Callable[[MoeFfn], None]):
    ffn = make()
    change(ffn)
    before = [p.data_ptr() for p in ffn.parameters() if not p.is_meta]
    assert not ffn.stack()
    assert not ffn.is_stacked
    assert before == [p.data_ptr() for p in ffn.parameters() if not p.is_meta]


def hooked_whole(ffn: MoeFfn) -> None:
    ffn.experts[2].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [hooked, hooked_whole, rotated, wrapped])
def test_what_is_hooked_later_runs_one_by_one(
    change: Callable[[MoeFfn], None], monkeypatch: pytest.MonkeyPatch
):
    ffn, plain = make(), make()
    assert ffn.stack()
    change(ffn)
    change(plain)
    monkeypatch.setattr(
        "quantize.model.moe.routed_experts", lambda *args, **kwargs: pytest.fail("run at once")
    )
    torch.testing.assert_close(ffn(tokens(7)), plain(tokens(7)))


def other_weight(ffn: MoeFfn) -> None:
    ffn.experts[2].up_proj.weight = nn.Parameter(torch.ones_like(ffn.experts[2].up_proj.weight))


def other_linear(ffn: MoeFfn) -> None:
    linear = nn.Linear(32, 24, bias=False).requires_grad_(False)
    ffn.set_submodule("experts.3.up_proj", linear)
    linear.weight.fill_(0.1)


def another_dtype(ffn: MoeFfn) -> None:
    ffn.experts[4].double()
    ffn.experts[4].register_forward_pre_hook(lambda _, args: (args[0].double(),))
    ffn.experts[4].register_forward_hook(lambda _, args, out: out.float())


@pytest.mark.parametrize("change", [other_weight, other_linear, another_dtype])
def test_weights_that_take_the_place_of_stacked_ones_are_used(change: Callable[[MoeFfn], None]):
    ffn, plain = make(), make()
    assert ffn.stack()
    change(ffn)
    change(plain)
    with torch.no_grad():
        torch.testing.assert_close(ffn(tokens(7)), plain(tokens(7)))
    if change is not another_dtype:  # whose hook keeps it from being looked at
        assert not ffn.is_stacked


def test_a_model_is_stacked_and_says_the_same(tiny: ModelMaker):
    folder = tiny("qwen2_moe")
    source = Checkpoint(folder)
    skeleton = Skeleton(folder, CPU, torch.float32)
    model = nn.ModuleList(
        [skeleton.layer(i, source.tensors(f"model.layers.{i}.")) for i in range(2)]
    )
    x = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].mlp
    with torch.no_grad():
        before = model[0].mlp(x)
        assert stack_experts(model) == 1
        torch.testing.assert_close(model[0].mlp(x), before)
        torch.testing.assert_close(model[0].mlp(x), stock(x))
