"""`pq bench fit`: the figures are those of the library, and mistakes are one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from quantize.bench.fit import FitSettings, bench_fit, random_weight, relative_mse
from quantize.cli import app
from quantize.errors import UsageError
from quantize.methods.sbvr.fit import fit
from quantize.solvers.grid import Grid


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", "fit", *args])


def facts(*args: str) -> dict[str, Any]:
    result = call(*args, "--json", "--repeat", "1")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_sbvr_reports_what_the_fit_reaches():
    found = facts(
        "--method",
        "sbvr",
        "--bits",
        "3",
        "--bias",
        "--lines",
        "16",
        "--shape",
        "32x300",
        "--seed",
        "7",
    )
    w = random_weight((32, 300), "gaussian", 7)
    weight = fit(w, 3, 128, bias=True, lines=16, seed=7)
    assert found["relative_mse"] == pytest.approx(
        float((weight.unpack() - w).square().sum() / w.square().sum())
    )
    assert found["bits_per_weight"] == weight.bits_per_weight
    assert (found["shapes"], found["scales"]) == (len(weight.lines), len(weight.scales))
    assert found["weights_per_second"] == pytest.approx(w.numel() / found["seconds"])
    assert found["peak_rss_bytes"] > 50e6
    assert found["peak_device_bytes"] is None
    wanted = {
        "method": "sbvr",
        "bits": 3,
        "bias": True,
        "lines": 16,
        "codebook": "auto",
        "shape": [32, 300],
    }
    wanted |= {
        "group_size": 128,
        "distribution": "gaussian",
        "seed": 7,
        "device": "cpu",
        "repeat": 1,
    }
    assert {key: found[key] for key in wanted} == wanted
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())


def test_rounding_to_nearest_is_the_baseline():
    absmax, best = (
        facts("--method", m, "--shape", "64x256", "--group-size", "64") for m in ("rtn", "rtn-mse")
    )
    w, grid = random_weight((64, 256), "gaussian", 0), Grid(4, 64)
    assert absmax["relative_mse"] == pytest.approx(
        relative_mse(w, grid.round(w, *grid.absmax_scale(w))[1])
    )
    assert best["relative_mse"] < absmax["relative_mse"]
    assert (absmax["bits_per_weight"], absmax["lines"], absmax["bias"], absmax["scales"]) == (
        4.25,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("name", "kurtosis"), [("gaussian", 3.0), ("laplace", 6.0), ("student", 9.0)]
)
def test_random_weights_have_the_moments_of_their_distribution(name: str, kurtosis: float):
    w = random_weight((1024, 1024), name, 0)
    assert torch.equal(w, random_weight((1024, 1024), name, 0))
    assert abs(float(w.mean())) < 0.01
    assert float(w.square().mean()) == pytest.approx(1, abs=0.02)
    assert float(w.double().pow(4).mean()) == pytest.approx(kurtosis, rel=0.25)


def test_the_table_names_what_was_measured():
    shown = call("--method", "sbvr", "--bits", "2", "--shape", "8x128", "--repeat", "2").stdout
    for part in (
        "sbvr 2 bits",
        "8x128 gaussian",
        "relative MSE",
        "weights per second",
        "bits per weight",
        "cpu",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--shape", "4096"), "--shape 4096"),
        (("--shape", "0x128"), "--shape 0x128"),
        (("--shape", "axb"), "--shape axb"),
        (("--method", "magic"), "--method magic"),
        (("--bits", "9"), "9 bit planes"),
        (("--bits", "1"), "1 bit planes"),
        (("--bits", "9", "--method", "rtn"), "--bits 9"),
        (("--bias", "--method", "rtn"), "--bias"),
        (("--group-size", "100", "--method", "rtn"), "--group-size 100"),
        (("--group-size", "100"), "group size 100"),
        (("--lines", "70000"), "--lines 70000"),
        (("--codebook", "x"), "--codebook x"),
        (("--distribution", "x"), "--distribution x"),
        (("--device", "nowhere"), "--device nowhere"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], named: str):
    result = call("--method", "sbvr", "--shape", "8x128", *args)
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""


def test_the_median_of_the_repeats_is_reported(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("quantize.bench.fit.time.perf_counter", lambda: next(ticks))
    measured = bench_fit(FitSettings("rtn", 4, (8, 128)), torch.device("cpu"), 3)
    assert (measured.seconds, measured.weights_per_second) == (2.0, 8 * 128 / 2)


def test_products_are_timed_and_printed(monkeypatch: pytest.MonkeyPatch):
    # Caches that few copies of so small a layer fill: what is tested is what is printed.
    monkeypatch.setattr("quantize.bench.multiply.bench_multiply.__defaults__", (20, 1 << 14))
    command = [
        "bench",
        "multiply",
        "--shape",
        "64x96",
        "--batch",
        "1",
        "--batch",
        "17",
        "--rounds",
        "2",
        "--lines",
        "4",
    ]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [(t["N"], t["K"], t["M"]) for t in facts["shapes"]] == [(64, 96, 1), (64, 96, 17)]
    for timing in facts["shapes"]:
        assert timing["speedup"] == pytest.approx(timing["plain_seconds"] / timing["seconds"])
        assert timing["fastest"] <= timing["seconds"] <= timing["slowest"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["tokens"] == []
    shown = CliRunner().invoke(app, command).stdout
    assert "64 x 96" in shown
    assert "copy" in shown


@pytest.mark.parametrize(
    ("args", "named"), [(("--shape", "9"), "--shape 9"), (("--bits", "1"), "1 bit planes")]
)
def test_mistakes_about_products_are_one_line(args: tuple[str, ...], named: str):
    result = CliRunner().invoke(app, ["bench", "multiply", *args])
    assert isinstance(result.exception, UsageError)
    assert named in str(result.exception)
