"""README.md of an output: what a Hub page shows of it, and whose weights it was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.conversion.plan import Plan
from quantize.conversion.state import State
from quantize.files.hub_origin import HubOrigin, hub_origin
from quantize.formats.kv4 import KvNumerics
from quantize.formats.scheme import scheme_names
from quantize.inspect.card import Figures, loads_row, quality_table, serving_lines
from quantize.inspect.publish import CARD as CARD
from quantize.inspect.publish import NAME, PARENTS, QUALITY, SERVING
from quantize.version import __version__

_HUB = "https://huggingface.co"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Keys of the parent's card that are as true of the output; its results and base model are not."""
_KEY = re.compile(r"([A-Za-z_][\w-]*):")
_RULE = "---"


@dataclass(frozen=True)
class Made:
    """What a card says of a finished conversion beside its plan."""

    state: State
    folder: Path
    """Where the output's files are now, config.json among them."""
    provenance: Mapping[str, Any]
    """As pq.json will have it."""
    look: Mapping[str, Any] | None
    """At held-out windows: what pq.json has under `held_out`."""


def card(plan: Plan, made: Made, parents: Path | None) -> str:
    """The text of README.md.

    parents: that of the parent, whose text follows below; None where it has none.
    """
    origin = hub_origin(plan.request.model)
    head, body = _parts(parents.read_text(encoding="utf-8", errors="replace") if parents else "")
    kept = dict(_blocks(head))
    front = [kept[key] for key in _KEPT if key in kept]
    front += [] if "pipeline_tag" in kept else ["pipeline_tag: text-generation"]
    front += [f"library_name: {plan.format.library}"]
    if origin:
        front += [f"base_model: {origin.id}", "base_model_relation: quantized"]
    front += ["tags:", f"- {plan.format.name}", "- pq"]
    lines = [_RULE, *front, _RULE, "", *_about(plan, made, origin)]
    lines += ["", f"## {QUALITY}", "", *_quality(made.look)]
    lines += ["", f"## {SERVING}", "", *serving_lines(NAME, made.folder, plan.source.config)]
    if body:
        lines += ["", f"## {PARENTS}", "", body]
    return "\n".join(lines) + "\n"


def _about(plan: Plan, made: Made, origin: HubOrigin | None) -> list[str]:
    recipe, state = plan.recipe.name, made.state
    if origin:
        page = f"{_HUB}/{origin.id}"
        parent = f"[{origin.id}]({page}) at commit [{origin.commit}]({page}/tree/{origin.commit})"
        title = f"{origin.id.rpartition('/')[2]}, {recipe}"
        check = f"`pq verify {NAME} --parent {origin.id}@{origin.commit}`"
    else:
        parent, title = "a local folder; `pq.json` has its SHA-256", f"Quantized with {recipe}"
        check = f"`pq verify {NAME} --parent PARENT`"
    versions = made.provenance["versions"]
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        f"# {title}",
        "",
        "| | |",
        "|---|---|",
        f"| parent | {parent} |",
        f"| scheme | {'; '.join(scheme_names(state.schemes.values())) or 'all linears 16-bit'} |",
        *([f"| KV cache | {_cache(plan)} |"] if plan.attention else []),
        f"| quantized linears | {state.bits_per_weight:.4g} bits per weight, scales counted |",
        f"| format | `{plan.format.name}`: {plan.format.about} |",
        loads_row(made.folder),
        f"| recipe | `{recipe}`, pq {__version__} ({used}) |",
        f"| calibrated on | {_calibration(made.provenance.get('calibration'))} |",
        f"| to check it | {check} |",
        "",
        "`pq.json` holds the whole recipe, what it was calibrated on, and the error of every layer.",
    ]


def _cache(plan: Plan) -> str:
    assert plan.attention is not None
    return KvNumerics.from_json(plan.attention).scheme.label(plan.shape.head_dim)


def _calibration(facts: Mapping[str, Any] | None) -> str:
    """Text by name and hash."""
    if facts is None:
        return "nothing: the recipe reads no text"
    windows = f"{facts['nsamples']} windows of {facts['seqlen']} tokens"
    split = f", {facts['split']} part" if facts.get("split") else ""
    licence = f", {facts['licence']}" if facts.get("licence") else ""
    return f"`{facts['dataset']}`{split}{licence}: {windows}, SHA-256 of the tokens `{facts['sha256']}`"


def _quality(look: Mapping[str, Any] | None) -> list[str]:
    if look is None:
        return [f"Not measured when it was made: `pq eval {NAME} --baseline PARENT` does."]
    if reason := look.get("not_measured"):
        return [f"Not measured when it was made: {reason}."]
    row = Figures(
        f"{look['windows']} windows of {look['seqlen']}: {look['text']}",
        look["tokens"],
        look["kld_mean"],
        look["kld_stderr"],
        look["top1_agreement"],
        look["perplexity"],
        look["parent_perplexity"],
    )
    return [
        *quality_table([row]),
        "",
        f"KL divergence from the parent in nats a token: {look['size']}. A look at a few windows when "
        f"the model was made, with {look['measured']}, {look['dtype']}.",
    ]


def _parts(text: str) -> tuple[list[str], str]:
    """The lines between the two rules at the beginning of a card, and the text behind them."""
    lines = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").splitlines()
    if not lines or lines[0].rstrip() != _RULE:
        return [], "\n".join(lines).strip()
    ends = [i for i, line in enumerate(lines) if i and line.rstrip() == _RULE]
    if not ends:
        return [], "\n".join(lines).strip()
    return lines[1 : ends[0]], "\n".join(lines[ends[0] + 1 :]).strip()


def _blocks(head: list[str]) -> list[tuple[str, str]]:
    """Every key at the margin with all its lines; what stands before the first is left out."""
    found: list[tuple[str, list[str]]] = []
    for line in head:
        if key := _KEY.match(line):
            found.append((key[1], []))
        if found:
            found[-1][1].append(line.rstrip())
    return [(key, "\n".join(lines)) for key, lines in found]
