"""Writes newly measured figures into a gate file; every byte that is not
one of those numbers stays."""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quantize.errors import OutputError, QualityError, RecipeError, UsageError
from quantize.files import strict_yaml
from quantize.files.problems import Place, error_of
from quantize.files.strict_yaml import Document
from quantize.files.yaml_scalars import resolve_plain
from quantize.gate.checks import Check, Verdict
from quantize.gate.entries import Entry
from quantize.gate.file import parse_gate, read_gate
from quantize.gate.protocol import is_measured
from quantize.gate.run import GateResult
from quantize.version import __version__

_BOM = b"\xef\xbb\xbf"
_VERSIONED = ("torch", "transformers")


def update_baselines(file: Path, result: GateResult, reason: str) -> list[str]:
    """Write the figures of `result` over the `value:` numbers they were checked
    against, the run's protocol beside them, and note it in `history:`.

    Returns the changes, "fireq.kld_mean 0.0249 -> 0.0231" each; without any the file stays as it
    is. A new number has as few digits as keep its rounding below a hundredth of its tolerance.
    Recoveries are demands, not measurements: they stay. Raises UsageError without a reason or when
    the file has changed since the run, QualityError for a figure that was not measured, RecipeError
    for a file that is not written so that it can be edited, OutputError when it cannot be written.
    """
    reason = " ".join(reason.encode("utf-8", "replace").decode().split())
    if not reason:
        raise UsageError("new baselines need a reason, which the file keeps; give it with --reason")
    if unknown := next((v for v in result.verdicts if v.value is None), None):
        what = f"{unknown.recipe}.{unknown.metric} {unknown.detail}"
        raise QualityError(f"{file}: {what}; no baseline is made of a run that lacks a figure")
    raw = read_gate(file)
    gate = parse_gate(raw, file)
    text = raw.removeprefix(_BOM).decode("utf-8")
    wanted = copy.deepcopy(gate.document.data)
    checks = {(e.name, c.metric): c for e in gate.entries for c in e.checks if c.kind == "value"}
    edits: list[tuple[int, int, str]] = []
    changes: list[str] = []
    places = {entry.name: entry.place for entry in gate.entries}
    for verdict in result.verdicts:
        if verdict.kind == "value" and (number := _new_number(verdict, checks, file)):
            section, name = places[verdict.recipe]
            numbers = {"value": number}
            if checks[name, verdict.metric].stderr is not None:
                numbers["stderr"] = _new_stderr(verdict, file)
            for key, shown in numbers.items():
                start, end = gate.document.spans[section, name, verdict.metric, key]
                edits.append((start, end, shown))
                what = f"{name}.{verdict.metric}" + (" stderr" if key == "stderr" else "")
                changes.append(f"{what} {text[start:end]} -> {shown}")
                wanted[section][name][verdict.metric][key] = resolve_plain(shown)
    for entry in gate.entries:
        if edit := _named(entry, result, gate.document, text):
            edits.append(edit)
            old = f" {entry.protocol} ->" if entry.protocol else ""
            changes.append(f"{entry.name}.protocol{old} {result.protocol}")
            wanted[entry.place[0]][entry.name]["protocol"] = result.protocol
    if changes:
        today = datetime.date.today().isoformat()
        note: dict[str, object] = {
            "date": today,
            "reason": reason,
            "changes": changes,
            "versions": _versions(),
        }
        wanted["history"] = [*wanted.get("history", []), note]
        for start, end, number in sorted(edits, reverse=True):
            text = text[:start] + number + text[end:]
        new = (_BOM if raw.startswith(_BOM) else b"") + _with_note(
            text,
            gate.document,
            note,
        ).encode("utf-8")
        _require(new, wanted, gate.document)
        _replace(file, new)
    return changes


def _new_number(
    verdict: Verdict,
    checks: Mapping[tuple[str, str], Check],
    file: Path,
) -> str | None:
    """Return what the file should say, None where what it says is the figure already."""
    assert verdict.value is not None
    check = checks.get((verdict.recipe, verdict.metric))
    if check is None or check.expected != verdict.expected:
        name = f"{verdict.recipe}.{verdict.metric}"
        raise UsageError(f"{file}: {name} has changed since the run; run the gate again")
    margin = check.margin
    if check.unit == "se":  # a new standard error takes the place of the old one
        margin = min(margin, check.tolerance * (verdict.stderr or 0.0))
    error = margin / 100  # rounding takes nothing that counts from the tolerance
    if abs(check.expected - verdict.value) <= max(error, 1e-9 * abs(check.expected)):
        return None
    numbers = (f"{verdict.value:.{digits}g}" for digits in range(3, 17))
    return next((n for n in numbers if abs(float(n) - verdict.value) <= error), repr(verdict.value))


def _new_stderr(verdict: Verdict, file: Path) -> str:
    """The standard error that the file should have beside a new value."""
    if verdict.stderr is None:
        what = f"{verdict.recipe}.{verdict.metric} has no standard error in this run"
        raise QualityError(f"{file}: {what}; measure two windows or more")
    return f"{verdict.stderr:.3g}"


def _named(
    entry: Entry, result: GateResult, document: Document, text: str
) -> tuple[int, int, str] | None:
    """The edit that names the run's protocol in an entry whose values it measured; None where
    it stands there already, or the run measured none of them."""
    measured = {v.metric for v in result.verdicts if v.recipe == entry.name and v.kind == "value"}
    values = {check.metric for check in entry.checks if is_measured(entry, check)}
    if entry.protocol == result.protocol or not values & measured:
        return None
    if values - measured:
        name = f"{entry.name}.{min(values - measured)}"
        raise UsageError(f"{document.source}: {name} has changed since the run; run the gate again")
    path: Place = entry.place
    if entry.protocol:
        return *document.spans[(*path, "protocol")], result.protocol
    line, column = min(document.marks[(*path, key)] for key in document.data[path[0]][entry.name])
    start = sum(map(len, text.splitlines(keepends=True)[: line - 1])) + column - 1
    newline = "\r\n" if "\r\n" in text else "\n"
    inline = text[:start].rstrip().endswith("{")
    behind = ", " if inline else newline + " " * (column - 1)
    return start, start, f"protocol: {result.protocol}{behind}"


def _with_note(text: str, document: Document, note: dict[str, object]) -> str:
    """Append one item to the list `history`, which is the file's last key, or begin it."""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = strict_yaml.dump({"history": [note]}).splitlines()
    indent = "  "
    if first := document.marks.get(("history", 0)):
        line = text.splitlines()[first[0] - 1]
        indent = line[: len(line) - len(line.lstrip(" "))]
    head = [] if first else ["", lines[0]]
    parts = [text if not text or text.endswith(("\n", "\r")) else text + newline]
    return "".join(
        [*parts, *(line + newline for line in (*head, *(indent + line for line in lines[1:])))],
    )


def _versions() -> dict[str, str]:
    versions = {"pq": __version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in _VERSIONED}


def _require(new: bytes, wanted: object, document: Document) -> None:
    """RecipeError unless the edited file reads as it should: `_with_note`
    assumes a usual way of writing."""
    try:
        if strict_yaml.load(new, document.source).data == wanted:
            return
    except RecipeError:
        pass
    how = "write 'history:' as the last key with one '- ' an item"
    raise error_of(
        document.source,
        [document.problem(("history",), f"cannot be edited; {how}")],
    )


def _replace(file: Path, new: bytes) -> None:
    target = file.resolve()  # a link stays one
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent,
            prefix=f".{target.name}.",
            delete=False,
        ) as handle:
            temporary = Path(handle.name)
            handle.write(new)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(target.stat().st_mode & 0o7777)
        temporary.replace(target)
    except OSError as err:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{file}: cannot be written: {err.strerror}; check the folder's permissions",
        ) from None
