"""What LaDiMo adds to a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantize.pictures import Bars, Cell, Heatmap, Histogram, Lines, Picture, Table, place_of

_ERRORS = {
    "converted": "ffn_error",
    "static pruning": "pruned_error",
    "same split, untrained": "untrained_error",
    "random split, untrained": "random_error",
}
_SHOWN = 3  # layers whose scores are drawn one by one: more would fill the report

Facts = Mapping[str, Any]


def pictures(layers: Mapping[str, Facts], plan: Facts) -> tuple[Picture, ...]:
    """Pictures from the facts of converted FFNs (full name → facts) and of the search."""
    ffns = {
        place[0]: facts
        for name, facts in layers.items()
        if "ffn_error" in facts and (place := place_of(name))
    }
    ffns = dict(sorted(ffns.items()))
    return (
        *_plan(plan),
        *_errors(ffns),
        *_splits(ffns),
        *_scores(ffns),
        *_visits(ffns),
        *_load(ffns),
    )


def _plan(plan: Facts) -> Iterator[Picture]:
    alone = plan.get("kl_alone")
    if isinstance(alone, Mapping) and alone:
        means = plan.get("mean_experts", {})
        yield Bars(
            "Sensitivity of the layers",
            "KL(parent || model with this block's FFN alone converted, untrained) on calibration "
            f"text, at one level. The search left {len(alone) - len(means)} of {len(alone)} FFNs "
            f"dense; a token then meets {100 * plan.get('activated_reduction', 0):.1f} % fewer "
            f"parameters (counted: {plan.get('counted', '')}).",
            [str(block) for block in alone],
            {"alone": list(alone.values())},
            "nats per token",
        )
    curve = plan.get("curve")
    if isinstance(curve, Mapping) and len(curve) > 1:
        yield Lines(
            "What a smaller budget costs",
            "KL(parent || converted, untrained) of the layers that the search would choose for "
            "other reductions of the activated parameters. Training lowers all of "
            f"them.{_alternatives(plan)}",
            [100 * float(share) for share in curve],
            {"untrained": list(curve.values())},
            "% fewer activated parameters",
            "nats per token",
            log_y=True,
        )


def _alternatives(plan: Facts) -> str:
    """KL of the choice beside those of others that save as much."""
    others = {
        "the same level everywhere": "kl_untrained_everywhere",
        "a level per layer": "kl_untrained_adaptive",
    }
    told = [
        f"{label} {plan[key]:.4f}"
        for label, key in others.items()
        if isinstance(plan.get(key), float)
    ]
    chosen = plan.get("kl_untrained")
    return (
        f" Chosen: {chosen:.4f} nats; {', '.join(told)}."
        if told and isinstance(chosen, float)
        else ""
    )


def _errors(ffns: Mapping[int, Facts]) -> Iterator[Picture]:
    if not ffns:
        return
    yield Bars(
        "Error of the converted FFNs and of what they must beat",
        "Squared error of the FFN's output relative to its target, on calibration tokens that "
        "were not trained on, at equal activated parameters. Static pruning keeps the neurons "
        "that fluctuate most (FLAP) with a bias for the others' mean; the splits have a fitted "
        "router but no training.",
        [str(block) for block in ffns],
        {label: [facts.get(key) for facts in ffns.values()] for label, key in _ERRORS.items()},
        "relative squared error",
        log_y=True,
    )
    rows: list[Sequence[Cell]] = [
        (
            block,
            facts.get("policy"),
            facts.get("mean_experts"),
            *(facts.get(key) for key in _ERRORS.values()),
        )
        for block, facts in ffns.items()
    ]
    yield Table(
        "Converted FFNs",
        "Policy: how a token chooses its routed experts; experts: how many it visits on average, "
        "on held-out tokens.",
        ("block", "policy", "experts", *_ERRORS),
        rows,
        (",d", "", ".3f", ".4f", ".4f", ".4f", ".4f"),
    )


def _splits(ffns: Mapping[int, Facts]) -> Iterator[Picture]:
    found = {
        block: facts["split_errors"] for block, facts in ffns.items() if facts.get("split_errors")
    }
    names = list(dict.fromkeys(name for errors in found.values() for name in errors))
    if names:
        yield Bars(
            "Ways to divide an FFN",
            "The same error without training, routers fitted, at equal activated parameters. "
            "Clustered: neurons of large contribution are shared, the others grouped by the "
            "tokens they work on; contiguous: neurons in their order, as published.",
            [str(block) for block in found],
            {name: [errors.get(name) for errors in found.values()] for name in names},
            "relative squared error",
            log_y=True,
        )


def _scores(ffns: Mapping[int, Facts]) -> Iterator[Picture]:
    shown = [block for block, facts in ffns.items() if facts.get("edges") and facts.get("counts")]
    for block in shown[:: max(1, -(-len(shown) // _SHOWN))]:
        facts = ffns[block]
        begin = facts.get("threshold")
        where = (
            "the line is the threshold above which an expert is visited"
            if begin is not None
            else "the highest win"
        )
        yield Histogram(
            f"Routing scores of block {block}",
            "Scores of all routed experts on held-out tokens, in units of their standard "
            f"deviation; {where}.",
            facts["edges"],
            facts["counts"],
            [] if begin is None else [begin],
            "score",
            "scores",
        )


def _visits(ffns: Mapping[int, Facts]) -> Iterator[Picture]:
    rows = {block: facts["visits"] for block, facts in ffns.items() if facts.get("visits")}
    if rows:
        most = max(map(len, rows.values()))
        shares = [
            [count / max(sum(row), 1) for count in row] + [None] * (most - len(row))
            for row in rows.values()
        ]
        yield Heatmap(
            "Experts that a token visits",
            "Share of held-out tokens by the number of routed experts they visit.",
            [str(block) for block in rows],
            [str(count) for count in range(most)],
            shares,
            "of the tokens",
            columns_label="experts",
        )


def _load(ffns: Mapping[int, Facts]) -> Iterator[Picture]:
    rows = {block: facts["load"] for block, facts in ffns.items() if facts.get("load")}
    if rows:
        most = max(map(len, rows.values()))
        yield Heatmap(
            "Load of the experts",
            "Share of held-out tokens that visit each routed expert. Of an expert that few visit, "
            "later rounding knows little.",
            [str(block) for block in rows],
            [str(expert) for expert in range(most)],
            [[*row, *([None] * (most - len(row)))] for row in rows.values()],
            "of the tokens",
            columns_label="expert",
        )
