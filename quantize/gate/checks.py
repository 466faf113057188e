"""What the accuracy gate checks and how it judges: plain numbers, no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantize.evaluation import Evaluation

Status = Literal["pass", "FAIL", "better"]
Kind = Literal["value", "recovery"]
Unit = Literal["metric", "percent", "se"]
"""What a tolerance is in: the metric's own unit, percent of the value, standard errors."""

HIGHER_IS_BETTER: dict[str, bool] = {
    "perplexity": False,
    "word_perplexity": False,
    "byte_perplexity": False,
    "bits_per_byte": False,
    "delta_nll": False,
    "kld_mean": False,
    "kld_median": False,
    "kld_p90": False,
    "kld_p99": False,
    "kld_p999": False,
    "top1_agreement": True,
    "bits_per_weight": False,
    "activated_parameters": False,
}
"""Figures of an Evaluation that can be checked; task metrics are written `task/metric`."""
ROLLING_ONLY = ("word_perplexity", "byte_perplexity", "bits_per_byte")
_STDERR = {
    "kld_mean": "kld_stderr",
    "delta_nll": "delta_nll_stderr",
    "top1_agreement": "top1_stderr",
}
_FIELDS = {field.name for field in dataclasses.fields(Evaluation)}
WITH_PARENT = tuple(metric for metric in HIGHER_IS_BETTER if f"baseline_{metric}" in _FIELDS)


@dataclass(frozen=True)
class Check:
    """One figure that a recipe must reach."""

    metric: str
    kind: Kind
    expected: float
    """The figure measured before, or the least recovery."""
    tolerance: float = 0.0
    unit: Unit = "metric"
    stderr: float | None = None
    """One standard error of `expected`, where the file has it."""

    @property
    def margin(self) -> float:
        """How far from `expected` the figure may be, in its own unit."""
        if self.unit == "percent":
            return abs(self.expected) * self.tolerance / 100
        return self.tolerance * (self.stderr or 0.0) if self.unit == "se" else self.tolerance

    @property
    def shown(self) -> str:
        """The tolerance as the file has it."""
        return f"{self.tolerance:g}" + {"metric": "", "percent": "%", "se": " se"}[self.unit]


@dataclass(frozen=True)
class Measurement:
    """One figure of a model, its parent's where there is one, and its direction; None
    where it was not measured."""

    value: float | None
    parent: float | None = None
    higher_is_better: bool = False
    missing: str = "was not measured"
    """Why `value` is None."""
    stderr: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check; every field is JSON."""

    recipe: str
    """Name of the file's entry, a recipe's or a checkpoint's."""
    metric: str
    kind: Kind
    value: float | None
    parent: float | None
    recovery: float | None
    """Share of the parent's accuracy that is left; None for a value check."""
    expected: float
    tolerance: str | None
    """As the file has it: 0.02, 20% or 3 se; None for a recovery check."""
    status: Status
    detail: str
    """Why it fails, or how far it is from what was expected."""
    stderr: float | None = None
    """Of `value`."""

    @property
    def ok(self) -> bool:
        """Whether the check passes; `better` does."""
        return self.status != "FAIL"


def judge(recipe: str, check: Check, figure: Measurement) -> Verdict:
    """Compare one measured figure with what the file expects. What cannot be
    compared fails, with the reason."""
    value, parent = _finite(figure.value), _finite(figure.parent)
    compare = _by_value if check.kind == "value" else _by_recovery
    status, detail, recovery = _unusable(figure) or compare(check, figure)
    tolerance = None
    if check.kind == "value":
        tolerance = check.shown
    return Verdict(
        recipe,
        check.metric,
        check.kind,
        value,
        parent,
        recovery,
        check.expected,
        tolerance,
        status,
        detail,
        _finite(figure.stderr),
    )


def figure_of(evaluation: Mapping[str, Any], metric: str) -> Measurement:
    """Look a figure of an Evaluation (as a dict) up."""
    missing = f"{evaluation.get('protocol', 'this protocol')} does not give it"
    parent = evaluation.get(f"baseline_{metric}")
    return Measurement(
        evaluation.get(metric),
        parent,
        HIGHER_IS_BETTER[metric],
        missing,
        stderr_of(evaluation, metric),
    )


def stderr_of(evaluation: Mapping[str, Any], metric: str) -> float | None:
    """One standard error of a figure, windows taken as the independent units; None for figures that
    have none, such as quantiles."""
    if metric == "perplexity":  # to first order: d exp(nll) = exp(nll) d nll
        value, error = evaluation.get("perplexity"), evaluation.get("nll_stderr")
        return None if value is None or error is None else float(value * error)
    found = evaluation.get(_STDERR.get(metric, ""))
    return None if found is None else float(found)


_Outcome = tuple[Status, str, "float | None"]


def _unusable(figure: Measurement) -> _Outcome | None:
    if figure.value is None:
        return "FAIL", figure.missing, None
    if not math.isfinite(figure.value):
        return "FAIL", f"is {figure.value}", None
    return None


def _by_value(check: Check, figure: Measurement) -> _Outcome:
    assert figure.value is not None
    worse = figure.value - check.expected
    limit = check.expected + check.margin
    sign = "<="
    if figure.higher_is_better:
        worse = -worse
        limit = check.expected - check.margin
        sign = ">="
    # Sums of floats end a few bits off; a tolerance of 0 means equal up to those.
    allowed = check.margin + 1e-9 * abs(check.expected)
    if worse > allowed:
        return "FAIL", f"must be {sign} {limit:.6g}", None
    if worse < -allowed:
        return "better", f"better than {check.expected:.6g} by more than {check.shown}", None
    return "pass", f"{sign} {limit:.6g}", None


def _by_recovery(check: Check, figure: Measurement) -> _Outcome:
    value, parent = figure.value, figure.parent
    assert value is not None
    if parent is None or not math.isfinite(parent):
        why = "was not measured" if parent is None else f"is {parent}"
        return "FAIL", f"the parent's figure {why}", None
    if value == parent:
        recovery = 1.0
    elif min(value, parent) <= 0:
        return (
            "FAIL",
            f"no share can be taken of {value:.6g} and {parent:.6g}; write value and tolerance",
            None,
        )
    else:
        recovery = value / parent if figure.higher_is_better else parent / value
    if recovery < check.expected - 1e-9:
        return "FAIL", f"recovery {recovery:.4f} must be >= {check.expected:g}", recovery
    return "pass", f"recovery {recovery:.4f} >= {check.expected:g}", recovery


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
