"""From the files in and beside a checkpoint to a Report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantize.files.hub_origin import origin_in
from quantize.files.small import Dequantized
from quantize.pictures import Cell, Table
from quantize.report import layers, quality
from quantize.report.model import (
    Headline,
    Listing,
    Note,
    Report,
    Section,
    mapping,
    number,
    plainly,
    text,
)
from quantize.report.sources import Sources, beside, read
from quantize.report.tradeoff import tradeoff
from quantize.report.use import made_by, use

_NAMED = 5  # layers of a warning that are named


def collect(folder: Path) -> Report:
    """Gather everything that is known about the checkpoint in `folder`.

    Reads pq.json, pq-statistics.json, config.json and tensor headers in it, and the log and
    evaluations beside it; of these only pq.json must be there, the report says which command adds
    the others. ModelError for a folder that pq did not write.
    """
    sources = read(folder)
    evaluation = quality.headline_evaluation(sources.evaluations)
    sections = [
        quality.quality(sources),
        quality.tasks(sources),
        tradeoff(sources),
        quality.tokens(sources),
        *(section(sources) for section in layers.SECTIONS),
        use(sources),
        _provenance(sources),
    ]
    sections = [replace(part, items=[plainly(item) for item in part.items]) for part in sections]
    return Report(
        name=beside(folder, "").name,
        subtitle=_subtitle(sources),
        pq=text(sources.provenance, "pq"),
        headlines=[
            *_cost(sources),
            *_activated_parameters(sources, evaluation or {}),
            *(_quality(evaluation) if evaluation else ()),
            *_time(sources),
        ],
        basis=quality.basis(evaluation) + "." if evaluation else "",
        warnings=_warnings(sources, evaluation),
        sections=sections,
    )


def _subtitle(sources: Sources) -> str:
    recipe = text(mapping(sources.provenance, "recipe"), "name", "unknown")
    said = [f"Recipe {recipe}"]
    if found := sources.weights:
        shape = found.shape
        said += [f"{found.arch.model_type}, {shape.n_blocks} blocks, hidden size {shape.hidden}"]
        said += [f"{_count(found.parameters)} parameters"]
    parents = {text(data, "baseline") for data in sources.evaluations.values()} - {""}
    if origin := origin_in(sources.provenance):
        said += [f"parent {origin}"]
    elif len(parents) == 1:
        said.append(f"parent {parents.pop()}")
    return " · ".join(said)


def _count(n: int) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def _four(value: float) -> str:
    return f"{value:#.4g}".removesuffix(".")


def _size(n: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


def _cost(sources: Sources) -> list[Headline]:
    bits = number(sources.provenance, "bits_per_weight")
    encoded = len(sources.weights.schemes) if sources.weights else 0
    detail = f"scales counted, {encoded} linears" if encoded else "scales counted"
    out = [] if bits is None else [Headline("Bits per weight", f"{bits:.4g}", detail, bits)]
    if found := sources.weights:
        whole = 2 * found.parameters
        detail = f"{whole / found.stored_bytes:.2f}× below {_size(whole)} at 16 bit"
        out.append(
            Headline("Size on disk", _size(found.stored_bytes), detail, float(found.stored_bytes)),
        )
    return out


def _activated_parameters(sources: Sources, evaluation: Mapping[str, Any]) -> list[Headline]:
    """What a token meets of a model with experts: measured on evaluation
    text, else as it was planned."""
    ours = number(evaluation, "activated_parameters")
    parents = number(evaluation, "baseline_activated_parameters")
    blocks = mapping(evaluation, "experts_visited")
    visited = [value for block in blocks if (value := number(blocks, block)) is not None]
    planned = number(
        mapping(mapping(sources.provenance, "layers"), "ladimo"),
        "activated_reduction",
    )
    if visited and ours and parents:
        change = ours / parents - 1
        mean = sum(visited) / len(visited)
        counted = f"of {_count(round(parents))} parameters, embeddings not counted"
        detail = f"{counted}; {mean:.2f} routed experts a token"
    elif planned is not None:
        change = -planned
        detail = "of the parameters, planned; embeddings not counted"
    else:
        return []
    return [Headline("Activated", f"{100 * change:+.1f}\u00a0%", detail, change)]


def _time(sources: Sources) -> list[Headline]:
    out = []
    if (seconds := number(sources.summary, "seconds")) is not None:
        machine = mapping(sources.provenance, "machine")
        shown = f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"
        parts = ("on", text(machine, "device"), text(machine, "dtype"))
        detail = " ".join(part for part in parts if part)
        out.append(Headline("Conversion", shown, detail, seconds))
    return out


def _quality(data: Mapping[str, Any]) -> list[Headline]:
    out: list[Headline] = []
    perplexity, parent = number(data, "perplexity"), number(data, "baseline_perplexity")
    if perplexity is not None:
        change = f" ({100 * (perplexity / parent - 1):+.2f}\u00a0%)" if parent else ""
        detail = f"parent {_four(parent)}{change}" if parent else "no parent measured"
        out.append(Headline("Perplexity", _four(perplexity), detail, perplexity))
    if (kld := number(data, "kld_mean")) is not None:
        p99 = number(data, "kld_p99")
        detail = "mean, nats" + ("" if p99 is None else f"; p99\u00a0{p99:.3g}")
        out.append(Headline("KL divergence", f"{kld:.3g}", detail, kld))
    if (top1 := number(data, "top1_agreement")) is not None:
        stderr = number(data, "top1_stderr")
        detail = "of tokens" + ("" if stderr is None else f", ±\u00a0{100 * stderr:.2g}\u00a0%")
        out.append(Headline("Same top-1", f"{100 * top1:.1f}\u00a0%", detail, top1))
    return out


def _warnings(sources: Sources, evaluation: Mapping[str, Any] | None) -> list[str]:
    out = []
    if fallen := layers.fallbacks(sources):
        out.append(_list_first("Not encoded as the recipe says", fallen))
    if adapted := layers.adapted(sources):
        out.append(_list_first("Not as the recipe asks for, because of sizes", adapted))
    if dropped := number(sources.provenance, "dropped_sequences"):
        what = f"{dropped:.0f} calibration sequences"
        out.append(f"{what} were left out because their activations were not finite.")
    if worst := layers.alarming(sources):
        key = layers.leading_error(sources)[0].replace("_", " ")
        out.append(_list_first(f"More than ten times the median {key}", worst))
    perplexity = number(evaluation or {}, "perplexity")
    parent = number(evaluation or {}, "baseline_perplexity")
    if perplexity and parent and perplexity > 1.1 * parent:
        out.append(f"Perplexity is {100 * (perplexity / parent - 1):.0f} % above the parent's.")
    return out + sources.notes


def _list_first(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {'; '.join(names[:_NAMED])}{more}."


def _provenance(sources: Sources) -> Section:
    found = sources.provenance
    versions = {"pq": found["pq"], **mapping(found, "versions"), **mapping(found, "machine")}
    calibration = found["calibration"]
    origin = origin_in(found)
    where = f", commit {origin.commit} of {origin.id} on the Hub" if origin else ""
    small = Dequantized.read(found.get("dequantized"))
    shown = [
        *made_by(sources),
        _pairs("Calibration", "What statistics were measured on.", ("field", "value"), calibration)
        if calibration
        else Note("The recipe reads no calibration text."),
        _pairs(
            "Source",
            f"SHA-256 of the parent's files{where}.",
            ("file", "SHA-256"),
            mapping(found, "source"),
        ),
        _pairs(
            "Versions",
            "Of the software and the machine that converted.",
            ("name", "value"),
            versions,
        ),
        *([Note(f"The source is stored small: {small}.")] if small else ()),
        Listing(
            "Recipe",
            "With every default filled in.",
            text(mapping(found, "recipe"), "resolved"),
        ),
    ]
    files = len(mapping(found, "files"))
    hashes = f"the SHA-256 of the checkpoint's {files} files"
    lead = f"From pq.json, which also holds {hashes} (check: pq verify)."
    return Section("provenance", "Provenance", lead, shown)


def _pairs(title: str, caption: str, columns: tuple[str, str], found: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for key, value in found.items():
        rows.append([str(key), "–" if value is None else str(value)])
    return Table(title, caption, columns, rows)
