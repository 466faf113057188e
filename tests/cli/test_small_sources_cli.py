"""Commands on models that are published small: they do what they do with the 16-bit model that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, save_model, save_side_files
from gates import write_gate
from hostile import Call, refused
from safetensors.torch import load_file, save_file
from small_sources import float_quantized, fp8, gpt_oss
from transformers import AutoModelForCausalLM

from quantize.files.checkpoint import SINGLE_NAME, Checkpoint
from quantize.files.hashing import sha256_file
from quantize.gate.run import run_gate
from quantize.model.dequantized import open_source

Run = Callable[..., str]


@pytest.fixture
def run(pq: Call) -> Run:
    def run(*args: object) -> str:
        code, out, err = pq(*args)
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp8(tmp_path_factory.mktemp("small") / "qwen3-fp8")


@pytest.fixture(scope="module")
def plain(small: Path) -> Path:
    """The 16-bit model that the small one stands for, dequantized by stock transformers."""
    weights = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16).state_dict()
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]
    folder = save_model(small.parent / "plain", config, weights)
    save_side_files(folder)
    return folder


def converted(run: Run, model: Path, output: Path, *more: object) -> dict[str, Any]:
    args = ("--recipe", "rtn", "--device", "cpu", "--json", *more)
    summary: dict[str, Any] = json.loads(run("convert", "-m", model, "-o", output, *args))
    return summary


def test_a_conversion_is_that_of_the_16_bit_model(
    run: Run, small: Path, plain: Path, tmp_path: Path
):
    summary = converted(run, small, tmp_path / "small")
    of_plain = converted(run, plain, tmp_path / "plain")
    form = "FP8 in blocks of 128x128, 14 tensors dequantized to bfloat16"
    assert (summary["dequantized"], of_plain["dequantized"]) == (form, None)
    assert (
        summary["source_bytes"] == (small / SINGLE_NAME).stat().st_size < of_plain["source_bytes"]
    )
    ours, theirs = Checkpoint(tmp_path / "small"), Checkpoint(tmp_path / "plain")
    assert ours.config == theirs.config
    assert ours.config["quantization_config"]["format"] == "pack-quantized"
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
    record = json.loads((tmp_path / "small" / "pq.json").read_text())
    assert record["dequantized"] == {
        "format": "FP8 in blocks of 128x128",
        "tensors": 14,
        "dtype": "bfloat16",
        "dropped": 0,
        "stored_bytes": (small / SINGLE_NAME).stat().st_size,
    }
    assert record["source"][SINGLE_NAME] == sha256_file(small / SINGLE_NAME)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.arange(16)[None]).logits).all()


def test_what_people_see(pq: Call, run: Run, small: Path, tmp_path: Path):
    code, _, err = pq(
        "convert", "-m", small, "-o", tmp_path / "out", "-r", "rtn", "--device", "cpu"
    )
    assert code == 0
    says = "FP8 in blocks of 128x128, 14 tensors dequantized to bfloat16"
    assert f"the source is stored small: {says}" in " ".join(err.split())
    assert f"stored small: {says}" in run("inspect", tmp_path / "out")
    assert f"The source is stored small: {says}." in (tmp_path / "out.report.html").read_text()
    told = json.loads(run("inspect", small, "--json"))
    assert told["blocks"][0]["linears"][0]["format"] == "fp8"


def test_evaluation(run: Run, small: Path, plain: Path, text_file: Path, tmp_path: Path):
    args = ("--dataset", text_file, "--seqlen", 32, "--max-windows", 4, "--device", "cpu", "--json")
    alone = json.loads(run("eval", small, *args))
    assert alone["perplexity"] == json.loads(run("eval", plain, *args))["perplexity"]
    converted(run, small, tmp_path / "out")
    found = json.loads(run("eval", tmp_path / "out", "--baseline", small, *args))
    beside_plain = json.loads(run("eval", tmp_path / "out", "--baseline", plain, *args))
    # A token reads fewer bytes of what is stored small.
    fewer = found["baseline_bytes_per_token"]
    assert 0.4 < fewer / beside_plain["baseline_bytes_per_token"] < 0.7
    assert found == beside_plain | {"baseline": small.name, "baseline_bytes_per_token": fewer}
    assert found["baseline_perplexity"] == alone["perplexity"]


def test_the_parent_of_a_verification(run: Run, small: Path, tmp_path: Path):
    converted(run, small, tmp_path / "out")
    args = ("--parent", small, "--blocks", 1, "--json")
    found = json.loads(run("verify", tmp_path / "out", *args))
    checks = {check["name"]: check["ok"] for check in found["checks"]}
    assert all(checks[name] for name in ("source", "untouched", "recomputed", "outputs")), found


def test_the_model_of_a_gate(small: Path, text_file: Path, tmp_path: Path):
    file = write_gate(
        tmp_path / "gate.yaml",
        small,
        "rtn:\n  kld_mean: {value: 0.5, tolerance: 0.5}",
        f"evaluation: {{dataset: {text_file}, seqlen: 32, max_windows: 2}}",
    )
    result = run_gate(file, device=CPU)
    assert [verdict.ok for verdict in result.verdicts] == [True], result.verdicts
    assert 0 < result.figures["rtn"]["kld_mean"] < 1


def test_an_estimate_counts_the_16_bit_model(run: Run, small: Path, plain: Path):
    args = ("--recipe", "rtn", "--device", "cpu", "--json", "--no-time")
    ours, theirs = (json.loads(run("estimate", "-m", folder, *args)) for folder in (small, plain))
    assert ours["output"] == theirs["output"]


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_fp8_of_compressed_tensors(run: Run, strategy: str, tmp_path: Path):
    source = float_quantized(tmp_path / "source", strategy)
    summary = converted(run, source, tmp_path / "out")
    assert "14 scales of activations left out" in summary["dequantized"]
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["format"] == "pack-quantized"
    assert open_source(source).names("model.norm") == Checkpoint(tmp_path / "out").names(
        "model.norm"
    )


def test_perplexity_of_gpt_oss_is_that_of_transformers(run: Run, text_file: Path, tmp_path: Path):
    folder = gpt_oss(tmp_path / "source")
    args = ("--dataset", text_file, "--seqlen", 32, "--max-windows", 2, "--device", "cpu", "--json")
    found = json.loads(run("eval", folder, *args))
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    save_side_files(save_model(tmp_path / "plain", config, weights))
    theirs = json.loads(run("eval", tmp_path / "plain", *args))
    assert found["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)


def test_a_scale_that_is_no_number_is_found_before_work_begins(pq: Call, tmp_path: Path):
    source = fp8(tmp_path / "source")
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    tensors = load_file(source / SINGLE_NAME)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, source / SINGLE_NAME, metadata={"format": "pt"})
    (tmp_path / "here").mkdir()
    says = f"{name} holds a scale that is negative or no number"
    refused(pq, 4, says, source, tmp_path / "here" / "out", "--recipe", "rtn")
