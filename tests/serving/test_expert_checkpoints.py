"""Checkpoints with Mixtures of Experts: every loader computes the same, and each routes as config.json says."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from natives import difference, edited, linears_of, loaded, logits, rewritten, tensors_of, tokens
from torch import Tensor, nn
from transformers import AutoModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from quantize.conversion.loop import convert
from quantize.errors import ModelError
from quantize.evaluation.streamed import open_model
from quantize.files.checkpoint import Checkpoint
from quantize.formats.native import native_config, require_understood, routing_of
from quantize.model.load import load_model
from quantize.model.moe import MoeFfn, Threshold, TopK
from quantize.serving.native_linear import NativeLinear
from quantize.verification import verify

Maker = Callable[..., Path]
CPU = torch.device("cpu")
MLP = "model.layers.0.mlp"
STAGES = {
    "int": "{method: rtn, bits: 4, group_size: 64}",
    "bitvec": "{method: sbvr, fit: data-free, bits: 3, group_size: 64, lines: 8, sweeps: 1, overhead: null}",
    # Of experts one is packed, one in part, and two and the shared one not at all.
    "some": "{method: rtn, bits: 8, layers: ['*.self_attn.*', '*.experts.0.*', '*.experts.2.up_proj']}",
}


@pytest.fixture(scope="module")
def made(tiny: Maker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Convert (once) the tiny model with experts by one of STAGES. Read the folder, never write into it."""

    @functools.cache
    def make(name: str, **model: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "r.yaml").write_text(f"description: d\nformat: pq\nstages: [{STAGES[name]}]\n")
        convert(
            request_for(
                tiny("qwen2_moe", **model), str(folder / "r.yaml"), folder / "out", text_file
            )
        )
        return folder / "out"

    return make


@pytest.fixture
def routed(tiny: Maker, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the unquantized tiny model as a native checkpoint that routes as told."""

    def make(routing: Any = None, **model: Any) -> Path:
        folder = Path(
            shutil.copytree(tiny("qwen2_moe", **model), tmp_path / "routed", dirs_exist_ok=True)
        )
        config = json.loads((folder / "config.json").read_text())
        quantization = native_config({}, [], None) | (
            {} if routing is None else {"routing": routing}
        )
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
        return folder

    return make


def streamed(folder: Path) -> Tensor:
    inputs = tokens()
    read = open_model(folder, CPU, torch.float32, "kernel").read(inputs, lambda: None)
    return torch.stack(list(read([(window, 0, inputs.shape[1]) for window in range(len(inputs))])))


def loaders(folder: Path) -> Iterator[Tensor]:
    """Logits in float32 by transformers, by `load_model` and block by block."""
    yield logits(loaded(folder))
    yield logits(load_model(folder, CPU, torch.float32))
    yield streamed(folder)


def ffns(model: nn.Module) -> list[MoeFfn]:
    return [module for module in model.modules() if isinstance(module, MoeFfn)]


@pytest.mark.parametrize("name", STAGES)
def test_every_loader_computes_the_same(made: Maker, tiny: Maker, name: str):
    folder = made(name)
    ours, *others = loaders(folder)
    assert max(difference(other, ours) for other in others) < 1e-5
    assert 1e-3 < difference(ours, logits(loaded(tiny("qwen2_moe")))) < 0.9
    model = loaded(folder, torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, NativeLinear)]
    assert len(layers) == (2 * 4 + 3 + 1 if name == "some" else linears_of(folder))
    assert not isinstance(ffns(model)[0].gate, NativeLinear)
    assert difference(logits(model), ours) < 0.1


def test_blocks_that_all_have_experts(made: Maker):
    folder = made("int", mlp_only_layers=None, norm_topk_prob=True)
    model = loaded(folder)
    assert [m.policy for m in ffns(model)] == [TopK(2, renormalize=True)] * 2
    assert difference(logits(model), streamed(folder)) < 1e-5


@pytest.mark.parametrize("name", ["int", "some"])
def test_a_loaded_model_saves_what_it_was_loaded_from(made: Maker, tmp_path: Path, name: str):
    folder = made(name)
    model = loaded(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    Checkpoint(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved", torch.bfloat16)), logits(model))


def test_the_decoder_loads_alone(routed: Callable[..., Path]):
    folder = routed({MLP: Threshold(0.5).as_json()})
    whole, alone = (
        loaded(folder, torch.bfloat16),
        AutoModel.from_pretrained(folder, dtype=torch.bfloat16),
    )
    assert [m.policy for m in ffns(alone)] == [Threshold(0.5)]
    with torch.no_grad():
        assert torch.equal(
            whole.model(tokens()).last_hidden_state, alone(tokens()).last_hidden_state
        )


def test_a_device_map_changes_nothing(made: Maker):
    folder = made("int")
    assert torch.equal(
        logits(loaded(folder, torch.bfloat16, device_map="auto")),
        logits(loaded(folder, torch.bfloat16)),
    )


@pytest.mark.parametrize(
    "part", ["gate.weight", "experts.2.up_proj.weight_packed", "shared_expert_gate.weight"]
)
def test_missing_tensors_are_refused(made: Maker, tmp_path: Path, part: str):
    folder = edited(
        Path(shutil.copytree(made("int"), tmp_path / "copy")),
        lambda tensors: tensors.pop(f"{MLP}.{part}", None),
    )
    for load in (loaded, lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(
            ModelError, match=rf"^[^\n]*{MLP}\.{part} is missing from the checkpoint[^\n]*$"
        ):
            load(folder)


def test_a_config_of_another_number_of_experts_is_refused(made: Maker, tmp_path: Path):
    folder = Path(shutil.copytree(made("int"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 5}))
    for load in (loaded, lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(ModelError, match=r"^[^\n]+$"):
            load(folder)


# Stock transformers

STOCK = {
    "4 bits": ("{method: rtn}", True),
    "3 bits": ("{method: rtn, bits: 3, group_size: 64}", True),
    "attention finer": (
        "{method: rtn, bits: 8, ignore: ['*.mlp.*']}, {method: rtn, layers: ['*.mlp.*']}",
        True,
    ),
    "experts finer": (
        "{method: rtn, ignore: ['*.mlp.*']}, {method: rtn, bits: 8, layers: ['*.mlp.*']}",
        True,
    ),
    "others finer": (
        "{method: rtn, bits: 8, ignore: ['*.experts.*']}, {method: rtn, layers: ['*.experts.*']}",
        True,
    ),
    "one 16-bit": ("{method: rtn, ignore: ['*.experts.1.*']}", False),
    "all 16-bit": ("{method: rtn, ignore: ['*.experts.*']}", False),
    "one finer": (
        "{method: rtn, ignore: ['*.experts.1.*']}, {method: rtn, bits: 8, layers: ['*.experts.1.*']}",
        False,
    ),
}


def stacks_packed_experts() -> bool:
    """Whether this release of transformers decodes packed experts; earlier ones leave them random and say so."""
    by_base = hasattr(HfQuantizer, "get_load_operations")
    return by_base or "update_weight_conversions" in vars(CompressedTensorsHfQuantizer)


@pytest.mark.parametrize("name", STOCK)
def test_stock_transformers_reads_experts_packed_alike(
    tiny: Maker, text_file: Path, tmp_path: Path, name: str
):
    stages, alike = STOCK[name]
    (tmp_path / "r.yaml").write_text(f"description: d\nstages: [{stages}]\n")
    request = request_for(tiny("qwen2_moe"), str(tmp_path / "r.yaml"), tmp_path / "out", text_file)
    lost = convert(request).lost
    assert [("packed alike" in line, "\n" in line) for line in lost] == (
        [] if alike else [(True, False)]
    )
    ours = load_model(request.output, CPU, torch.float32, "stock")
    assert difference(streamed(request.output), logits(ours)) < 1e-5
    if alike and stacks_packed_experts():
        theirs = loaded(request.output)
        stacked = theirs.get_submodule(f"{MLP}.experts")
        for index, expert in enumerate(ours.get_submodule(f"{MLP}.experts").children()):
            rows = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            assert torch.equal(stacked.gate_up_proj[index], rows.bfloat16())
            assert torch.equal(stacked.down_proj[index], expert.down_proj.weight.bfloat16())
        assert difference(logits(theirs), logits(ours)) < 0.01  # experts alone compute in bfloat16


def test_a_conversion_says_that_stock_transformers_does_not_round_what_enters_experts(
    tiny: Maker, text_file: Path, tmp_path: Path
):
    for name, activations in (("a", "activations=fp8"), ("b", "activations=none")):
        lost = convert(
            request_for(tiny("qwen2_moe"), "rtn", tmp_path / name, text_file, activations)
        ).lost
        assert [
            line.startswith("transformers runs routed experts with 16-bit") for line in lost
        ] == [True] * (name == "a")


def test_stock_transformers_reads_experts_that_are_not_packed(tiny: Maker):
    folder = tiny("qwen2_moe", norm_topk_prob=True)
    assert difference(logits(loaded(folder)), streamed(folder)) < 1e-5


# Routing


def test_a_checkpoint_without_packed_linears_routes(routed: Callable[..., Path], tiny: Maker):
    plain = logits(loaded(tiny("qwen2_moe")))
    for routing in (None, {MLP: TopK(2).as_json()}):  # what config.json says anyway
        assert max(difference(found, plain) for found in loaders(routed(routing))) < 1e-5
    seen = [plain]
    for policy in (
        TopK(1),
        TopK(2, renormalize=True),
        Threshold(-1e9),
        Threshold(0.3),
        Threshold(1e9),
    ):
        folder = routed({MLP: policy.as_json()})
        ours, *others = loaders(folder)
        assert [m.policy for m in ffns(loaded(folder))] == [policy]
        assert max(difference(other, ours) for other in others) < 1e-5
        assert min(difference(ours, other) for other in seen) > 1e-3
        seen.append(ours)
    assert verify(folder).ok


def test_a_saved_model_still_routes(routed: Callable[..., Path], tmp_path: Path):
    model = loaded(routed({MLP: Threshold(0.3).as_json()}))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(model))


def test_packed_experts_route(made: Maker, tmp_path: Path):
    folder = Path(shutil.copytree(made("int"), tmp_path / "copy"))
    rewritten(folder, lambda found: found.update(routing={MLP: Threshold(0.3).as_json()}))
    ours, *others = loaders(folder)
    assert max(difference(other, ours) for other in others) < 1e-5
    assert difference(ours, streamed(made("int"))) > 1e-3


def test_the_routing_reads_back():
    policies = {"a.mlp": TopK(3), "b.mlp": TopK(1, renormalize=True), "c.mlp": Threshold(-0.25)}
    config = json.loads(json.dumps(native_config({}, [], None, (), policies)))
    require_understood(config)
    assert routing_of(config) == policies
    assert "routing" not in native_config({}, [], None)


@pytest.mark.parametrize(
    ("routing", "says"),
    [
        ([], "routing must map names"),
        ({MLP: None}, f"routing of {MLP}: policy None is not one"),
        ({MLP: {"policy": "sigmoid"}}, "is not one that pq knows; install a newer"),
        ({MLP: {"policy": "threshold", "threshold": True}}, "'threshold': True} is not one"),
        ({MLP: {"policy": "threshold", "threshold": 0.1, "k": 2}}, "is not one"),
        ({MLP: {"policy": "top-k", "k": 0, "renormalize": False}}, "is not one"),
        ({MLP: {"policy": "top-k", "k": 2}}, "is not one"),
        ({MLP: TopK(5).as_json()}, f"sends tokens of {MLP} to 5 of 4 experts"),
        (
            {"model.layers.1.mlp": TopK(1).as_json()},
            "routing names model.layers.1.mlp, which has no experts",
        ),
        ({"mlp": TopK(1).as_json()}, "routing names mlp, which has no experts"),
    ],
)
def test_routing_that_does_not_fit_is_refused(routed: Callable[..., Path], routing: Any, says: str):
    folder = routed(routing)
    for load in (loaded, lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(ModelError, match=r"^[^\n]+$") as caught:
            load(folder)
        assert says in str(caught.value)
    failed = next(check for check in verify(folder).checks if check.ok is False)
    assert (failed.name, says in failed.detail) == ("layout", True)


def test_a_threshold_that_is_no_number_is_refused(routed: Callable[..., Path]):
    """transformers reads NaN in a config.json, which pq refuses as such."""
    folder = routed({MLP: {"policy": "threshold", "threshold": float("nan")}})
    with pytest.raises(ModelError, match="'threshold': nan} is not one"):
        loaded(folder)
    for load in (lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(ModelError, match="threshold is not a finite number"):
            load(folder)
    assert not verify(folder).ok


def test_a_dense_model_has_nothing_to_route(tiny: Maker, tmp_path: Path):
    folder = Path(shutil.copytree(tiny("qwen2"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    quantization = native_config({}, [], None, (), {MLP: TopK(1)})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for load in (loaded, lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(ModelError, match="which has no experts in this model"):
            load(folder)
