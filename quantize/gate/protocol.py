"""The protocol of a gate's run beside those under which its baselines were measured: figures of
different protocols are not compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize.errors import UsageError
from quantize.evaluation.protocols import Protocol
from quantize.files.problems import error_of
from quantize.gate.checks import Check
from quantize.gate.entries import Entry, GateFile
from quantize.model.tokenizer import load_tokenizer

_OF_THE_FORMAT = ("bits_per_weight",)
"""Metrics that no text decides."""


def protocol_of(gate: GateFile, model: Path) -> Protocol:
    """How a run of the gate measures `model`, BOS included; RecipeError for settings that its
    tokenizer does not allow."""
    settings = gate.evaluation
    try:
        plain = Protocol(settings.protocol, settings.seqlen, settings.context)
        return plain.with_bos(load_tokenizer(model), settings.bos)
    except UsageError as err:
        raise error_of(
            gate.document.source, [gate.document.problem(("evaluation",), str(err))]
        ) from None


def is_measured(entry: Entry, check: Check) -> bool:
    """Whether a check's value is a figure of a protocol.

    Tasks count where the entry names one: before it did, they were run as the tokenizer has it.
    """
    task = "/" in check.metric
    text = check.metric not in _OF_THE_FORMAT and (not task or entry.protocol is not None)
    return check.kind == "value" and text


def baseline_protocol(gate: GateFile, entry: Entry) -> str:
    """The protocol of an entry's values: the one it names; without a name they are of windows
    without BOS, there having been no others."""
    settings = gate.evaluation
    return entry.protocol or Protocol(settings.protocol, settings.seqlen, settings.context).name


def unfit(gate: GateFile, entry: Entry, protocol: Protocol) -> bool:
    """Whether an entry has values that were measured otherwise than `protocol` measures."""
    others = baseline_protocol(gate, entry) != protocol.name
    return others and any(is_measured(entry, check) for check in entry.checks)


def require_same(gate: GateFile, entries: Sequence[Entry], protocol: Protocol) -> None:
    """RecipeError, one line, where an entry's values are of another protocol."""
    found = [entry for entry in entries if unfit(gate, entry, protocol)]
    if not found:
        return
    first, more = found[0], len(found) - 1
    old = baseline_protocol(gate, first)
    named = "" if first.protocol else " (the entry names no protocol, so they are without BOS)"
    others = f", as in {more} more" if more else ""
    text = (
        f"the values were measured as {old}{named}, this run measures {protocol.name}{others}; "
        "set 'evaluation' accordingly, or measure them anew with --update-baselines"
    )
    place = (*first.place, *(("protocol",) if first.protocol else ()))
    raise error_of(gate.document.source, [gate.document.problem(place, text)])
