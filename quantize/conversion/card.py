"""README.md of an output: what a Hub page shows of it, and whose weights it was made from."""

from __future__ import annotations

import re
from pathlib import Path

from quantize.conversion.plan import Plan
from quantize.conversion.state import State
from quantize.files.hub_origin import HubOrigin, hub_origin
from quantize.version import __version__

CARD = "README.md"
_HUB = "https://huggingface.co"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
"""Keys of the parent's card that are as true of the output; its results and base model are not."""
_KEY = re.compile(r"([A-Za-z_][\w-]*):")
_RULE = "---"


def card(plan: Plan, state: State, parents: Path | None) -> str:
    """The text of README.md.

    parents: that of the parent, whose text follows below; None where it has none.
    """
    origin = hub_origin(plan.request.model)
    head, body = _parts(parents.read_text(encoding="utf-8", errors="replace") if parents else "")
    front = [block for key, block in _blocks(head) if key in _KEPT]
    if origin:
        front += [f"base_model: {origin.id}", "base_model_relation: quantized"]
    front += ["tags:", f"- {plan.format.name}", "- pq"]
    lines = [_RULE, *front, _RULE, "", *_about(plan, state, origin)]
    if body:
        lines += ["", "## The parent's card", "", body]
    return "\n".join(lines) + "\n"


def _about(plan: Plan, state: State, origin: HubOrigin | None) -> list[str]:
    recipe = plan.recipe.name
    if origin:
        page = f"{_HUB}/{origin.id}"
        parent = f"[{origin.id}]({page}) at commit [{origin.commit}]({page}/tree/{origin.commit})"
        title = f"{origin.id.rpartition('/')[2]}, {recipe}"
        check = f"`pq verify DIR --parent {origin.id}@{origin.commit}`"
    else:
        parent, title = "a local folder; `pq.json` has its SHA-256", f"Quantized with {recipe}"
        check = "`pq verify DIR --parent PARENT`"
    return [
        f"# {title}",
        "",
        "| | |",
        "|---|---|",
        f"| parent | {parent} |",
        f"| recipe | `{recipe}`, pq {__version__} |",
        f"| quantized linears | {state.bits_per_weight:.4g} bits per weight, scales counted |",
        f"| format | `{plan.format.name}`: {plan.format.about} |",
        f"| to check it | {check} |",
        "",
        "`pq.json` holds the whole recipe, what it was calibrated on, and the error of every layer.",
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
