"""Per-token records and the statistics made from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.evaluation.records import Records


def filled(
    windows: int = 6, P: int = 10, V: int = 50, seed: int = 0, baseline: bool = True
) -> Records:
    generator = torch.Generator().manual_seed(seed)
    records = Records()
    for window in range(windows):
        p = torch.randn(P, V, generator=generator) * 3
        q = p + 0.3 * torch.randn(P, V, generator=generator) * (1 + window)
        records.add(
            window, 2, q, p if baseline else None, torch.randint(V, (P,), generator=generator)
        )
    return records


def test_columns_follow_their_definitions():
    generator = torch.Generator().manual_seed(1)
    q, p = torch.randn(7, 30, generator=generator) * 4, torch.randn(7, 30, generator=generator) * 4
    targets = torch.randint(30, (7,), generator=generator)
    records = Records()
    records.add(3, 5, q, p, targets)
    log_q, log_p = q.double().log_softmax(-1), p.double().log_softmax(-1)
    rows = range(7)
    assert records["window"].tolist() == [3] * 7
    assert records["position"].tolist() == list(range(6, 13))
    assert records["token"].tolist() == targets.tolist()
    assert torch.allclose(records["nll"].double(), -log_q[rows, targets], rtol=1e-5)
    assert torch.allclose(records["baseline_nll"].double(), -log_p[rows, targets], rtol=1e-5)
    assert torch.allclose(
        records["kld"].double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5
    )
    assert torch.equal(records["top1"].long(), q.argmax(-1))
    assert torch.equal(records["baseline_top1"].long(), p.argmax(-1))


@pytest.mark.parametrize("baseline", [False, True])
def test_a_large_vocabulary_costs_no_digits(baseline: bool):
    """Gemma's 262,144 tokens: sums in the order of the row would be off by 1e-5 in the mean."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 1 << 18, generator=generator) * 2.5
    targets = torch.full((6,), 7)
    logits[:, 7] += 12
    records = Records()
    records.add(0, 0, logits, logits + 1 if baseline else None, targets)
    wanted = -logits.double().log_softmax(-1)[:, 7]
    for name in ("nll", "baseline_nll") if baseline else ("nll",):
        assert (records[name].double() - wanted).abs().max() < 3e-6, name


def test_the_inputs_are_not_changed():
    q, p = torch.randn(4, 9), torch.randn(4, 9)
    before = q.clone(), p.clone()
    Records().add(0, 0, q, p, torch.zeros(4, dtype=torch.long))
    assert torch.equal(q, before[0])
    assert torch.equal(p, before[1])


def test_a_model_alone_has_fewer_columns():
    records = filled(baseline=False)
    assert "kld" not in records
    assert records.worst(3) == []
    assert records.by_position()["kld"] is None


def test_the_error_of_a_mean_counts_windows_not_tokens():
    """Tokens of one window share a shift: the spread of the mean over many draws is what the estimate says."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        records = Records()
        values = (rng.normal(size=(20, 1)) + 0.5 * rng.normal(size=(20, 30))).astype("float32")
        for window in range(20):
            records.columns.setdefault("window", []).append(
                torch.full((30,), window, dtype=torch.int32)
            )
            records.columns.setdefault("token", []).append(torch.zeros(30, dtype=torch.int32))
        estimate = records.mean(torch.from_numpy(values.flatten()))
        means.append(estimate.mean)
        errors.append(estimate.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    naive = np.sqrt(1.25 / 600)
    assert np.mean(errors) > 4 * naive


def test_one_window_has_no_error():
    assert filled(windows=1).mean(filled(windows=1)["nll"]).stderr is None


@settings(max_examples=50)
@given(st.integers(1, 200), st.sampled_from([0.5, 0.9, 0.99, 0.999, 1.0]), st.integers(0, 5))
def test_quantiles(n: int, q: float, seed: int):
    records = Records({"kld": [torch.rand(n, generator=torch.Generator().manual_seed(seed))]})
    found, values = records.quantile("kld", q), records["kld"].numpy()
    assert found == pytest.approx(float(np.quantile(values, q, method="inverted_cdf")))


def test_curves_by_position():
    records = filled(windows=3, P=100)
    curve = records.by_position()
    assert curve["start"][0] == 1
    assert len(curve["start"]) == len(curve["nll"]) == len(curve["kld"]) <= 32
    width = curve["start"][1] - curve["start"][0]
    inside = records["position"] < curve["start"][1]
    assert width == math.ceil(102 / 32)
    assert curve["nll"][0] == pytest.approx(float(records["nll"][inside].mean()), rel=1e-5)


def test_the_worst_come_first():
    records = filled()
    rows = records.worst(4)
    values = records["kld"][rows].tolist()
    assert values == sorted(records["kld"].tolist(), reverse=True)[:4]


def test_parquet_round_trip(tmp_path: Path):
    records = filled()
    records.save(tmp_path / "r.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "r.parquet")
    assert set(table.column_names) == set(records.columns)
    for name in records.columns:
        assert np.array_equal(table[name].to_numpy(), records[name].numpy()), name
    assert str(table.schema.field("kld").type) == "float"
    assert str(table.schema.field("window").type) == "int32"
