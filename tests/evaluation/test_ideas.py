"""The rows of other papers' ideas: GEAR's cache, QQQ's smoothing and block floating point against plain arithmetic."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BlockMaker, ModelMaker

from quantize.formats.kv4 import KvNumerics, KvScheme, fake_quantize
from quantize.model import load
from quantize.model.arch import Edge

EVAL = Path(__file__).resolve().parents[2] / "eval"


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(EVAL))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


cache, stages, ideas = (module(name) for name in ("ideas_cache", "ideas_stages", "ideas"))


# GEAR


def test_the_low_rank_part_is_nearly_the_best_of_its_rank():
    x = torch.randn(2, 40, 16, dtype=torch.float64) @ torch.diag(0.6 ** torch.arange(16.0)).double()
    U, sizes, V = torch.linalg.svd(x)
    best = U[..., :3] @ torch.diag_embed(sizes[..., :3]) @ V[..., :3, :]
    made = cache.low_rank(x.float(), 3)
    assert torch.linalg.matrix_rank(made, rtol=1e-3).tolist() == [3, 3]
    assert (made - x).norm() < 1.03 * (best - x).norm()
    torch.testing.assert_close(cache.low_rank(made, 3), made, rtol=4e-3, atol=4e-3)


def test_codes_of_a_group_are_the_nearest_of_evenly_spaced_levels():
    """The step as float32 has it: nearer to a tie in float16 than that it may be the next one."""
    x = torch.randn(3, 24)
    found = cache.round_asymmetric(x, 3, 8)
    for row, rounded in zip(x.view(-1, 8), found.view(-1, 8), strict=True):
        low = row.min().half().float()
        step = ((row.max() - low) / 7).half().double()
        levels = low.double() + step * torch.arange(8)
        nearest = levels[(row.double()[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(rounded.double(), nearest, rtol=0, atol=1e-5)


def test_outliers_come_back_in_16_bits_and_do_not_widen_the_others_scale():
    x = torch.randn(1, 2, 50, 8)
    x[0, 1, 7, 3], x[0, 0, 9, 5] = 300.0, -200.0
    plain, kept = cache.Gear("kcvt"), cache.Gear("kcvt", sparse=0.13)
    for compress in ("key", "value"):
        found = getattr(kept, compress)(x)
        assert found[0, 1, 7, 3] == 300
        assert found[0, 0, 9, 5] == -200
        error, without = (
            (found - x).square().sum(),
            (getattr(plain, compress)(x) - x).square().sum(),
        )
        assert error < without / 6


def test_each_part_of_the_cache_lowers_its_error_and_costs_what_it_stores():
    x = torch.randn(1, 2, 64, 16) + 3 * torch.randn(1, 2, 64, 1) * torch.randn(1, 2, 1, 16)
    base, rank = cache.Gear("kivi", 2), cache.Gear("kivi", 2, rank=2)
    assert (rank.key(x) - x).norm() < 0.8 * (base.key(x) - x).norm()
    assert base.bits_per_value(64, 2, 16) == 2 + 32 / 64
    assert rank.bits_per_value(64, 2, 16) == 2.5 + 16 * 2 * (64 + 16) / (64 * 16)
    # Of 64 tokens two are apart at each end, told by 6 bits; of 32 channels one, told by 5.
    sparse = cache.Gear("kcvt", 4, sparse=0.0625)
    outliers = (4 / 64 * 22 + 2 / 32 * 21) / 2
    assert sparse.bits_per_value(64, 2, 16) == pytest.approx(4 + (0.5 + 1) / 2 + outliers)
    assert cache.Gear("per-token").bits_per_value(64, 2, 16) == 4 + 24 / 16


def attention_of(gear: Any) -> Any:
    kv = cache.GearAttention(KvNumerics(KvScheme(symmetric=False), False, False), 2, 8)
    kv.gear = gear
    return kv


def test_a_chunk_sees_itself_as_it_is_and_those_before_it_compressed():
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    found = attention_of(cache.Gear("kivi", 2, chunk=8))(q, k, v, None, 0.3)
    for t in range(20):
        first = t // 8 * 8
        keys, values = k.clone(), v.clone()
        for start in range(0, first, 8):
            part = slice(start, start + 8)
            keys[:, :, part] = cache.Gear("kivi", 2).key(k[:, :, part])
            values[:, :, part] = cache.Gear("kivi", 2).value(v[:, :, part])
        seen = slice(0, t + 1)
        repeated = [x[:, :, seen].double().repeat_interleave(2, 1) for x in (keys, values)]
        shares = (q[:, :, t : t + 1].double() @ repeated[0].transpose(2, 3) * 0.3).softmax(-1)
        torch.testing.assert_close(
            found[:, :, t : t + 1].double(), shares @ repeated[1], rtol=1e-4, atol=1e-5
        )


def test_with_nothing_added_it_is_the_cache_of_pq():
    k = torch.randn(1, 2, 12, 8)
    gear = cache.Gear("per-token")
    expected = fake_quantize(k, KvScheme(symmetric=False))
    assert torch.equal(gear.key(k), expected)
    assert torch.equal(gear.value(k), expected)


def test_the_largest_of_a_token_and_head_leave_the_others_a_finer_scale():
    x = torch.randn(1, 2, 12, 16)
    x[0, 1, 3, 4], x[0, 1, 3, 9] = -40.0, 25.0
    gear, scheme = cache.Gear("per-token", apart=2), KvScheme(symmetric=False)
    assert gear.bits_per_value(64, 2, 16) == 4 + 24 / 16 + 2 * (16 + 4) / 16
    rest = x.clone()
    rest.scatter_(-1, x.abs().topk(2).indices, 0.0)
    expected = fake_quantize(rest, scheme) + (x - rest).half()
    for found in (gear.key(x), gear.value(x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (gear.key(x) - x)[0, 1, 3].abs().max() < 0.3
    assert (fake_quantize(x, scheme) - x)[0, 1, 3].abs().max() > 0.6


def test_a_row_rounds_what_it_says(converted: ModelMaker, tiny: ModelMaker):
    """A packed linear of a model that is loaded meanwhile gets INT8 inputs, an attention GEAR's cache."""
    device, args = torch.device("cpu"), (torch.float32, "kernel")
    with ideas._int8_inputs():
        linear = load.load_model(converted("gptq", "llama"), device, *args)
    linear = linear.model.layers[0].mlp.gate_proj
    x = torch.randn(5, 128)
    step = x.double().abs().amax(1, keepdim=True) / 127
    expected = (x / step).round() * step @ linear.weight.double().T
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)
    gear = cache.Gear("kivi", 2)
    with cache.geared(gear):
        model = load.load_model(tiny("llama"), device, *args, attention=ideas.INT4_16BIT)
    attention = model.model.layers[1].self_attn
    assert isinstance(attention.kv, cache.GearAttention)
    assert attention.kv.gear is gear
    ids = torch.arange(24)[None]
    plain = load.load_model(tiny("llama"), device, *args)
    assert 0.01 < (model(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm() < 1


# QQQ


def test_smoothing_divides_the_channels_above_the_threshold_alone():
    scale = stages.smoothing_scale(torch.tensor([0.5, 2.0, 8.0, 0.0]), 2.0)
    assert scale.tolist() == [1, 1, 4, 1]


def outputs(block: Any, edge: Edge) -> torch.Tensor:
    return torch.cat([block.forward(block.module, x) for x in block.inputs])


def test_smoothing_finds_outlier_channels_and_leaves_the_function(make_block: BlockMaker):
    block = make_block("llama")
    norm = block.module.get_submodule("input_layernorm")
    norm.weight.data[[5, 77]] *= 60
    for name in ("q_proj", "k_proj", "v_proj"):
        block.linear(f"self_attn.{name}").weight.data[:, [5, 77]] /= 60
    edge = block.edges[0]
    assert edge.source == "input_layernorm"
    before, weight = outputs(block, edge), norm.weight.clone()
    stages.OutlierSmoothing(thresholds=12).apply(block)
    torch.testing.assert_close(outputs(block, edge), before, rtol=1e-4, atol=1e-4)
    moved = (weight / norm.weight).squeeze()
    assert set(moved.topk(2).indices.tolist()) == {5, 77}
    assert float(moved.min()) == pytest.approx(1, abs=0.02)
    noted = block.report[edge.name]
    assert noted["search_ratio"] < 0.7
    assert noted["smoothed_channels"] >= 2


# Block floating point


def test_mx_elements_are_the_nearest_under_the_shared_exponent():
    w = torch.randn(4, 64) * 0.03
    fp4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for element, levels in (("int4", torch.arange(-7, 8.0)), ("e2m1", torch.cat((-fp4, fp4)))):
        found = stages.round_mx(w, 32, element).view(-1, 32)
        for row, rounded in zip(w.view(-1, 32).double(), found.double(), strict=True):
            exponent = torch.frexp(row.abs().max()).exponent - 1  # max = 1.… × 2^exponent
            values = levels.double() * 2.0 ** float(exponent - 2)
            best = (row[:, None] - values).abs().amin(1)
            torch.testing.assert_close((row - rounded).abs(), best, rtol=1e-6, atol=0)


def test_block_scales_are_the_powers_of_two_with_the_least_error():
    w, grid = torch.randn(6, 64).float() ** 3, stages.BlockGrid(4, 16)
    scale, factor = grid.fit_scale(w)
    error = grid.group_error(w, scale, factor, torch.ones(1, 64))
    powers = torch.exp2(torch.arange(-12, 12.0))
    tried = torch.stack(
        [grid.group_error(w, torch.full_like(scale, p), factor, torch.ones(1, 64)) for p in powers]
    )
    assert torch.equal(torch.exp2(scale.log2().round()), scale)
    torch.testing.assert_close(error, tried.amin(0))


def test_outlier_channels_keep_more_bits_and_all_is_counted(make_block: BlockMaker):
    block = make_block("llama", with_parent=True)
    block.linear("mlp.gate_proj").weight.data[:, 9] *= 200
    before = block.linear("mlp.gate_proj").weight.clone()
    stage = stages.BlockFloat(group_size=64, outliers=1, aim="layer", layers=("*.gate_proj",))
    stage.apply(block)
    after = block.linear("mlp.gate_proj").weight
    assert torch.equal(after.bfloat16().float(), after)  # what a 16-bit checkpoint holds
    errors = (after - before).norm(dim=0) / before.norm(dim=0)
    assert errors[9] < 0.02 < errors.median()
    assert stage.kept(128) == 2
    assert stage.stored_bits(256, 128) == 4 + 8 / 64 + 4 * 2 / 128 + 2 * (7 + 8) / (256 * 128)


# The table


def row(name: str, model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "idea": "weights",
        "name": name,
        "simulated": False,
        "bits": 4.125,
        "kld_mean": 0.25,
        "kld_stderr": 0.01,
    } | more


def test_missing_rows_alone_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output, asked = tmp_path / "ideas.json", []

    def measured(which: Any, model: Path, args: Any, folder: Path) -> dict[str, Any]:
        asked.append((which.name, model.name))
        return row(which.name, model.name)

    monkeypatch.setattr(ideas, "measure", measured)
    monkeypatch.setattr(ideas.measuring, "head", lambda args: {"protocol": "p", "rows": []})

    def run(*more: str) -> None:
        told = ["ideas.py", "--model", "A", "--model", "B", "--output", str(output), *more]
        monkeypatch.setattr(sys, "argv", told)
        ideas.main()

    run("--only", "^KIVI, 4 bits$", "--seconds", "0.0000001")
    assert asked == []
    run("--only", "^KIVI, 4 bits$")
    run("--only", "^(KIVI, 4 bits|blocks of 64)$")
    assert asked == [(name, m) for name in ("KIVI, 4 bits", "blocks of 64") for m in "AB"]
    assert len(json.loads(output.read_text())["rows"]) == 4
    assert len({row.name for row in ideas.ROWS}) == len(ideas.ROWS)


def test_rows_of_other_files_are_taken_under_the_same_protocol_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    held = json.loads((EVAL / "results" / "yardstick-4bit.json").read_text())
    known = next(r for r in ideas.ROWS if r.name == "GPTQ, W4A8-FP8")
    monkeypatch.setattr(ideas.measuring, "head", lambda args: {"protocol": held["protocol"]})
    found = ideas.measure(known, Path("yardstick"), None, None)
    expected = next(
        r
        for r in held["rows"]
        if (r["model"], r["recipe"], r["activations"]) == ("yardstick", "gptq", "fp8")
    )
    assert found["kld_mean"] == expected["figures"]["kernel"]["kld_mean"]
    monkeypatch.setattr(ideas.measuring, "head", lambda args: {"protocol": "another"})
    assert ideas._from_file(known, Path("yardstick"), None) is None
    assert known.stages


def test_the_page_puts_models_beside_each_other_by_bits():
    rows = [
        row("b", "m1", bits=4.5, simulated=True),
        row("a", "m1"),
        row("a", "m2", kld_mean=0.5),
        row("c", "m1", idea="INT4 cache"),
    ]
    lines = ideas.table({"rows": rows}).splitlines()
    assert lines[0] == "| INT4 cache | bits per value | KLD, m1 | KLD, m2 |"
    assert lines[4:] == [
        "| weights | bits per weight | KLD, m1 | KLD, m2 |",
        "|---|---:|---:|---:|",
        "| a | 4.125 | 0.25000 ± 0.01000 | 0.50000 ± 0.01000 |",
        "| b (simulated) | 4.500 | 0.25000 ± 0.01000 |  |",
    ]
