"""`pq inspect`: what a checkpoint holds, as a tree or as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.cli import options
from quantize.cli.common import local_model
from quantize.pictures import fold_numbers

if TYPE_CHECKING:
    from rich.tree import Tree

    from quantize.inspect.inspection import DecoderBlock, Inspection, Linear, Other, Totals

_NAMED = 10  # fallbacks that are named


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Model folder or Hub id, quantized or not, pq's or another's."
        ),
    ],
    revision: options.Revision = None,
    every_block: Annotated[
        bool, typer.Option("--all", help="Show every block and expert; equal ones are folded else.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print everything as JSON on stdout."),
    ] = False,
) -> None:
    """Show layers, bits, sizes and provenance of a checkpoint. Reads headers only."""
    from quantize.inspect.inspection import inspect as run

    folder = local_model(model, revision)
    found = run(folder)
    loads_in = loads_line(folder)
    if as_json:
        facts = dataclasses.asdict(found) | {"loads_in": loads_in}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(found, every_block)
        typer.echo(printable(loads_in))


def loads_line(folder: Path) -> str:
    """`quantize.inspect.engines.loads_line`."""
    from quantize.inspect import engines

    return engines.loads_line(folder)


def _print(found: Inspection, every_block: bool) -> None:
    from rich.console import Console
    from rich.tree import Tree

    from quantize.inspect.words import attention_words

    sizes = ", ".join(f"{key} {value}" for key, value in found.sizes.items())
    root = Tree(
        printable(f"{found.origin or found.folder}: {found.architecture} ({found.model_type})")
    )
    root.add(printable(sizes))
    for line in _total_lines(found.totals):
        root.add(line)
    for note in found.notes:
        root.add(printable(note))
    if found.attention is not None:
        root.add(printable(f"attention: {attention_words(found.attention)}"))
    runs = list(_runs(found.blocks, every_block))
    for other in found.outside:
        root.add(_other_line(other))
    for run in runs:
        _add_blocks(root, run, every_block)
    _add_provenance(root, found)
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; whole lines can be searched
    console.print(root)


def _total_lines(totals: Totals) -> Iterator[str]:
    if totals.parameters is None:
        reason = "headers do not tell every shape, so parameters are not counted"
        yield f"{_size(totals.tensor_bytes)}; {reason}"
        return
    quantized = totals.quantized_parameters or 0
    percent = 100 * quantized / max(1, totals.parameters)
    yield (
        f"{totals.parameters:,} parameters: {totals.embedding_parameters:,} in embeddings, "
        f"{quantized:,} quantized ({percent:.1f} %)"
    )
    if totals.bits_per_weight is not None:
        linears = totals.quantized_bits_per_weight
        inside = "" if linears is None else f"{linears:.3f} in quantized linears, scales counted; "
        yield f"bits per weight: {inside}{totals.bits_per_weight:.3f} over everything"
    line = f"{_size(totals.file_bytes)} on disk"
    if totals.expected_bytes:
        more = totals.file_bytes / totals.expected_bytes - 1
        line += f", {100 * more:+.2f} % against the sum of bits"
    if totals.sixteen_bit_bytes:
        times = totals.sixteen_bit_bytes / totals.file_bytes
        line += f"; 16-bit {_size(totals.sixteen_bit_bytes)}, {times:.2f}x"
    yield line


def _runs(blocks: Sequence[DecoderBlock], every_block: bool) -> Iterator[list[DecoderBlock]]:
    """Neighbouring blocks that hold the same."""

    def content(block: DecoderBlock) -> tuple[Any, ...]:
        return (block.name.rpartition(".")[0], block.linears, block.others, block.routing)

    for _, run in itertools.groupby(blocks, key=lambda b: b.name if every_block else content(b)):
        yield list(run)


def _add_blocks(root: Tree, run: list[DecoderBlock], every_expert: bool) -> None:
    from quantize.inspect.words import routing_words

    first, last = run[0], run[-1]
    name = first.name if first is last else f"{first.name} … {last.index}, {len(run)} equal blocks"
    branch = root.add(printable(f"{name}: {_size(first.bytes)}{'' if first is last else ' each'}"))
    if first.routing is not None:
        branch.add(printable(f"routing: {routing_words(first.routing)}"))
    for alike in [[x] for x in first.linears] if every_expert else _alike(first.linears):
        branch.add(printable(_linear_line(alike)))
    for other in first.others:
        branch.add(_other_line(other))


def _alike(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Linears that differ by a number in their names alone, as those of experts do, together."""
    runs: dict[Linear, list[Linear]] = {}
    for linear in linears:
        runs.setdefault(dataclasses.replace(linear, name=fold_numbers(linear.name)), []).append(
            linear
        )
    return list(runs.values())


def _linear_line(alike: Sequence[Linear]) -> str:
    """One line for linears that differ in their names alone."""
    linear = alike[0]
    each = " each" if len(alike) > 1 else ""
    shape = "shape unknown" if linear.shape is None else f"{linear.shape[0]} x {linear.shape[1]}"
    name = f"{fold_numbers(linear.name)}, {len(alike)} equal" if each else linear.name
    if linear.role != linear.name.rpartition(".")[2]:
        name = f"{linear.role} ({name})"
    size = f"{_size(linear.bytes)}{each}"
    if not linear.quantized:
        return f"{name}: {shape}, {linear.format}, {size}"
    bits = "bits unknown" if linear.bits is None else f"{linear.bits}-bit"
    group = "" if linear.group_size is None else f" g{linear.group_size}"
    activations = "16-bit" if linear.activations == "none" else linear.activations
    stored = ""
    if linear.bits_per_weight is not None:
        stored = f", {linear.bits_per_weight:.3f} bits per weight"
    numbers = f"{bits}{group}, {activations} activations{stored}"
    return f"{name}: {shape}, {numbers}, {linear.format}, {size}"


def _other_line(other: Other) -> str:
    shape = " x ".join(map(str, other.shape)) or "scalar"
    return printable(f"{other.name}: {shape}, {other.dtype}, {_size(other.bytes)}")


def _add_provenance(root: Tree, found: Inspection) -> None:
    made = found.made
    if made is None:
        root.add(printable(found.made_problem or "no pq.json: pq did not write this model"))
        return
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    branch = root.add(printable(f"made by pq {made.pq} with recipe {made.recipe}"))
    branch.add(printable(f"{versions}; {' '.join(made.machine.values())}"))
    facts = [f"{key} {_short(value)}" for key, value in (made.calibration or {}).items()]
    branch.add(printable(f"calibration: {', '.join(facts)}" if facts else "no calibration"))
    if made.dropped_sequences:
        branch.add(f"{made.dropped_sequences} calibration sequences were dropped as not finite")
    parent = f"{made.origin.id}@{made.origin.commit}, " if made.origin else ""
    source = branch.add(printable(f"source, {parent}SHA-256"))
    for name, digest in made.source.items():
        source.add(printable(f"{name} {_short(digest)}"))
    if made.dequantized:
        source.add(printable(f"stored small: {made.dequantized}"))
    if made.fallbacks:
        more = len(made.fallbacks) - _NAMED
        names = ", ".join(made.fallbacks[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        branch.add(printable(f"rounded to nearest for want of a usable Hessian: {names}"))
    for line in made.adapted:
        branch.add(printable(f"not as asked for: {line}"))
    if made.worst:
        worst = branch.add(f"largest {made.worst[0].kind} (relative, squared)")
        for layer in made.worst:
            worst.add(printable(f"{layer.name} {layer.error:.4g}"))


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _size(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def printable(text: str) -> str:
    """Names come from files of others: no control characters on the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
