from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.evaluation import Evaluation
from quantize.files.resources import data_dir
from quantize.gate.checks import (
    HIGHER_IS_BETTER,
    ROLLING_ONLY,
    WITH_PARENT,
    Check,
    Measurement,
    Verdict,
    judge,
)
from quantize.gate.file import load_gate
from quantize.recipe.files import shipped_recipes
from quantize.recipe.recipe import load_recipe

BASELINES = data_dir("eval") / "baselines.yaml"


def verdict_of(check: Check, value: float | None, parent: float | None = None) -> Verdict:
    return judge(
        "r",
        check,
        Measurement(value, parent, HIGHER_IS_BETTER.get(check.metric, False), "no such figure"),
    )


@pytest.mark.parametrize(
    ("metric", "value", "tolerance", "percent", "measured", "status"),
    [
        ("kld_mean", 0.02, 30, True, 0.0259, "pass"),
        ("kld_mean", 0.02, 30, True, 0.0261, "FAIL"),
        ("kld_mean", 0.02, 30, True, 0.0139, "better"),
        ("kld_mean", 0.02, 0.002, False, 0.0219, "pass"),
        ("kld_mean", 0.02, 0.002, False, 0.0221, "FAIL"),
        ("top1_agreement", 0.9, 0.02, False, 0.881, "pass"),
        ("top1_agreement", 0.9, 0.02, False, 0.879, "FAIL"),
        ("top1_agreement", 0.9, 0.02, False, 0.921, "better"),
        ("top1_agreement", 0.9, 10, True, 0.82, "pass"),
        ("bits_per_weight", 4.125, 0, False, 4.125 * (1 + 1e-15), "pass"),
        ("bits_per_weight", 4.125, 0, False, 4.126, "FAIL"),
        ("delta_nll", -0.01, 50, True, -0.004, "FAIL"),
        ("delta_nll", -0.01, 50, True, -0.006, "pass"),
    ],
)
def test_value_tolerance_and_direction(
    metric: str, value: float, tolerance: float, percent: bool, measured: float, status: str
):
    verdict = verdict_of(
        Check(metric, "value", value, tolerance, "percent" if percent else "metric"), measured
    )
    assert (verdict.status, verdict.ok, verdict.value) == (status, status != "FAIL", measured)


def test_the_ends_of_the_tolerance_belong_to_it():
    check = Check("kld_mean", "value", 0.1, 0.3)  # 0.1 + 0.3 is not 0.4 in floating point
    assert verdict_of(check, 0.4).status == "pass"
    assert verdict_of(Check("top1_agreement", "value", 0.4, 0.3), 0.1).status == "pass"


@given(
    value=st.floats(0.01, 100),
    tolerance=st.floats(0, 10),
    measured=st.floats(0.01, 100),
    higher=st.booleans(),
)
def test_directions_mirror_each_other(
    value: float, tolerance: float, measured: float, higher: bool
):
    check = Check("t/m", "value", value, tolerance)
    one = judge("r", check, Measurement(measured, None, higher))
    other = judge("r", check, Measurement(2 * value - measured, None, not higher))
    if abs(abs(measured - value) - tolerance) > 1e-6 * value:
        assert one.status == other.status


def test_recovery_has_a_direction():
    least = Check("perplexity", "recovery", 0.95)
    assert verdict_of(least, 10.5, 10.0).recovery == pytest.approx(10 / 10.5)
    assert verdict_of(least, 10.5, 10.0).ok
    assert not verdict_of(least, 10.6, 10.0).ok
    assert verdict_of(least, 9.0, 10.0).ok
    score = Check("arc_easy/acc", "recovery", 0.95)
    assert judge("r", score, Measurement(0.48, 0.50, True)).ok
    worse = judge("r", score, Measurement(0.47, 0.50, True))
    assert not worse.ok
    assert worse.recovery == pytest.approx(0.94)
    assert "0.9400 must be >= 0.95" in worse.detail


@pytest.mark.parametrize("kind", ["value", "recovery"])
@pytest.mark.parametrize(
    ("value", "why"), [(None, "no such figure"), (math.nan, "is nan"), (math.inf, "is inf")]
)
def test_what_is_not_a_number_fails_with_the_reason(kind: Any, value: float | None, why: str):
    verdict = verdict_of(Check("perplexity", kind, 0.5, 1e9), value, 10.0)
    assert (verdict.status, verdict.value) == ("FAIL", None)
    assert why in verdict.detail


@pytest.mark.parametrize("parent", [None, math.nan, 0.0, -1.0])
def test_a_parent_that_nothing_can_be_compared_with_fails(parent: float | None):
    assert verdict_of(Check("perplexity", "recovery", 0.01), 5.0, parent).status == "FAIL"


def test_equal_figures_recover_all_even_at_zero():
    assert judge("r", Check("t/m", "recovery", 1.0), Measurement(0.0, 0.0, True)).ok


def test_every_figure_of_an_evaluation_can_be_checked():
    hints = {f.name: f.type for f in dataclasses.fields(Evaluation)}
    figures = {n for n, t in hints.items() if "float" in str(t) and "dict" not in str(t)}
    left_out = {n for n in figures if n.endswith("_stderr") or n.startswith("baseline_")}
    left_out |= {"kv_bits", "bytes_per_token"}  # of the recipe alone
    assert figures - left_out == set(HIGHER_IS_BETTER)
    assert [m for m, higher in HIGHER_IS_BETTER.items() if higher] == ["top1_agreement"]
    assert ("perplexity", *ROLLING_ONLY, "activated_parameters") == WITH_PARENT


def test_every_shipped_recipe_is_gated():
    gate = load_gate(BASELINES)
    assert {entry.name for entry in gate.entries} == {path.stem for path in shipped_recipes()}
    for entry in gate.entries:
        kinds = {(check.metric, check.kind) for check in entry.checks}
        assert {
            ("kld_mean", "value"),
            ("perplexity", "recovery"),
            ("top1_agreement", "value"),
        } <= kinds, entry.name
        encodes = any(stage.kind == "encode" for stage in load_recipe(entry.name).stages)
        assert (("bits_per_weight", "value") in kinds) == encodes, entry.name
    assert gate.model == data_dir("eval") / "reference-model"


def test_tolerances_are_narrower_than_what_sets_recipes_apart():
    checks = {
        e.name: next(c for c in e.checks if c.metric == "kld_mean")
        for e in load_gate(BASELINES).entries
    }
    order = ["fireq-linear", "gptq", "awq", "fireq-paper-linear", "rtn"]
    for better, worse in itertools.pairwise(order):
        assert checks[better].expected + checks[better].margin < checks[worse].expected, better
