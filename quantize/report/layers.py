"""Sections on the layers: rounding errors, outliers, weights on their grid, bits, and what
methods add of their own."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from quantize.block.statistics import STATISTICS
from quantize.errors import RecipeError
from quantize.formats.grouping import adapted_lines
from quantize.formats.scheme import scheme_names
from quantize.pictures import (
    Cell,
    Histogram,
    Lines,
    Number,
    Picture,
    Table,
    block_map,
    facts,
    fold_numbers,
)
from quantize.recipe.recipe import parse_recipe
from quantize.report import draw
from quantize.report.bytes import bytes_by_part
from quantize.report.model import Group, Item, Note, Section, items, mapping, number, text
from quantize.report.sources import Sources

_WORST = 10  # rows of the table of worst layers, which fits on a screen
_ALARM = 10.0  # times the median error of all layers: outliers are named, not a tail
_UNQUANTIZED = 16  # bits of a linear that stays as it is
_PICTURES = 24  # of a group; a block of experts has hundreds of linears
_SPAN = 1e6  # codes; a histogram over more is none of ours

_OUTPUT = (
    "E‖(Ŵ − W)x‖² / E‖Wx‖² of each linear: W the parent's weight after smoothing, Ŵ the stored "
    "one, x its inputs on the calibration text as they arrive through the blocks quantized before "
    "it."
)
_WEIGHT = (
    "‖Ŵ − W‖² / ‖W‖² of each linear, measured without any text: W the parent's weight after "
    "smoothing, Ŵ the stored one."
)
_ACTIVATIONS = (
    "Largest magnitude of any channel over the median of the channels' largest magnitudes, on the "
    "calibration text, by block: 1 would be channels all alike. Before as in the parent, after as "
    "the encode stages met it."
)
_WEIGHTS = (
    "Largest magnitude over root mean square, by block. Before as in the parent, after as the "
    "encode stages met it: smoothing moves outliers from activations into weights."
)
_HISTOGRAM = (
    "Weights over the step between codes of their group, after smoothing, all blocks together; "
    "dashed lines are the values that codes stand for: whole numbers for integers (the FP8 tensor "
    "core rounds products of code and scale once more), the mean over all groups for bit vectors. "
    "What lies beyond is counted at the ends."
)


def leading_error(sources: Sources) -> tuple[str, dict[str, Number]]:
    """The error that ranks layers, and its value for each: of outputs where they were
    measured, else of weights."""
    output = facts(sources.layers, "output_error")
    if output:
        return "output_error", output
    return "weight_error", facts(sources.layers, "weight_error")


def alarming(sources: Sources) -> list[str]:
    """Layers whose error is many times that of the middle layer."""
    _, errors = leading_error(sources)
    known = {name: float(e) for name, e in errors.items() if e is not None}
    limit = _ALARM * median(known.values()) if known else 0.0
    if not limit:
        return []
    above = [name for name, error in known.items() if not error <= limit]  # NaN is above all
    return sorted(above, key=lambda name: -known[name])


def errors(sources: Sources) -> Section:
    """Heat maps of the errors of all linears, and a table of the worst."""
    output, weight = facts(sources.layers, "output_error"), facts(sources.layers, "weight_error")
    maps = [block_map(output, title="Relative output error", caption=_OUTPUT, log=True)]
    if set(weight) - set(output):
        maps.append(block_map(weight, title="Relative weight error", caption=_WEIGHT, log=True))
    shown: list[Item] = [drawn for drawn in maps if drawn]
    if shown:
        shown.append(_worst(sources, output, weight))
    else:
        shown.append(Note("pq.json records no layer errors."))
    return Section("errors", "Error per layer", "", shown)


def _worst(sources: Sources, output: Mapping[str, Number], weight: Mapping[str, Number]) -> Table:
    key, ranked = leading_error(sources)
    rows: list[list[Cell]] = []
    for name in sorted(ranked, key=lambda name: -float(ranked[name] or 0))[:_WORST]:
        said = ", ".join(
            f"{fact.replace('_', ' ')} {value}"
            for fact, value in sources.layers[name].items()
            if fact not in ("output_error", "weight_error")
        )
        rows.append([name, output.get(name), weight.get(name), said])
    columns = ("layer", "output error", "weight error", "on record")
    known = [c for c in range(len(columns)) if any(row[c] not in (None, "") for row in rows)]
    caption = f"By {key.replace('_', ' ')}, the worst first."
    return Table(
        "Worst layers",
        caption,
        [columns[c] for c in known],
        [[row[c] for c in known] for row in rows],
    )


def outliers(sources: Sources) -> Section:
    """Outliers of activations and weights, before and after smoothing."""
    if sources.statistics is None:
        return Section("outliers", "Outliers", "", [_no_statistics(sources)])
    blocks = [block for block in items(sources.statistics, "blocks") if isinstance(block, dict)]
    inputs = _curves(blocks, "inputs", "absmax", "median")
    shown: list[Item] = []
    if inputs:
        named = [
            Lines(_group_title(sources, name), "", x, series, "block", "max / median", log_y=True)
            for name, (x, series) in inputs.items()
        ]
        shown.append(_limit("Activations", _ACTIVATIONS, named))
        shown.append(_channels(sources, blocks))
    else:
        shown.append(Note("The recipe reads no calibration text, so no activations were measured."))
    if weights := _curves(blocks, "weights", "absmax", "rms"):
        drawn = [
            Lines(name, "", x, series, x_label="block", y_label="max / rms", log_y=True)
            for name, (x, series) in weights.items()
        ]
        shown.append(_limit("Weights", _WEIGHTS, drawn))
    return Section("outliers", "Outliers", "", shown)


def _no_statistics(sources: Sources) -> Note:
    said = f"{STATISTICS} is not there or cannot be read; pq convert writes it."
    recipe = shlex.quote(text(mapping(sources.provenance, "recipe"), "name", "RECIPE"))
    command = f"pq convert --model {sources.parent_path} --recipe {recipe} "
    return Note(said, command + f"--output {sources.new_path}")


def _limit(title: str, caption: str, pictures: Sequence[Picture]) -> Group:
    """A group that stays readable where a block has very many linears."""
    if len(pictures) > _PICTURES:
        caption += f" The first {_PICTURES} of {len(pictures)}."
    return Group(title, caption, pictures[:_PICTURES])


def _ratio(data: Mapping[str, Any], above: str, below: str) -> float | None:
    top, bottom = number(data, above), number(data, below)
    return top / bottom if top is not None and bottom else None


def _curves(
    blocks: Sequence[Mapping[str, Any]], part: str, above: str, below: str
) -> dict[str, tuple[list[float], dict[str, list[Number]]]]:
    """Ratio of two statistics by block for every name in `part`: name → (block
    numbers, {"after": …, "before": …}).

    Of names that differ by a number alone, such as those of experts, the largest ratio.
    """
    names = dict.fromkeys(fold_numbers(name) for block in blocks for name in mapping(block, part))
    x = [_index(block, i) for i, block in enumerate(blocks)]
    out: dict[str, tuple[list[float], dict[str, list[Number]]]] = {}
    for name in names:
        series: dict[str, list[Number]] = {}
        for moment in ("after", "before"):
            ratios = [_ratios(mapping(block, part), name, moment, above, below) for block in blocks]
            series[moment] = [max(found, default=None) for found in ratios]
        if series["after"] == series["before"]:
            series = {"as in the parent": series["before"]}
        out[name] = (x, series)
    return out


def _index(block: Mapping[str, Any], default: int) -> float:
    index = number(block, "index")
    return float(default) if index is None else index


def _ratios(part: Mapping[str, Any], name: str, moment: str, above: str, below: str) -> list[float]:
    """Known ratios of all entries that fold to `name`."""
    alike = [mapping(mapping(part, one), moment) for one in part if fold_numbers(one) == name]
    ratios = [_ratio(data, above, below) for data in alike]
    return [ratio for ratio in ratios if ratio is not None]


def _group_title(sources: Sources, first: str) -> str:
    """Names of the linears that share one input, of which `first` is the first."""
    arch = sources.weights.arch if sources.weights else None
    groups = arch.calibration_order if arch else ()
    group = next((g for g in groups if fold_numbers(g[0]) == fold_numbers(first)), (first,))
    return ", ".join([first, *(name.rpartition(".")[2] for name in group[1:])])


def _channels(sources: Sources, blocks: Sequence[Mapping[str, Any]]) -> Table:
    """The most uneven block of every group of linears, with its largest channels; of
    experts the most uneven one."""
    worst: dict[str, tuple[float, list[Cell]]] = {}
    for i, block in enumerate(blocks):
        for name in mapping(block, "inputs"):
            found = mapping(mapping(block, "inputs"), name)
            before, after = mapping(found, "before"), mapping(found, "after")
            ratio = _ratio(before, "absmax", "median")
            if ratio is not None and (
                fold_numbers(name) not in worst or ratio > worst[fold_numbers(name)][0]
            ):
                row: list[Cell] = [
                    _group_title(sources, name),
                    number(block, "index") or i,
                    number(before, "tokens"),
                ]
                row += [ratio, _ratio(after, "absmax", "median"), _top(before), _top(after)]
                worst[fold_numbers(name)] = ratio, row
    rows = [row for _, row in worst.values()]
    columns = (
        "inputs of",
        "block",
        "tokens",
        "before",
        "after",
        "largest channels before",
        "after",
    )
    caption = (
        "The block with the largest ratio in the parent, its ratio before and after smoothing, and "
        "its largest channels (channel: max |x|)."
    )
    return Table(
        "Most uneven inputs",
        caption,
        columns,
        rows,
        ("", ".0f", ",.0f", ".1f", ".1f", "", ""),
    )


def _top(data: Mapping[str, Any]) -> str:
    pairs = [pair for pair in items(data, "top") if isinstance(pair, list) and len(pair) == 2]
    return ", ".join(
        f"{channel}: {draw.format_number(float(largest), 3)}"
        for channel, largest in pairs[:3]
        if isinstance(channel, int) and isinstance(largest, int | float)
    )


def weights(sources: Sources) -> Section:
    """Bits of every linear, and weights against the code points they are rounded to."""
    shown: list[Item] = bytes_by_part(sources)
    if found := sources.weights:
        bits = dict.fromkeys(found.linears, _UNQUANTIZED)
        bits |= {name: found.schemes[name].bits for name in bits if name in found.schemes}
        said = "; ".join(scheme_names(found.schemes.values())) or "none"
        counted = "Bits of a weight code, scales not counted; 16 is not quantized."
        caption = f"{counted} Schemes: {said}."
        if drawn := block_map(bits, title="Bits", caption=caption, unit="bits"):
            shown.append(drawn)
    histograms = [h for h in _histograms(mapping(sources.statistics or {}, "histograms")) if h]
    if histograms:
        shown.append(_limit("Weights against the code points", _HISTOGRAM, histograms))
    elif sources.statistics is None:
        shown.append(_no_statistics(sources))
    return Section("weights", "Weights", "", shown)


def _histograms(found: Mapping[str, Any]) -> Iterator[Histogram | None]:
    for name, data in found.items():
        if not isinstance(data, dict):
            continue
        edges = [number({"": edge}, "") for edge in items(data, "edges")]
        counts = [number({"": count}, "") for count in items(data, "counts")]
        known = [edge for edge in edges if edge is not None]
        if not counts or len(known) != len(counts) + 1:
            continue
        if known != sorted(set(known)) or known[-1] - known[0] > _SPAN:
            continue
        bits = int(min(max(number(data, "bits") or 0, 0), 8))
        stored = [number({"": point}, "") for point in items(data, "points")][: 1 << 8]
        # Checkpoints of earlier releases have integer codes and do not say so.
        half = 1 << bits >> 1
        points = [point for point in stored if point is not None] or [*range(-half, half)]
        title = text(data, "role", name)
        if bits:
            title += f", {bits}-bit"
        if group := number(data, "group_size"):
            title += f" g{group:.0f}"
        yield Histogram(title, "", known, counts, points, "weight / step of its group")


def methods(sources: Sources) -> Section:
    """Pictures that the recipe's methods draw of their own facts."""
    recipe = mapping(sources.provenance, "recipe")
    try:
        stages = parse_recipe(
            text(recipe, "resolved"),
            f"{text(recipe, 'name', 'recipe')}.yaml",
        ).stages
    except RecipeError as err:
        first = str(err).splitlines()[0]
        said = "The recipe is not one that this version of pq reads"
        note = Note(f"{said}, so its methods' pictures are left out ({first}).")
        return Section("methods", "Methods", "", [note])
    shown: list[Picture] = []
    for stage in stages:
        shown += [picture for picture in stage.pictures(sources.layers) if picture not in shown]
    chain = " → ".join(f"{stage.method} ({stage.kind})" for stage in stages)
    nothing: list[Item] = [Note("These methods have no pictures of their own.")]
    return Section("methods", "Methods", f"Stages: {chain}.", [*shown] or nothing)


def fallbacks(sources: Sources) -> list[str]:
    """Names of linears that could not be encoded as the recipe says, with the reason."""
    reasons = {name: noted.get("fallback") for name, noted in sources.layers.items()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def adapted(sources: Sources) -> list[str]:
    """What linears got instead of what the recipe asks for, because of their sizes."""
    return adapted_lines(sources.layers)


SECTIONS: tuple[Callable[[Sources], Section], ...] = (errors, outliers, weights, methods)
