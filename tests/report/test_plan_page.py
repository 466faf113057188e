"""The page of a plan: what it draws is what the plan says, and it stands by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.pictures import Bars, Lines, Table
from quantize.plan.deploy import Plan, plan_for
from quantize.plan.gpus import gpu_named
from quantize.plan.request import single
from quantize.plan.served import dense
from quantize.report.html import write_page
from quantize.report.model import Group, Note, Report
from quantize.report.plan import plan_report
from quantize.report.svg import svg

LLAMA = dense("8b", 32, 4096, 32, 8, 128, 14336, 128256)
GIB = 2**30


def planned(**asked: object) -> Plan:
    request = single("folder/8b", "h100", 4, 1, **asked)
    return plan_for(request, {"8b": LLAMA})


@pytest.fixture(scope="module")
def report() -> Report:
    return plan_report(planned(rate=30.0, ttft=2.0, input=600, output=100), "1.0")


def section(report: Report, name: str) -> list[object]:
    return next(list(s.items) for s in report.sections if s.id == name)


def test_each_gpu_adds_up_to_its_memory(report: Report):
    bars = next(i for i in section(report, "gpus") if isinstance(i, Bars))
    assert bars.stacked
    assert bars.categories == ["0.0.0 8b"] or len(bars.categories) > 1
    for column in zip(*bars.series.values(), strict=True):
        assert sum(column) == pytest.approx(gpu_named("h100").memory_gib, abs=1e-6)
    assert bars.series["weights"][0] == pytest.approx(LLAMA.weights(1) / GIB)
    assert svg(bars, "a-").count("<path") > svg(bars, "a-").count("<g>")
    table = next(i for i in section(report, "gpus") if isinstance(i, Table))
    assert table.rows[0][3] == pytest.approx(LLAMA.weights(1) / GIB)


def test_goals_fall_with_the_rate(report: Report):
    lines = next(i for i in section(report, "goals") if isinstance(i, Lines))
    met = list(lines.series["8b"])
    assert met[0] == 1.0
    assert met[lines.x.index(1.0)] >= 0.9  # which the plan was made for
    assert met[-1] < met[0]


def test_memory_and_latency_are_drawn(report: Report):
    memory, requests = next(i for i in section(report, "time") if isinstance(i, Group)).pictures
    assert isinstance(memory, Lines)
    assert 0.0 < max(memory.series["in use"]) <= 1.0
    assert isinstance(requests, Lines)
    assert max(requests.series["running"]) >= 1
    ttft, tpot = next(i for i in section(report, "latency") if isinstance(i, Group)).pictures
    assert list(ttft.points) == [2000.0] or list(ttft.points) == [2.0]
    assert sum(tpot.counts) > 2000


def test_the_page_is_written(report: Report, tmp_path: Path):
    page = write_page(report, tmp_path / "plan.html")
    text = page.read_text(encoding="utf-8")
    assert "Deployment plan" in text
    assert "Memory of each GPU" in text
    assert "http" not in text.replace("http-equiv", "")
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert data["headlines"][0]["label"] == "GPUs"


def test_without_a_rate_nothing_is_simulated():
    made = plan_report(planned(), "1.0")
    assert isinstance(section(made, "goals")[0], Note)
    assert "time" not in {s.id for s in made.sections}


def test_what_cannot_be_says_so():
    made = plan_report(planned(rate=5000.0, ttft=0.5, input=600, output=100), "1.0")
    assert made.subtitle == "does not meet all goals"
    assert made.warnings
    assert made.warnings[0].startswith("8b: short of gpus")
    assert section(made, "binds")
