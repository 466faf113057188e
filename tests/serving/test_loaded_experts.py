"""Routed experts of a model that transformers loaded: at once by the kernel where Triton runs, else by torch.

The interpreter must be chosen before Triton is imported, so its tests run in a child process: this file, once more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from interpreted import GPU, INTERPRETED, needs_gpu, run_interpreted
from natives import difference, loaded, tensors_of, tokens
from torch import Tensor, nn

from quantize.conversion.loop import Request, convert
from quantize.kernels.experts import api as experts_module
from quantize.model.load import load_model
from quantize.model.moe import MoeFfn, Threshold, TopK
from quantize.recipe.recipe import load_recipe

Maker = Callable[..., Path]
DEVICES = ["cpu"] if INTERPRETED else ["cpu", GPU]
POLICIES = ["adaptive", "top-k"]
ATTENTION = ", {method: rtn, group_size: 64, layers: ['*.self_attn.*']}"
"""What leaves experts as they are, and needs pq's own layers: else `top-k` would be transformers' own model."""


@pytest.fixture(scope="module")
def ladimo(tiny: Maker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A tiny Llama, both of whose blocks LaDiMo turned into experts; by policy, and what packs them behind it."""
    made: dict[tuple[str, ...], Path] = {}

    def make(policy: str, behind: str = ATTENTION) -> Path:
        if (policy, behind) not in made:
            folder = tmp_path_factory.mktemp("ladimo")
            own = f"{{method: ladimo, policy: {policy}, mean_experts: 1, shared: 128, experts: 2, teaching: none}}"
            calibration = f"calibration: {{dataset: {text_file}, nsamples: 6, seqlen: 32}}"
            text = f"description: d\nformat: pq\n{calibration}\nstages: [{own}{behind}]\n"
            (folder / "r.yaml").write_text(text)
            recipe = load_recipe(str(folder / "r.yaml"))
            convert(Request(tiny("llama"), recipe, folder / "out", CPU, torch.float32))
            made[policy, behind] = folder / "out"
        return made[policy, behind]

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often routed experts were computed by the kernel and by torch."""
    counts = {"kernel": 0, "torch": 0}

    def counting(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            counts[name] += 1
            return run(*args)

        return counted

    monkeypatch.setattr(experts_module, "_by_torch", counting("torch", experts_module._by_torch))
    if INTERPRETED or torch.cuda.is_available():
        from quantize.kernels.experts import launch as experts_launch

        kernel = counting("kernel", experts_launch.routed_experts)
        monkeypatch.setattr(experts_launch, "routed_experts", kernel)
    return counts


def ffns(model: nn.Module) -> list[MoeFfn]:
    return [module for module in model.modules() if isinstance(module, MoeFfn)]


def said(model: nn.Module, device: str) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.to(device)(tokens().to(device)).logits
    return out.cpu()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_loaded_model_computes_its_experts_at_once(
    ladimo: Maker, calls: dict[str, int], policy: str, device: str
):
    model = loaded(ladimo(policy))
    assert [type(ffn.policy) for ffn in ffns(model)] == [
        Threshold if policy == "adaptive" else TopK
    ] * 2
    found = said(model, device)
    used = "kernel" if INTERPRETED or device == "cuda" else "torch"
    assert calls == {"kernel": 0, "torch": 0} | {used: 2}
    one_by_one = said(load_model(ladimo(policy), CPU, torch.float32), "cpu")
    assert calls[used] == 2
    assert difference(found, one_by_one) < (1e-5 if device == "cpu" else 1e-3)


@pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_in_bfloat16_on_a_gpu(ladimo: Maker, calls: dict[str, int], policy: str):
    model = loaded(ladimo(policy), torch.bfloat16, device_map="cuda")
    found = said(model, "cuda")
    assert calls == {"kernel": 2, "torch": 0}
    assert difference(found, said(load_model(ladimo(policy), CPU, torch.float32), "cpu")) < 0.05


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loaded_model_saves_what_it_was_loaded_from(ladimo: Maker, tmp_path: Path, policy: str):
    folder = ladimo(policy)
    model = loaded(folder, "auto")
    said(model, "cpu")
    assert all(ffn.is_stacked for ffn in ffns(model))
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(said(loaded(tmp_path / "saved", "auto"), "cpu"), said(model, "cpu"))


@pytest.mark.skipif(INTERPRETED, reason="what stays on the disk is read, not computed")
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_experts_that_are_put_away_run_one_by_one(
    ladimo: Maker, tmp_path: Path, calls: dict[str, int], place: str
):
    folder = ladimo("adaptive")
    expected = said(load_model(folder, CPU, torch.float32), "cpu")
    parts = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    away = {"model.layers.0": "cpu", "model.layers.1": place}
    model = loaded(folder, device_map=parts | away, offload_folder=str(tmp_path / "away"))
    # Without a GPU accelerate puts all linears under its hooks as soon as some are on the disk.
    assert [ffn.is_stacked for ffn in ffns(model)] == [place == "cpu"] * 2
    with torch.no_grad():
        found = model(tokens()).logits
    assert calls["torch"] == (2 if place == "cpu" else 0)
    assert difference(found, expected) < 1e-5


def test_packed_experts_stay_as_they_are(ladimo: Maker, calls: dict[str, int]):
    folder = ladimo("adaptive", ", {method: rtn, group_size: 64}")
    model = loaded(folder)
    assert not any(ffn.is_stacked for ffn in ffns(model))
    assert (
        difference(said(model, "cpu"), said(load_model(folder, CPU, torch.float32), "cpu")) < 1e-5
    )
    assert calls == {"kernel": 0, "torch": 0}
