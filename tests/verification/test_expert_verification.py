"""Verification of conversions with Mixtures of Experts: damage to experts and routers is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from damage import Maker, checks_of, edit_json, edit_tensors, failed, pop, put
from models import zoo
from torch import Tensor

from quantize.conversion.loop import convert
from quantize.formats.native import native_config
from quantize.model.moe import Threshold
from quantize.verification import verify

MLP = "model.layers.0.mlp"
GATE = f"{MLP}.gate.weight"


def swap_experts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if f"{MLP}.experts.0." in name]:
        other = name.replace("experts.0.", "experts.3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize(
    ("recipe", "change", "checks", "says"),
    [
        (
            "rtn",
            pop(f"{MLP}.experts.2.up_proj.weight_packed"),
            ["layout"],
            r"experts\.2\.up_proj\.weight_packed",
        ),
        ("rtn", pop(GATE), ["layout"], r"mlp\.gate\.weight is missing"),
        ("rtn", put(GATE, lambda t: t[:3].contiguous()), ["layout"], r"gate\.weight is \[3, 128\]"),
        ("rtn", swap_experts, ["recomputed", "outputs"], r"experts\.0\.down_proj"),
        # A data-free conversion is computed again; of one that read text the outputs tell.
        ("awq", swap_experts, ["outputs"], r"block 0: .* down [12]\."),
        (
            "rtn",
            put(GATE, lambda t: t + 1),
            ["untouched", "recomputed", "outputs"],
            r"mlp\.gate\.weight differs",
        ),
        ("awq", put(GATE, lambda t: t.flip(0)), ["outputs"], r"router [12]\."),
        (
            "awq",
            put(f"{MLP}.shared_expert_gate.weight", torch.neg),
            ["outputs"],
            r"router [34][. ]",
        ),
    ],
)
def test_damage_is_found(
    copied: Maker,
    tiny: Maker,
    recipe: str,
    change: Callable[[dict[str, Tensor]], object],
    checks: list[str],
    says: str,
):
    folder, parent = copied(recipe, "qwen2_moe"), tiny("qwen2_moe")
    sound = verify(folder, parent)
    assert sound.ok, sound.first_failure
    edit_tensors(folder, change)
    result = verify(folder, parent)
    assert failed(result) == checks
    assert re.search(says, checks_of(result)[checks[0]].detail)


def test_experts_are_reported_by_role(copied: Maker, tiny: Maker):
    detail = checks_of(verify(copied("rtn", "qwen2_moe"), tiny("qwen2_moe")))["outputs"].detail
    assert re.search(
        r"block 0: q \S+ k \S+ o \S+ gate \S+ down \S+ router \S+ \(limit 0\.9\); block 1: q ",
        detail,
    )


def test_another_routing_leaves_linears_comparable(copied: Maker, tiny: Maker):
    folder = copied("rtn", "qwen2_moe")

    def route(config: dict[str, Any]) -> None:
        found = config["quantization_config"]
        native = native_config({}, found["ignore"], None, (), {MLP: Threshold(0.5)})
        config["quantization_config"] = native | {"config_groups": found["config_groups"]}

    edit_json(folder, "config.json", route)
    result = verify(folder, tiny("qwen2_moe"))
    assert result.ok, result.first_failure


def test_a_router_that_is_no_linear_chooses_alike(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Mixtral's own class of routers; attention of four bits moves some tokens to other experts.
    parent = zoo.save(zoo.build("mixtral", seed=1), tmp_path / "mixtral")
    convert(request_for(parent, "rtn", tmp_path / "out", text_file, "group_size=32"))
    result = verify(tmp_path / "out", parent)
    assert result.ok, result.first_failure
    # Without it there are no pairs of rows.
    monkeypatch.setattr("quantize.verification.outputs._choosing", lambda layer, arch: [])
    with pytest.raises(RuntimeError, match="must match the size"):
        verify(tmp_path / "out", parent)
