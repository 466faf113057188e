"""By which names config.json calls linears: transformers, vLLM and pq look for different ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_stored import build
from transformers import AutoModelForCausalLM

from quantize.model.load import load_model
from quantize.verification import verify

Call = Callable[..., tuple[int, str, str]]
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found["quantization_config"]


def converted(pq: Call, model: Path, tmp_path: Path, body: str) -> Path:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(f"description: d\n{body}")
    code, _, err = pq("convert", "-m", model, "-r", recipe, "-o", out)
    assert code == 0, err
    return out


def names_of(folder: Path, block: int, expert: int) -> tuple[set[str], set[str]]:
    """What transformers and what vLLM calls the linears of an expert of Mixtral."""
    ours = {f"model.layers.{block}.mlp.experts.{expert}.{part}" for part in PARTS}
    home = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
    return ours, {f"{home}.{name}" for pair in PARTS.items() for name in pair}


def test_several_schemes_in_mixtral_are_found_by_every_reader(pq: Call, tmp_path: Path):
    model = build("mixtral")
    parent = tmp_path / "parent"
    model.save_pretrained(parent)
    stages = (
        "stages:\n  - {method: rtn, bits: 8, group_size: -1, layers: ['*.self_attn.*']}\n"
        "  - {method: rtn, bits: 4, group_size: -1, layers: ['*.experts.*']}\n"
    )
    out = converted(pq, parent, tmp_path, stages)
    experts, attention = section(out)["config_groups"].values()
    assert (experts["weights"]["num_bits"], attention["weights"]["num_bits"]) == (4, 8)
    for expert in range(model.config.num_local_experts):
        ours, theirs = names_of(out, 1, expert)
        assert ours | theirs <= set(experts["targets"])
    assert not any("experts" in name for name in attention["targets"])
    checked = verify(out)
    assert checked.ok, checked.first_failure
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    mine = load_model(out, torch.device("cpu"), torch.float32)
    tokens = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        given, wanted = stock(tokens).logits, mine(tokens).logits
    assert (given - wanted).norm() < 0.02 * wanted.norm()


def test_experts_that_stay_as_they_are_are_ignored_by_every_name(pq: Call, tmp_path: Path):
    build("mixtral").save_pretrained(tmp_path / "parent")
    stages = "stages: [{method: rtn, group_size: -1, ignore: ['*.experts.*']}]\n"
    found = section(converted(pq, tmp_path / "parent", tmp_path, stages))
    ours, theirs = names_of(tmp_path, 0, 0)
    assert ours | theirs <= set(found["ignore"])
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_is_called_by_its_name(
    pq: Call, tiny: Callable[..., Path], tmp_path: Path, bits: int
):
    """vLLM's class of heads is no `Linear`."""
    body = f"head_bits: {bits}\nstages: [{{method: rtn, bits: 4}}]\n"
    found = section(converted(pq, tiny("llama"), tmp_path, body))
    named = [
        group["targets"]
        for group in found["config_groups"].values()
        if "lm_head" in group["targets"]
    ]
    assert named == [["Linear", "lm_head"] if bits == 4 else ["lm_head"]]
    assert "lm_head" not in found["ignore"]
    assert verify(tmp_path / "out").ok
