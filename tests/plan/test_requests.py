"""Traces from files: columns, lines of mistakes, and the public ones replayed in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize.errors import UsageError
from quantize.plan.gpus import GPUS
from quantize.plan.served import dense
from quantize.plan.simulate.costs import model_costs
from quantize.plan.simulate.prefixes import Cached, chains
from quantize.plan.simulate.requests import TRACE_DIR, merged, requests
from quantize.plan.simulate.run import simulate
from quantize.plan.simulate.setup import EngineSetup

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"


def test_a_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text("input_tokens,timestamp_ms,output_tokens\n5,2500,7\n3,1500,0\n\n9,1500,1\n")
    found = requests(str(path))
    assert found.arrival.tolist() == [0.0, 0.0, 1.0]
    assert found.input.tolist() == [3, 9, 5]
    assert found.output.tolist() == [1, 1, 7]
    assert found.prefix.tolist() == [0, 0, 0]
    assert found.rate == pytest.approx(2.0)
    assert found.at_rate(8.0).rate == pytest.approx(8.0)
    twice = merged([found, found.for_model(1)])
    assert twice.model.tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,input,output\n", "line 1: no column for time; call it one of timestamp_s"),
        ("timestamp,input\n1,2\n", "line 1: no column for output"),
        ("timestamp,input,output\n1,2,3\n2,x,3\n", "line 3: input is 'x'"),
        ("timestamp,input,output\n1,2\n", "line 2: output is nothing"),
        ("timestamp,input,output\n1,-2,3\n", "line 2: input is '-2'"),
        ("timestamp,input,output\nnan,2,3\n", "line 2: time is 'nan'"),
        ("timestamp,input,output\n", "holds no requests"),
        ("timestamp,input,output\n\n", "holds no requests"),
    ],
)
def test_a_mistake_and_its_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        requests(str(path))


def test_names_need_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(TRACE_DIR, raising=False)
    with pytest.raises(UsageError, match=r"set PQ_TRACE_DIR to .* azure_2023_code\.csv"):
        requests("azure-code")
    monkeypatch.setenv(TRACE_DIR, str(tmp_path))
    with pytest.raises(UsageError, match="cannot be read"):
        requests("azure-code")


def test_drawn_ones_are_of_the_means_asked_for():
    found = requests("poisson:8:4000:300:100", seed=5)
    assert len(found) == 4000
    assert found.rate == pytest.approx(8.0, rel=0.1)
    assert found.input.mean() == pytest.approx(300, rel=0.1)
    assert found.output.mean() == pytest.approx(100, rel=0.1)
    again = requests("poisson:8:4000:300:100", seed=5)
    np.testing.assert_array_equal(found.arrival, again.arrival)
    for wrong in ("poisson:", "poisson:x", "poisson:0", "poisson:1:2:3:4:5"):
        with pytest.raises(UsageError, match="--trace poisson:"):
            requests(wrong)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "seconds", "means"),
    [
        ("azure-code", 8819, 3436, (2048, 28)),
        ("azure-conv", 19366, 3502, (1155, 211)),
        ("mooncake", 12031, 3537, None),
    ],
)
def test_public_traces_are_replayed_in_full(name: str, count: int, seconds: int, means):
    if not SHARED.is_dir():
        pytest.skip("no traces beside the checkout")
    found = requests(name, folder=SHARED)
    assert len(found) == count
    assert found.arrival[-1] == pytest.approx(seconds, abs=2)
    if means:
        assert found.input.mean() == pytest.approx(means[0], rel=0.01)
        assert found.output.mean() == pytest.approx(means[1], rel=0.02)
    llama = dense("8b", 32, 4096, 32, 8, 128, 14336, 128256)
    costs = model_costs(llama, next(gpu for gpu in GPUS if gpu.name == "h100-sxm"), 1)
    made_of = chains(found, 16)
    engines = [(EngineSetup(costs, gpus=(i,)), Cached(25_000, made_of)) for i in range(8)]
    made = simulate(found, engines)
    assert not np.isnan(made.finish).any()
    assert np.isnan(made.first).sum() == 0
