"""What `pq inspect` says of plain models, of pq's own conversions and of other tools' checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import ARCHITECTURES
from safetensors import safe_open
from safetensors.torch import save_file
from small_sources import fp8, gpt_oss
from torch import Tensor
from typer.testing import CliRunner, Result

from quantize.cli.inspect import inspect as inspect_command
from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.files.headers import Header
from quantize.inspect.inspection import Inspection, Linear, inspect
from quantize.model.dequantized import open_source
from quantize.model.roles import natural, role_of
from quantize.model.storage import storage_of

Maker = Callable[..., Path]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats(allow_nan=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    out = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return out


def linears_of(found: Inspection) -> dict[str, Linear]:
    return {
        f"{block.name}.{linear.name}": linear for block in found.blocks for linear in block.linears
    }


def pq_inspect(*args: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(inspect_command)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def other_model(
    folder: Path, tensors: dict[str, Tensor], quantization: Any, model_type: str = "opt"
) -> Path:
    """A checkpoint as another tool might write it."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": model_type, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# pq's own


def test_a_plain_model_of_every_architecture(tiny: Maker, model_type: str):
    folder = tiny(model_type, shards=2)
    found, tensors = inspect(folder), tensors_of(folder)
    total = sum(t.numel() for t in tensors.values())
    assert found.totals.parameters == total
    assert found.totals.embedding_parameters == 300 * 128
    assert found.totals.quantized_parameters == 0
    assert found.totals.quantized_bits_per_weight is None
    assert found.totals.bits_per_weight == 16
    assert (
        found.totals.tensor_bytes
        == found.totals.expected_bytes
        == found.totals.sixteen_bit_bytes
        == 2 * total
    )
    assert found.totals.file_bytes == sum(
        path.stat().st_size for path in folder.glob("*.safetensors")
    )
    assert found.model_type == model_type
    assert found.sizes["hidden_size"] == 128
    assert found.formats == ("bfloat16",)
    assert found.made is None
    assert found.made_problem is None
    assert [block.index for block in found.blocks] == [0, 1]
    experts = ARCHITECTURES[model_type].experts  # in the first block, four and a shared one
    ffn = (
        5 * ["gate"] + 5 * ["up"] + 5 * ["down"] + 2 * ["router"]
        if experts
        else ["gate", "up", "down"]
    )
    assert [linear.role for linear in found.blocks[0].linears] == ["q", "k", "v", "o", *ffn]
    assert [linear.role for linear in found.blocks[1].linears] == [
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    ]
    assert linears_of(found)["model.layers.1.mlp.down_proj"].shape == (128, 256)
    shown = {f"{block.name}.{o.name}" for block in found.blocks for o in block.others} | {
        o.name for o in found.outside
    }
    assert shown | {f"{name}.weight" for name in linears_of(found)} == set(tensors)


@pytest.mark.parametrize(
    ("recipe", "changes", "bits", "group", "activations"),
    [
        ("rtn", ("bits=3", "group_size=16"), 3, 16, "none"),
        ("gptq", ("bits=4",), 4, 128, "none"),
        ("fireq-paper-linear", (), 4, 128, "fp8"),
    ],
)
def test_numbers_of_a_conversion(
    converted: Maker, recipe: str, changes: tuple[str, ...], bits: int, group: int, activations: str
):
    folder = converted(recipe, "qwen2", *changes, intermediate_size=384)
    found, tensors = inspect(folder), tensors_of(folder)
    linears = linears_of(found)
    assert len(linears) == 14
    weights = scales = 0
    for name, linear in linears.items():
        N, K = tensors[f"{name}.weight_shape"].tolist()
        assert linear.shape == (N, K)
        assert (linear.bits, linear.group_size, linear.activations) == (bits, group, activations)
        assert linear.format == "compressed-tensors pack-quantized"
        assert linear.bits_per_weight == pytest.approx(bits + 16 / group)
        own = [t for n, t in tensors.items() if n.startswith(f"{name}.weight")]
        assert linear.bytes == sum(t.numel() * t.element_size() for t in own)
        weights, scales = weights + N * K, scales + N * K // group
    plain = sum(t.numel() for n, t in tensors.items() if ".weight_" not in n)
    totals = found.totals
    assert totals.quantized_parameters == weights
    assert totals.parameters == weights + plain
    assert totals.quantized_bits_per_weight == pytest.approx(bits + 16 / group)
    assert totals.tensor_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert totals.expected_bytes == weights * bits // 8 + 2 * scales + 2 * plain
    assert totals.tensor_bytes - totals.expected_bytes == 14 * 16  # weight_shape, two int64 each
    assert totals.bits_per_weight == pytest.approx(8 * totals.tensor_bytes / (weights + plain))
    assert totals.sixteen_bit_bytes == 2 * (weights + plain)


def test_rows_that_end_within_a_word_count_with_their_padding(converted: Maker):
    found = inspect(converted("rtn", "llama", "bits=3", "group_size=16", intermediate_size=272))
    down = linears_of(found)["model.layers.0.mlp.down_proj"]
    assert down.shape == (128, 272)
    assert down.bits_per_weight == pytest.approx((math.ceil(272 * 3 / 32) * 32 + 17 * 16) / 272)


def test_linears_left_alone_are_shown_plain(converted: Maker):
    found = inspect(converted("rtn", "llama", "ignore=*.down_proj,model.layers.1.*"))
    assert [linear.quantized for linear in found.blocks[0].linears] == [True] * 6 + [False]
    assert not any(linear.quantized for linear in found.blocks[1].linears)
    assert found.formats == ("compressed-tensors pack-quantized", "bfloat16")


def test_provenance(converted: Maker):
    folder = converted("gptq", "llama")
    made, data = inspect(folder).made, json.loads((folder / "pq.json").read_text())
    assert made is not None
    assert (made.recipe, made.source, made.versions) == ("gptq", data["source"], data["versions"])
    assert made.calibration == data["calibration"]
    assert "stages:" in made.recipe_resolved
    assert made.fallbacks == ()
    errors = sorted((facts["output_error"] for facts in data["layers"].values()), reverse=True)
    assert [w.error for w in made.worst] == errors[:5]
    assert {w.kind for w in made.worst} == {"output_error"}
    assert data["layers"][made.worst[0].name]["output_error"] == errors[0]


def test_data_free_recipes_show_weight_errors_and_fallbacks_are_named(
    converted: Maker, tmp_path: Path
):
    folder = shutil.copytree(converted("rtn", "llama"), tmp_path / "m")
    data = json.loads((folder / "pq.json").read_text())
    data["layers"]["model.layers.1.mlp.up_proj"] |= {
        "fallback": "why",
        "weight_error": float("nan"),
    }
    (folder / "pq.json").write_text(json.dumps(data))
    made = inspect(folder).made
    assert made is not None
    assert made.fallbacks == ("model.layers.1.mlp.up_proj",)
    assert made.worst[0].name == "model.layers.1.mlp.up_proj"  # NaN is the worst of all
    assert {w.kind for w in made.worst} == {"weight_error"}


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"pq": 1}', "\x00", '{"a": ' + "9" * 5000 + "}"]
)
def test_a_broken_pq_json_is_said_and_the_rest_still_shown(tiny: Maker, tmp_path: Path, text: str):
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    (folder / "pq.json").write_text(text)
    found = inspect(folder)
    assert found.made is None
    assert "pq.json" in str(found.made_problem)
    assert found.totals.bits_per_weight == 16


def test_headers_only(converted: Maker, monkeypatch: pytest.MonkeyPatch):
    folder = converted("gptq", "llama")
    monkeypatch.setattr(Checkpoint, "_read", lambda self, names: pytest.fail("reads tensors"))
    assert inspect(folder).totals.parameters


def test_transformers_is_not_needed():
    code = "import sys, quantize.inspect.inspection; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


# Others'


def test_gptq(tmp_path: Path):
    p = "model.layers.0.self_attn.q_proj"
    parts = {f"{p}.qweight": torch.zeros(256 * 3 // 32, 64, dtype=torch.int32)}
    parts |= {
        f"{p}.scales": torch.ones(4, 64).half(),
        f"{p}.qzeros": torch.zeros(4, 6, dtype=torch.int32),
    }
    parts |= {
        f"{p}.g_idx": torch.zeros(256, dtype=torch.int32),
        f"{p}.bias": torch.zeros(64).half(),
    }
    found = inspect(
        other_model(
            tmp_path / "m", parts, {"quant_method": "gptq", "bits": 3, "group_size": 64}, "llama"
        )
    )
    (linear,) = linears_of(found).values()
    assert (linear.shape, linear.bits, linear.group_size, linear.role) == ((64, 256), 3, 64, "q")
    assert linear.format == "gptq"
    assert linear.bytes == 24 * 64 * 4 + 4 * 64 * 2 + 4 * 6 * 4 + 256 * 4
    assert found.totals.parameters == 64 * 256 + 64


def test_awq(tmp_path: Path):
    p = "model.layers.0.mlp.down_proj"
    parts = {
        f"{p}.qweight": torch.zeros(256, 64 * 4 // 32, dtype=torch.int32),
        f"{p}.scales": torch.ones(2, 64).half(),
    }
    found = inspect(
        other_model(tmp_path / "m", parts, {"quant_method": "awq", "bits": 4, "group_size": 128})
    )
    (linear,) = linears_of(found).values()
    assert (linear.shape, linear.bits, linear.group_size, linear.format) == (
        (64, 256),
        4,
        128,
        "awq",
    )
    assert linear.role == "down"


def test_compressed_tensors_of_others(tmp_path: Path):
    scale = {"num_bits": 8, "type": "float"}
    groups = {
        "general": {
            "targets": ["Linear"],
            "format": "float-quantized",
            "weights": scale,
            "input_activations": scale,
        },
        "named": {
            "targets": ["re:.*o_proj$"],
            "weights": {"num_bits": 4, "group_size": None, "type": "int"},
        },
    }
    tensors = {
        "model.layers.0.q_proj.weight": torch.zeros(64, 32).to(torch.float8_e4m3fn),
        "model.layers.0.q_proj.weight_scale": torch.ones(64, 1),
        "model.layers.0.o_proj.weight_packed": torch.zeros(64, 4, dtype=torch.int32),
        "model.layers.0.o_proj.weight_scale": torch.ones(64, 1).bfloat16(),
        "model.layers.0.up_proj.weight_packed": torch.zeros(64, 16, dtype=torch.uint8),
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed",
        "config_groups": groups,
    }
    linears = linears_of(inspect(other_model(tmp_path / "m", tensors, quantization)))
    q, o, up = (linears[f"model.layers.0.{n}_proj"] for n in ("q", "o", "up"))
    assert (q.bits, q.activations, q.format, q.shape) == (
        8,
        "fp8",
        "compressed-tensors float-quantized",
        (64, 32),
    )
    assert q.bits_per_weight == 9
    assert (o.bits, o.activations, o.shape, o.quantized) == (4, "none", (64, 32), True)
    assert up.shape == (64, 32)  # two 4-bit floats in a byte


def test_bitsandbytes_has_no_shape_in_its_headers(tmp_path: Path):
    p = "model.layers.0.q_proj.weight"
    tensors = {p: torch.zeros(1024, 1, dtype=torch.uint8), f"{p}.absmax": torch.zeros(32)}
    found = inspect(other_model(tmp_path / "m", tensors, {"quant_method": "bitsandbytes"}))
    (linear,) = linears_of(found).values()
    assert (linear.shape, linear.weights, linear.bits, linear.quantized) == (None, 2048, 4, True)


def test_shapes_that_cannot_be_told_leave_totals_open(tmp_path: Path):
    tensors = {"model.layers.0.q_proj.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}
    found = inspect(other_model(tmp_path / "m", tensors, None))
    assert found.totals.parameters is None
    assert "do not tell every shape" in pq_inspect(tmp_path / "m").output


@settings(max_examples=60, deadline=None)
@given(JSON, JSON, JSON, st.sampled_from(["weight_packed", "qweight", "weight"]))
def test_no_quantization_config_stops_it(whole: Any, group: Any, weights: Any, part: str):
    headers = {
        f"a.0.b.{part}": Header("I32", (8, 4), 128),
        "a.0.b.weight_scale": Header("BF16", (8, 1), 16),
    }
    headers["a.0.b.scales"] = Header("F16", (2, 8), 32)
    nested = {
        "config_groups": {
            "g": {"targets": ["Linear"], "weights": weights, "input_activations": group}
        }
    }
    for config in (
        whole,
        nested,
        {"config_groups": group},
        {"bits": whole, "quant_method": group, "format": weights},
    ):
        assert storage_of(headers, config)["a.0.b"].bytes >= 128


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.", ".0.", "0", "x.99999999999999999999.y", "a.0.b.weight.c.d", ".weight"],
)
def test_odd_tensor_names(tmp_path: Path, name: str):
    found = inspect(other_model(tmp_path / "m", {name: torch.zeros(2, 2)}, [1]))
    assert found.totals.tensor_bytes == 16


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="no such folder"):
        inspect(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json"):
        inspect(tmp_path)


# The command


def test_equal_blocks_are_folded(converted: Maker):
    folder = converted("fireq-paper-linear", "llama")
    folded, whole = pq_inspect(folder), pq_inspect(folder, "--all")
    assert folded.exit_code == whole.exit_code == 0
    assert (
        folded.output.count(
            "q (self_attn.q_proj): 256 x 128, 4-bit g128, fp8 activations, 4.125 bits"
        )
        == 1
    )
    assert "model.layers.0 … 1, 2 equal blocks" in folded.output
    assert whole.output.count("q (self_attn.q_proj): 256 x 128") == 2
    assert "with recipe fireq-paper" in folded.output
    assert "largest weight_error" in folded.output


def test_different_blocks_are_not_folded(converted: Maker):
    output = pq_inspect(converted("rtn", "llama", "ignore=model.layers.1.*")).output
    assert "equal blocks" not in output
    assert "up (mlp.up_proj): 256 x 128, bfloat16" in output


def test_equal_experts_are_folded(converted: Maker, tmp_path: Path):
    folder = Path(
        shutil.copytree(
            converted("rtn", "qwen2_moe", "ignore=*.experts.2.up_proj"), tmp_path / "copy"
        )
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["routing"] = {
        "model.layers.0.mlp": {"policy": "threshold", "threshold": 0.5}
    }
    (folder / "config.json").write_text(json.dumps(config))
    folded, whole = pq_inspect(folder).output, pq_inspect(folder, "--all").output
    assert folded.count("gate (mlp.experts.*.gate_proj, 4 equal): 128 x 128, 4-bit g128") == 1
    assert folded.count("8.46 kB each") == 3
    assert "up (mlp.experts.*.up_proj, 3 equal): 128 x 128, 4-bit" in folded
    assert "up (mlp.experts.2.up_proj): 128 x 128, bfloat16" in folded
    assert folded.count("(mlp.shared_expert.gate_proj): 256 x 128") == 1
    assert "router (mlp.gate): 4 x 128, bfloat16" in folded
    assert folded.count("routing: a token visits every expert whose score exceeds 0.5") == 1
    assert whole.count("gate (mlp.experts.") == 4
    assert " equal" not in whole


def test_experts_stand_in_the_order_of_their_numbers():
    names = [f"mlp.experts.{n}.up_proj" for n in (10, 9, 0, 11)]
    assert [name.split(".")[2] for name in sorted(names, key=natural)] == ["0", "9", "10", "11"]
    assert role_of("mlp.experts.10.up_proj") == role_of("mlp.shared_expert.up_proj") == "up"
    assert role_of("block_sparse_moe.experts.3.w1") == "gate"
    assert role_of("mlp.shared_expert_gate") == role_of("mlp.gate") == "router"
    assert role_of("mlp.experts.x.mixing") is None


def test_json_is_the_function_s_result(converted: Maker):
    folder = converted("gptq", "llama")
    shown = json.loads(pq_inspect(folder, "--json").stdout)
    assert shown.pop("loads_in").startswith("loads in: transformers")
    assert shown == json.loads(json.dumps(dataclasses.asdict(inspect(folder))))


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path: Path):
    output = pq_inspect(
        other_model(tmp_path / "m", {"a\x1b[31mb\n": torch.zeros(2, 2)}, None)
    ).output
    assert "\x1b" not in output
    assert "a\ufffd[31mb\ufffd" in output


# Sources that are stored small


def test_gpt_oss_counts_weights_and_not_bytes(tmp_path: Path):
    """Two codes stand in a byte, and scales are no weights."""
    folder = gpt_oss(tmp_path / "model")
    found = inspect(folder)
    plain = open_source(folder).shapes
    experts = [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]
    assert found.totals.parameters == sum(map(math.prod, plain.values()))
    assert found.totals.quantized_parameters == sum(math.prod(plain[name]) for name in experts)
    assert found.totals.quantized_bits_per_weight == 4.25
    assert found.totals.expected_bytes == found.totals.tensor_bytes
    linears = {name: linear for name, linear in linears_of(found).items() if linear.quantized}
    assert sorted(linears) == sorted(experts)
    assert {(x.format, x.bits, x.group_size, x.activations) for x in linears.values()} == {
        ("mxfp4", 4, 32, "none")
    }
    assert "_scales" not in str([block.others for block in found.blocks])


@pytest.mark.parametrize("kind", ["blocks", "tensor", "stacked"])
def test_fp8_counts_weights_and_not_scales(kind: str, tmp_path: Path):
    if kind == "stacked":
        tensors = {
            "model.layers.0.mlp.experts.up_proj": torch.ones(2, 256, 128).to(torch.float8_e4m3fn),
            "model.layers.0.mlp.experts.up_proj_scale_inv": torch.ones(2, 2, 1),
        }
        folder = other_model(tmp_path / "model", tensors, {"quant_method": "fp8"})
        weights = 2 * 256 * 128
    else:
        folder = fp8(tmp_path / "model", block=128 if kind == "blocks" else None)
        weights = sum(map(math.prod, open_source(folder).shapes.values()))
    found = inspect(folder)
    assert found.totals.parameters == weights
    assert {x.bits for x in linears_of(found).values() if x.quantized} == {8}
    assert {x.format for x in linears_of(found).values() if x.quantized} == {"fp8"}


def test_what_is_not_read_and_what_is_behind_the_decoder_is_told(tiny: Maker, tmp_path: Path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    assert inspect(folder).notes == ()
    tensors = tensors_of(folder)
    more = {n.replace(".1.", ".2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors | more, folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    read, passed, beyond = inspect(folder).notes
    assert "reads the weights of model.safetensors, as transformers does" in read
    assert "rotary_emb.inv_freq and the like (1)" in passed
    assert beyond == "behind the last of 2 layers: model.layers.2"
