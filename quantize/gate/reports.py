"""What a run of the gate tells others than the one at the terminal: JUnit XML, a summary in
markdown, and compact JSON. Plain text from a GateResult."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from quantize.gate.checks import HIGHER_IS_BETTER, Verdict
from quantize.gate.run import GateResult

_FACTS = ("protocol", "data", "data_sha256", "tokens", "windows", "numerics", "dtype", "baseline")
"""Of an Evaluation: under what its figures were measured, alike for all of a run."""
_ERRORS = ("nll_stderr", "delta_nll_stderr", "kld_stderr", "top1_stderr")
_UNSAFE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKS = {"pass": "pass", "better": "**better**", "FAIL": "**FAIL**"}


def facts_of(result: GateResult) -> dict[str, Any]:
    """What all figures of a run were measured under; of a run without any, nothing."""
    first: Mapping[str, Any] = next(iter(result.figures.values()), {})
    return {key: first[key] for key in _FACTS if first.get(key) is not None}


def demand(verdict: Verdict) -> str:
    """What a check asks for, in a few characters."""
    if verdict.kind == "recovery":
        return f">= {verdict.expected:g} of parent"
    return f"{verdict.expected:g} ± {verdict.tolerance}"


def outcome(result: GateResult) -> str:
    """How many checks passed, failed, or are better than the file says."""
    checks = len(result.verdicts)
    failed = sum(not verdict.ok for verdict in result.verdicts)
    return f"{failed} of {checks} checks failed" if failed else f"{checks} checks passed"


def better_line(result: GateResult, accept: str) -> str | None:
    """A notice of figures that got better, with the command that makes them the file's."""
    names = [f"{v.recipe}.{v.metric}" for v in result.verdicts if v.status == "better"]
    if not names:
        return None
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} better than their baseline ({shown}): keep them with {accept}"


def compact(result: GateResult, accept: str) -> str:
    """JSON, a line for each check. `accept`: the command that makes the figures the file's."""
    better = any(verdict.status == "better" for verdict in result.verdicts)
    head: dict[str, Any] = {
        "file": result.file,
        "ok": result.ok,
        "failed": sum(not verdict.ok for verdict in result.verdicts),
        "better": sum(verdict.status == "better" for verdict in result.verdicts),
        "seconds": result.seconds,
        "parent_runs": result.parent_runs,
        **facts_of(result),
        "accept": accept if better else None,
    }
    checks = [_line(_check(verdict)) for verdict in result.verdicts]
    figures = [f"{_line(name)}: {_line(scalars(e))}" for name, e in result.figures.items()]
    lines = [f"  {_line(key)}: {_line(value)}," for key, value in head.items()]
    if result.tasks:
        lines.append(f'  "tasks": {_line(result.tasks)},')
    lines.append(f'  "checks": [{_block(checks)}],')
    lines.append(f'  "figures": {{{_block(figures)}}}')
    return "\n".join(["{", *lines, "}"])


def _block(lines: list[str]) -> str:
    return "\n    " + ",\n    ".join(lines) + "\n  " if lines else ""


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _check(verdict: Verdict) -> dict[str, Any]:
    return {
        "entry": verdict.recipe,
        "metric": verdict.metric,
        "status": verdict.status,
        "value": verdict.value,
        "stderr": verdict.stderr,
        "parent": verdict.parent,
        "kind": verdict.kind,
        "expected": verdict.expected,
        "tolerance": verdict.tolerance,
        "recovery": verdict.recovery,
        "detail": verdict.detail,
    }


def scalars(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of an Evaluation (as a dict) that a gate can check, and their standard errors."""
    keys = (*HIGHER_IS_BETTER, *_ERRORS)
    return {key: evaluation[key] for key in keys if evaluation.get(key) is not None}


def junit(result: GateResult, accept: str) -> str:
    """JUnit XML as CI systems read it: a suite for each entry, a test case for each check."""
    root = ET.Element("testsuites", {"name": "pq gate", **_counts(result.verdicts)})
    root.set("time", f"{result.seconds:.2f}")
    for name in dict.fromkeys(verdict.recipe for verdict in result.verdicts):
        mine = [verdict for verdict in result.verdicts if verdict.recipe == name]
        suite = ET.SubElement(root, "testsuite", {"name": _safe(f"{result.file}: {name}")})
        suite.attrib |= _counts(mine)
        properties = ET.SubElement(suite, "properties")
        for key, value in facts_of(result).items():
            ET.SubElement(properties, "property", {"name": key, "value": _safe(str(value))})
        for verdict in mine:
            _case(suite, result, verdict, accept)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(verdicts: Any) -> dict[str, str]:
    failed = sum(not verdict.ok for verdict in verdicts)
    return {"tests": str(len(verdicts)), "failures": str(failed), "errors": "0", "skipped": "0"}


def _case(suite: ET.Element, result: GateResult, verdict: Verdict, accept: str) -> None:
    name = verdict.metric + (" (recovery)" if verdict.kind == "recovery" else "")
    at = {"classname": _safe(f"gate.{verdict.recipe}"), "name": _safe(name)}
    case = ET.SubElement(suite, "testcase", {**at, "file": _safe(result.file)})
    said = f"measured {_number(verdict.value)}, expected {demand(verdict)}: {verdict.detail}"
    if not verdict.ok:
        failure = ET.SubElement(case, "failure", {"type": "accuracy", "message": _safe(said)})
        failure.text = _safe(f"{said}\nparent: {_number(verdict.parent)}")
    else:
        better = f"\nbetter; keep it with {accept}" if verdict.status == "better" else ""
        ET.SubElement(case, "system-out").text = _safe(said + better)


def markdown(result: GateResult, accept: str) -> str:
    """A table in GitHub's markdown, for the summary of a CI job."""
    facts = facts_of(result)
    basis = f"{facts.get('protocol', result.protocol)}"
    if facts:
        basis += f" on {facts['data']}, {facts['tokens']:,} tokens, {facts['numerics']} numerics, "
        basis += f"{facts['dtype']}" + (
            f"; parent {facts['baseline']}" if "baseline" in facts else ""
        )
    lines = [
        f"### pq gate: {outcome(result)}",
        "",
        f"{_plain(result.file)}: {_plain(basis)}; {result.seconds:.0f} s",
        "",
        "| entry | metric | measured | parent | expected | verdict | |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for verdict in result.verdicts:
        cells = [verdict.recipe, verdict.metric, _with_error(verdict), _number(verdict.parent)]
        cells += [demand(verdict)]
        row = [*map(_plain, cells), _MARKS[verdict.status], _plain(verdict.detail)]
        lines.append(f"| {' | '.join(row)} |")
    if notice := better_line(result, f"`{accept}`"):
        lines += ["", notice]
    return "\n".join(lines) + "\n\n"


def _with_error(verdict: Verdict) -> str:
    error = "" if verdict.stderr is None else f" ± {verdict.stderr:.2g}"
    return _number(verdict.value) + error


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _plain(text: str) -> str:
    """Text of a cell: nothing in it is markdown or HTML."""
    spaced = " ".join(_safe(text).split())
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", spaced)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _safe(text: str) -> str:
    """Without characters that XML has no place for."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)
