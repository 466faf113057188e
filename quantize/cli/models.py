"""`pq models`: which types of models work, by the last sweep over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from quantize.errors import UsageError

KNOWN = Path(__file__).resolve().parents[1] / "model" / "known.json"
"""What `make test-models` found with the releases it names."""

RECIPES: Mapping[str, str] = {
    "stream": "evaluation",
    "proofs": "proofs",
    "rtn8": "rtn, 8 bits",
    "smooth": "awq",
    "rotate": "rotate",
    "gptq4": "gptq, 4 bits",
    "fireq_linear": "fireq, 4 bits",
    "fireq_cache": "INT4 cache",
}
"""Check → what it is called in tables."""
MOVES: Mapping[str, str] = {
    "attn_norm": "the norm before attention → its projections",
    "mlp_norm": "the norm before the FFN → what reads it",
    "norm": "one norm → all that reads it",
    "inner_norm": "a norm inside → what reads it",
    "v_o": "values → the output projection",
    "up_down": "up → down",
    "rotary_pairs": "rotary pairs of keys against queries",
}


def known() -> dict[str, Any]:
    """The packaged table."""
    found: dict[str, Any] = json.loads(KNOWN.read_text(encoding="utf-8"))
    return found


def models(
    model_type: Annotated[
        str | None,
        typer.Argument(metavar="TYPE", help="One type in words, by `model_type` in config.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON on stdout.")] = False,
) -> None:
    """Show which types of models work, what is proved of them, what is refused and why.

    The table is of a sweep with small random models. A type that it lacks is derived like any other.
    """
    table = known()
    if model_type is None:
        if as_json:
            typer.echo(json.dumps(table, indent=2, ensure_ascii=False))
        else:
            _print(table)
        return
    names = [n for n in table["types"] if n.partition(":")[0] == model_type or n == model_type]
    if not names:
        raise UsageError(_unknown(table, model_type))
    if as_json:
        rows = {name: table["types"][name] for name in names}
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for name in names:
        typer.echo("\n".join(words(name, table["types"][name])))


def _unknown(table: Mapping[str, Any], model_type: str) -> str:
    if (why := table["unbuilt"].get(model_type)) is not None:
        return f"{model_type}: no small model of this type could be built for the sweep ({why})"
    return (
        f"{model_type}: not in the table of decoder-only types of transformers "
        f"{table['versions']['transformers']}; `pq models` lists them, `pq inspect DIR` tells what a "
        "folder holds"
    )


def words(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """One type in lines for people."""
    kind = f", {row['kind']}" if "kind" in row else ""
    yield f"{name} ({row['class']}{kind}): {WORKS[row['works']]}"
    holds = [RECIPES[n] for n, s in row["status"].items() if s == "holds" and n != "proofs"]
    if holds:
        yield f"  works: {'; '.join(holds)}"
    for check, figure in row["kld"].items():
        yield f"  KL divergence from the parent, {RECIPES[check]}: {figure} nats"
    for check, figure in row["change"].items():
        if check != "stream":
            yield f"  change of logits, {RECIPES[check]} without rounding: {figure} of the largest"
    if "stock" in row:
        loads = row["stock"] == "loads"
        yield f"  stock transformers: {'loads the output' if loads else 'does not: ' + row['stock']}"
    for move, blocks in row.get("proved", {}).items():
        yield f"  proved in {blocks} blocks: {MOVES.get(move, move)}"
    for move, why in row.get("dropped", {}).items():
        yield f"  left where it is ({move}): {why}"
    for why, blocks in row.get("cache_16bit", {}).items():
        yield f"  cache stays 16-bit in {blocks} blocks: {why}"
    for why, checks in row.get("refused", {}).items():
        yield f"  refused ({', '.join(RECIPES[check] for check in checks)}): {why}"


WORKS: Mapping[str, str] = {
    "yes": "works",
    "in part": "works, but not with every recipe",
    "no": "refused",
    "wrong": "fails",
}


def _print(table: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for head in ("type", "kind", "works", "proved", "not with"):
        shown.add_column(head, no_wrap=head == "type")
    for name, row in table["types"].items():
        lacks = [RECIPES[n] for n, status in row["status"].items() if status != "holds"]
        shown.add_row(
            name,
            row.get("kind", ""),
            row["works"],
            ", ".join(row.get("proved", {})),
            "" if row["works"] == "no" else ", ".join(lacks),
        )
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width; whole lines can be searched
    console.print(shown)
    console.print(summary(table))


def summary(table: Mapping[str, Any]) -> str:
    """Counts and releases in a line."""
    counts, versions = table["counts"], table["versions"]
    return (
        f"{counts['types']} types of transformers {versions['transformers']}: "
        f"{counts['yes'] + counts['in part']} work ({counts['in part']} not with every recipe), "
        f"{counts['no']} are refused, {counts['wrong']} fail; "
        f"{counts['families']} of {counts['of']} families work"
    )
