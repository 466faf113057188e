"""`pq bench ffn`: what it counts, and what it refuses; its times mean something on an idle machine alone."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker
from torch import Tensor
from typer.testing import CliRunner, Result

from quantize.bench import ffn as bench_ffn
from quantize.bench.ffn import Form, bench_forms, random_mixture, require_right
from quantize.cli import app
from quantize.errors import ModelError, PqError, QualityError
from quantize.model.arch import ExpertSizes
from quantize.model.moe import MoeFfn, Threshold, TopK


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_ffn, "_CACHES", 1 << 16)


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", "ffn", "--rounds", "2", *args])


def facts(*args: str) -> dict[str, Any]:
    result = call("--json", *args)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


SMALL = ("--hidden", "32", "--intermediate", "96", "--form", "48+3x16@1")


def test_figures_are_those_of_the_sizes():
    found = facts(*SMALL, "--form", "32+4x16@2", "--batch", "1", "--batch", "9")
    assert (found["hidden"], found["intermediate"], found["dtype"]) == (32, 96, "float32")
    assert found["versions"]["torch"] == torch.__version__
    assert [(t["form"]["n"], t["M"]) for t in found["timings"]] == [(3, 1), (3, 9), (4, 1), (4, 9)]
    for t in found["timings"]:
        form, moved = t["form"], 2 * t["M"] * 32 * 4
        fixed, expert, dense = (
            3 * 32 * form["shared"] + 32 * (form["n"] + 1),
            3 * 32 * form["size"],
            3 * 32 * 96,
        )
        assert t["experts_per_token"] == form["k"]
        assert t["activated"] == pytest.approx((fixed + form["k"] * expert) / dense)
        assert t["plain_bytes_read"] == moved + 4 * dense
        assert t["speedup"] == pytest.approx(t["plain_seconds"] / t["seconds"])
        assert 0 < t["fastest"] <= t["seconds"] <= t["slowest"]
        assert t["plain_fastest"] <= t["plain_seconds"] <= t["plain_slowest"]
        assert t["loop_seconds"] > 0
        visited = (t["bytes_read"] - moved - 4 * fixed) / (4 * expert)
        assert form["k"] - 1e-6 <= visited <= min(form["n"], form["k"] * t["M"]) + 1e-6
        assert t["layers"] == max(2, (1 << 16) // (4 * (fixed + form["n"] * expert)) + 1)


def test_a_fraction_of_experts_is_a_threshold():
    mixture = random_mixture(32, Form(48, 6, 16, 2.5), CPU, torch.float32)
    assert isinstance(mixture.policy, Threshold)
    visits = mixture.weights(torch.randn(2000, 32)) != 0
    assert float(visits.float().sum(1).mean()) == pytest.approx(2.5, abs=0.2)
    assert random_mixture(32, Form(48, 6, 16, 2.0), CPU, torch.float32).policy == TopK(2)
    with pytest.raises(ValueError, match=r"form 48\+6x16@7: 7 of 6 experts"):
        random_mixture(32, Form(48, 6, 16, 7), CPU, torch.float32)


def test_times_are_medians_for_each_layer(monkeypatch: pytest.MonkeyPatch):
    times = [[2.0, 6.0, 4.0], [30.0, 10.0, 20.0], [8.0, 8.0, 9.0]]
    monkeypatch.setattr(bench_ffn, "take_turns", lambda watches, rounds: times)
    (timing,) = bench_forms(32, 4096, [Form(48, 2, 2048, 1)], [1], CPU, torch.float32).timings
    assert timing.layers == 2
    assert (timing.seconds, timing.fastest, timing.slowest) == (2, 1, 3)
    assert (timing.plain_seconds, timing.plain_fastest, timing.plain_slowest) == (10, 5, 15)
    assert (timing.loop_seconds, timing.speedup) == (4, 5)


@pytest.mark.parametrize("stacked", [True, False])
def test_what_is_wrong_is_not_timed(stacked: bool, monkeypatch: pytest.MonkeyPatch):
    forward = MoeFfn.forward

    def wrong(mixture: MoeFfn, x: Tensor) -> Tensor:
        y = forward(mixture, x)
        if mixture.is_stacked == stacked:
            y[-1, 0] += 0.01 * y.abs().max()
        return y

    monkeypatch.setattr(MoeFfn, "forward", wrong)
    with pytest.raises(
        QualityError,
        match=rf"{'stacked' if stacked else 'looped'} experts, 3 rows: off by 1\.0e-02",
    ):
        bench_forms(32, 96, [Form(48, 3, 16, 1)], [3], CPU, torch.float32, rounds=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_right_passes_in_every_dtype(dtype: torch.dtype):
    mixture = random_mixture(64, Form(96, 5, 32, 2), CPU, dtype)
    require_right(mixture, torch.randn(11, 64, dtype=dtype))
    broken = copy.deepcopy(mixture)
    broken.experts[0].down_proj.weight.fill_(float("nan"))
    with pytest.raises(QualityError, match="off by nan"):
        require_right(broken, torch.randn(11, 64, dtype=dtype))


def test_a_model_brings_its_own_experts(tiny: ModelMaker):
    found = facts("--model", str(tiny("qwen2_moe")), "--batch", "2")
    sizes = ExpertSizes.of(json.loads((tiny("qwen2_moe") / "config.json").read_text()))
    (timing,) = found["timings"]
    assert timing["form"] == {
        "shared": sizes.shared,
        "n": sizes.n,
        "size": sizes.size,
        "k": sizes.top_k,
    }
    assert (found["hidden"], found["intermediate"]) == (128, sizes.shared + sizes.n * sizes.size)
    assert timing["experts_per_token"] == sizes.top_k


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("llama", {}, "llama model has no experts"),
        ("qwen2_moe", {"decoder_sparse_step": 3}, "every block is dense"),
    ],
)
def test_models_without_experts_are_refused(
    model_type: str, changes: dict[str, Any], named: str, tiny: ModelMaker
):
    result = call("--model", str(tiny(model_type, **changes)))
    assert isinstance(result.exception, ModelError)
    assert named in str(result.exception)


def test_the_table_names_what_was_measured():
    shown = call(*SMALL, "--batch", "1").stdout
    for part in ("32 x 96 float32", "48+3x16@1", "dense", "loop"):
        assert part in shown


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--form", "8x16"), "--form 8x16"),
        (("--form", "0+8x16@2"), "--form 0+8x16@2"),
        (("--form", "48+8x16@9"), "up to 8 experts"),
        (("--form", "48+8x16@0"), "more than 0"),
        (("--form", "48+8x16@2", "--model", "x"), "--model and --form"),
        (("--dtype", "int8"), "--dtype int8"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--model", "./nowhere"), "no such folder"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], named: str):
    result = call(*args)
    assert isinstance(result.exception, PqError)
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
