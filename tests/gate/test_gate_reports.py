"""JUnit XML, markdown and compact JSON of a gate's run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from gates import evaluation, result_of

from quantize.gate.reports import compact, junit, markdown
from quantize.gate.run import GateResult

ACCEPT = "pq gate run 'a b.yaml' --update-baselines --reason '...'"
FILE = """recipes:
  fireq:
    kld_mean: {value: 0.02, stderr: 0.001, tolerance: 3 se}
    perplexity: {recovery: 0.9}
  rtn: {top1_agreement: {value: 0.5, tolerance: 0}, bits_per_weight: {value: 4.125, tolerance: 0}}
"""
HOSTILE = "a|b <i>&\x00\x1b\ud800`x` [c](d)\n# e *f*"


@pytest.fixture
def result(tmp_path: Path) -> GateResult:
    """One failure (KLD), one better (top-1), two that pass."""
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    found = result_of(path, kld_mean=0.0301, kld_stderr=0.0012)
    figures = dataclasses.asdict(
        evaluation(kld_mean=0.0301, dtype="float32", by_position={"kld": [0.0] * 32})
    )
    return dataclasses.replace(found, figures={"fireq": figures, "rtn": figures}, seconds=12.5)


def test_junit_counts_and_names_every_check(result: GateResult):
    root = ET.fromstring(junit(result, ACCEPT))
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuites", "4", "1")
    suites = root.findall("testsuite")
    assert [s.get("tests") for s in suites] == ["2", "2"]
    assert [s.get("failures") for s in suites] == ["1", "0"]
    for suite in suites:
        cases = suite.findall("testcase")
        assert int(str(suite.get("tests"))) == len(cases)
        assert int(str(suite.get("failures"))) == len(suite.findall("testcase/failure"))
        assert all(case.get("classname") and case.get("name") for case in cases)
        names = {p.get("name") for p in suite.findall("properties/property")}
        assert {"protocol", "data", "tokens", "numerics", "baseline"} <= names
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None
    assert failure.get("message") == "measured 0.0301, expected 0.02 ± 3 se: must be <= 0.023"
    said = "".join(root.itertext())
    assert f"better; keep it with {ACCEPT}" in said


def test_the_summary_is_a_table_with_a_notice(result: GateResult):
    text = markdown(result, ACCEPT)
    lines = text.splitlines()
    assert lines[0] == "### pq gate: 1 of 4 checks failed"
    assert (
        "strided-256 on text, 100 tokens, kernel numerics, float32; parent parent; 12 s" in lines[2]
    )
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 5
    assert rows[1] == (
        "| fireq | kld\\_mean | 0.0301 ± 0.0012 | – | 0.02 ± 3 se | **FAIL** | must be &lt;= 0.023 |"
    )
    assert "| **better** |" in rows[3]
    assert (
        lines[-2] == f"1 better than their baseline (rtn.top1_agreement): keep them with `{ACCEPT}`"
    )


def test_json_is_compact_and_whole(result: GateResult):
    text = compact(result, ACCEPT)
    found = json.loads(text)
    assert (found["ok"], found["failed"], found["better"], found["accept"]) == (False, 1, 1, ACCEPT)
    assert [c["status"] for c in found["checks"]] == ["FAIL", "pass", "better", "pass"]
    assert found["checks"][0]["stderr"] == 0.0012
    assert found["figures"]["fireq"]["kld_mean"] == 0.0301
    assert "by_position" not in text
    assert max(map(len, text.splitlines())) < 400
    assert len(text.splitlines()) < 30
    fine = dataclasses.replace(result, verdicts=result.verdicts[1:2], figures={})
    assert json.loads(compact(fine, ACCEPT))["accept"] is None


def test_words_of_files_stay_words(result: GateResult):
    worst = dataclasses.replace(result.verdicts[0], recipe=HOSTILE, detail=HOSTILE)
    hostile = dataclasses.replace(result, verdicts=(worst,), file=HOSTILE)
    ET.fromstring(junit(hostile, HOSTILE).encode())
    text = markdown(hostile, ACCEPT)
    row = next(line for line in text.splitlines() if "FAIL" in line and line.startswith("| a"))
    assert row.replace("\\|", "").count("|") == 8
    assert "<i>" not in text
    assert "\x00" not in text + junit(hostile, HOSTILE)
    text.encode()


def test_a_run_without_figures_is_told_all_the_same(result: GateResult):
    missing = dataclasses.replace(result.verdicts[0], value=None, stderr=None, detail="is broken")
    bare = dataclasses.replace(result, verdicts=(missing,), figures={})
    assert "measured –" in junit(bare, ACCEPT)
    assert "| – |" in markdown(bare, ACCEPT)
    assert json.loads(compact(bare, ACCEPT))["checks"][0]["value"] is None
