"""Models whose sizes no group of 128 divides: they convert with every method, load in stock
transformers, and say what each linear got."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantize  # registers the native format  # noqa: F401
from quantize.conversion.estimate import estimate
from quantize.conversion.loop import Request, convert
from quantize.errors import ModelError
from quantize.evaluation import evaluate
from quantize.files.checkpoint import Checkpoint
from quantize.inspect.inspection import inspect
from quantize.methods.rtn import Rtn
from quantize.model.load import load_model
from quantize.recipe.recipe import parse_recipe
from quantize.report.collect import collect
from quantize.verification import verify

CPU = torch.device("cpu")
Maker = Callable[..., Path]
Pq = Callable[..., tuple[int, str, str]]
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
}
"""The sizes of a block of SmolLM2-135M."""
ODD: dict[str, Any] = {
    "hidden_size": 100,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "intermediate_size": 172,
    "num_hidden_layers": 1,
}
"""Sizes that no group divides, and rows that end within a word."""
WIDE: dict[str, Any] = {
    "hidden_size": 960,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
}
METHODS = {
    "rtn": "stages: [{method: rtn}]",
    "rtn8": "stages: [{method: rtn, bits: 8}]",
    "gptq": "stages: [{method: gptq}]",
    "awq": "stages: [{method: awq, grid: 2}, {method: cas}, {method: rtn, clip: mse}]",
    "fireq-linear": "stages: [{method: fireq, sweeps: 1}]",
    "paper": "stages: [{method: fireq, rounding: nearest, scales: tensor}]",
    "fireq": "format: pq, stages: [{method: fireq-attention}, {method: fireq, sweeps: 1}]",
    "sbvr": "format: pq, stages: [{method: sbvr, fit: data-free, lines: 4, overhead: null}]",
}
FP8 = ("fireq-linear", "paper", "fireq")


def request(model: Path, output: Path, text: Path, body: str) -> Request:
    made = request_for(model, "rtn", output, text)
    recipe = parse_recipe(f"{{description: d, {body}}}", "r.yaml")
    calibration = made.recipe.calibration
    return replace(made, recipe=recipe.model_copy(update={"calibration": calibration}))


def logits(model: Any) -> Tensor:
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(tokens).logits.double()


def stock(folder: Path) -> Tensor:
    """Logits in stock transformers, which found a place for every tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return logits(model.eval())


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def entries(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Packed linear → strategy, group and whether inputs are FP8, as config.json has them."""
    source = Checkpoint(folder)
    packed = [
        name.removesuffix(".weight_packed")
        for name in source.names()
        if name.endswith(".weight_packed")
    ]
    out: dict[str, tuple[Any, ...]] = {}
    for entry in source.config["quantization_config"]["config_groups"].values():
        weights, fp8 = entry["weights"], entry["input_activations"] is not None
        for name in packed if "Linear" in entry["targets"] else entry["targets"]:
            assert name not in out, "two entries name it"
            out[name] = weights["strategy"], weights["group_size"], fp8
    assert set(out) == set(packed)
    return out


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "pq.json").read_text())["layers"]
    return found


def expected(N: int, K: int, fp8: bool) -> tuple[Any, ...]:
    group = next((g for g in (128, 64, 32) if K % g == 0), None)
    return "group" if group else "channel", group, fp8 and N % 128 == 0 and K % 128 == 0


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        *[pytest.param(method, SMOLLM2, id=f"{method}-smollm2") for method in METHODS],
        *[pytest.param(method, ODD, id=f"{method}-odd") for method in METHODS],
        *[pytest.param(method, WIDE, id=f"{method}-wide") for method in ("rtn", "gptq", "paper")],
    ],
)
def test_sizes_that_no_group_divides_convert_and_load(
    tiny: Maker, text_file: Path, tmp_path: Path, method: str, sizes: dict[str, Any]
):
    model, out = tiny("llama", **sizes), tmp_path / "out"
    summary = convert(request(model, out, text_file, METHODS[method]))
    kernel = "kernel" if method in ("fireq", "sbvr") else "stock"
    ours = logits(load_model(out, CPU, torch.float32, kernel))
    assert difference(stock(out), ours) < 1e-5
    assert 1e-3 < difference(ours, stock(model)) < 0.8
    checked = verify(out, model)
    assert checked.ok, checked.first_failure
    found = inspect(out)
    notes = 16 * sum(name.endswith(".weight_shape") for name in Checkpoint(out).names())
    assert found.totals.expected_bytes == found.totals.tensor_bytes - notes
    assert found.totals.quantized_bits_per_weight == pytest.approx(summary.bits_per_weight)
    facts = facts_of(out)
    changed = {name for name, noted in facts.items() if "adapted" in noted}
    assert sum(int(line.split()[0]) for line in summary.adapted) == len(changed)
    warnings = " ".join(collect(out).warnings)
    assert all(line in warnings for line in summary.adapted)
    assert found.made is not None
    assert found.made.adapted == tuple(summary.adapted)
    if method == "sbvr":
        assert not changed
        return
    shapes = {linear.name: linear.shape for linear in found.blocks[0].linears}
    for name, entry in entries(out).items():
        N, K = shapes[name.removeprefix("model.layers.0.")]  # type: ignore[misc]
        assert entry == expected(N, K, method in FP8), name
        assert (name in changed) == (entry[1:] != (128, method in FP8)), name


def test_linears_that_loaders_fuse_are_alike(tiny: Maker, text_file: Path, tmp_path: Path):
    """Of q (256 outputs), k and v (64) none rounds its inputs; gate and up, of whole tiles, do."""
    model, out = tiny("llama", num_key_value_heads=1), tmp_path / "out"
    summary = convert(request(model, out, text_file, METHODS["paper"]))
    fp8 = {name: entry[2] for name, entry in entries(out).items()}
    assert fp8 == {
        name: name.rpartition(".")[2] not in ("q_proj", "k_proj", "v_proj") for name in fp8
    }
    assert summary.adapted == [
        "4 linears: 16-bit activations instead of FP8 (64 outputs)",
        "2 linears: 16-bit activations instead of FP8 (as the linears packed with it)",
    ]
    assert difference(stock(out), logits(load_model(out, CPU, torch.float32, "stock"))) < 1e-5


@pytest.mark.parametrize(("size", "entry"), [(192, ("group", 64)), (104, ("channel", None))])
def test_routed_experts_are_alike(
    tiny: Maker, text_file: Path, tmp_path: Path, size: int, entry: tuple[Any, ...]
):
    """transformers makes one tensor of all experts: 128 inputs of gate and up follow those of down."""
    model, out = tiny("qwen2_moe", moe_intermediate_size=size), tmp_path / "out"
    summary = convert(request(model, out, text_file, METHODS["rtn"]))
    found = entries(out)
    routed = {name for name in found if ".mlp.experts." in name}
    assert len(routed) == 12
    assert {found[name] for name in found if name in routed} == {(*entry, False)}
    assert {found[name] for name in found if name not in routed} == {("group", 128, False)}
    assert not summary.lost
    assert len([name for name, noted in facts_of(out).items() if "adapted" in noted]) == 12
    assert difference(stock(out), logits(load_model(out, CPU, torch.float32, "stock"))) < 0.01
    assert verify(out, model).ok


def test_the_estimate_and_a_target_count_the_real_groups(
    tiny: Maker, text_file: Path, tmp_path: Path
):
    model = tiny("llama", **SMOLLM2)
    plain = request(model, tmp_path / "plain", text_file, METHODS["rtn"])
    summary = convert(plain)
    attention, ffn = 576 * (576 + 192 + 192 + 576), 576 * 1536
    bits = (4 + 16 / 64) * (attention + 2 * ffn) + (4 + 16 / 128) * ffn
    assert summary.bits_per_weight == pytest.approx(bits / (attention + 3 * ffn))
    tensors = inspect(tmp_path / "plain").totals.tensor_bytes
    assert estimate(plain, timed=False).output == pytest.approx(tensors, abs=10_000)
    target = replace(plain, output=tmp_path / "target", target_bpw=5.0)
    mixed = convert(target)
    assert mixed.promoted
    assert 4.5 < mixed.bits_per_weight <= 5
    allocated = json.loads((tmp_path / "target" / "pq.json").read_text())["allocation"]
    assert allocated["bits_per_weight"] == pytest.approx(mixed.bits_per_weight)
    assert difference(stock(tmp_path / "target"), stock(model)) < difference(
        stock(tmp_path / "plain"), stock(model)
    )


@pytest.mark.parametrize(("sizes", "entry"), [(SMOLLM2, ("group", 64)), (ODD, ("channel", None))])
def test_a_head_whose_inputs_no_group_divides(
    tiny: Maker, text_file: Path, tmp_path: Path, sizes: dict[str, Any], entry: tuple[Any, ...]
):
    model, out = tiny("llama", **sizes), tmp_path / "out"
    convert(request(model, out, text_file, "head_bits: 8, stages: [{method: rtn, bits: 8}]"))
    assert entries(out)["lm_head"][:2] == entry
    assert facts_of(out)["lm_head"]["adapted"]["group_size"] == {"asked": 128, "used": entry[1]}
    assert difference(stock(out), logits(load_model(out, CPU, torch.float32, "stock"))) < 1e-5
    args = {"dataset": str(text_file), "seqlen": 32, "max_windows": 2}
    assert evaluate(out, model, **args).kld_mean < 0.01
    assert verify(out, model).ok


def test_strict_stages_refuse(tiny: Maker, text_file: Path, tmp_path: Path):
    model = tiny("llama", **SMOLLM2)
    for body, says in (
        ("stages: [{method: gptq, strict: true}]", "q_proj: 576 inputs are no multiple of the group 128; "
         "set group_size to 64 or strict to false, or add it to ignore"),
        ("stages: [{method: fireq, strict: true, layers: ['*.down_proj']}]",
         "down_proj: 576 outputs are no multiple of 128, which INT4×FP8 kernels need; set "
         "activations to none or strict to false, or add it to ignore"),
        ("head_bits: 4, stages: [{method: rtn, group_size: 64, strict: true}]",
         "head_bits: 576 inputs of lm_head are no multiple of the group 128; set strict to false"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=says):
            convert(request(model, tmp_path / "out", text_file, body))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe", ["rtn", pytest.param("fireq-linear", marks=pytest.mark.slow), "fireq", "sbvr"]
)
def test_smollm2_from_the_command_line(
    pq: Pq, tiny: Maker, text_file: Path, tmp_path: Path, recipe: str
):
    model, out = tiny("llama", **SMOLLM2), tmp_path / "out"
    options = ["--dataset", text_file, "--nsamples", 2, "--seqlen", 32, "--device", "cpu"]
    quick = {"fireq-linear": ["fireq.sweeps=0"], "fireq": ["fireq.sweeps=0"]}
    quick["sbvr"] = ["sbvr.sweeps=0", "sbvr.lines=4", "sbvr.fit=data-free"]
    settings = [part for field in quick.get(recipe, ()) for part in ("--set", field)]
    code, _, err = pq("convert", "-m", model, "-r", recipe, "-o", out, *options, *settings)
    assert code == 0, err
    said = " ".join(err.split())
    assert ("576 inputs" in said) == (recipe != "sbvr")
    if recipe == "rtn":
        assert "not as asked for: 6 linears: group 64 instead of 128 (576 inputs)" in said
    kernel = "kernel" if recipe in ("fireq", "sbvr") else "stock"
    assert difference(stock(out), logits(load_model(out, CPU, torch.float32, kernel))) < 1e-5
    code, told, _ = pq("inspect", out)
    assert code == 0
    assert ("not as asked for" in told) == (recipe != "sbvr")
    code, _, err = pq("verify", out, "--parent", model, "--device", "cpu")
    assert code == 0, err


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "fireq-linear"])
def test_whole_rows_that_are_asked_for(tiny: Maker, text_file: Path, tmp_path: Path, method: str):
    sizes: dict[str, Any] = {"intermediate_size": 256, "num_hidden_layers": 1}
    fields = "activations: none, group_size: -1}"
    body = METHODS[method].replace("}, {method: rtn, clip: mse}", "}, {method: rtn}")
    head, _, tail = body.rpartition("}")
    if method == "awq":
        head = head.replace("grid: 2", "grid: 2, group_size: -1")
    out = tmp_path / "out"
    asked = request(tiny("llama", **sizes), out, text_file, f"{head}, {fields}{tail}")
    told = estimate(asked, timed=False)
    summary = convert(asked)
    assert set(entries(out).values()) == {("channel", None, False)}
    assert summary.adapted == []
    assert summary.unserved == []
    ours = logits(load_model(out, CPU, torch.float32, "stock"))
    assert difference(stock(out), ours) < 1e-5
    assert verify(out, asked.model).ok
    assert told.output == pytest.approx(inspect(out).totals.tensor_bytes, abs=20_000)
    weight = Checkpoint(asked.model).tensor("model.layers.0.mlp.down_proj.weight")
    stored = Checkpoint(out).tensor("model.layers.0.mlp.down_proj.weight_scale")
    assert stored.shape == (len(weight), 1)


def test_a_stage_of_its_own_ways_takes_no_whole_rows():
    class Own(Rtn):
        def apply(self, block: Any) -> None:
            raise AssertionError

    with pytest.raises(ModelError, match="takes no whole rows; set group_size to 128"):
        Own(group_size=-1).check({"model.layers.0.a": (64, 100)})
