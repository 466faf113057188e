"""What is told about a finished conversion: the totals of its run, and its part of the
provenance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantize.calibration.tokens import TokenSet
from quantize.conversion.output import lost_in
from quantize.conversion.plan import Plan
from quantize.conversion.remedy import remedy_of
from quantize.conversion.serving import unserved
from quantize.conversion.state import State
from quantize.cost.peak import peak_of
from quantize.formats.grouping import adapted_lines

RESTRUCTURED = (
    "policy",
    "mean_experts",
    "ffn_error",
    "pruned_error",
    "untrained_error",
    "random_error",
)
"""Facts of a restructured FFN that a summary shows."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did; the JSON that `pq convert --json` prints."""

    output: str
    recipe: str
    blocks: int
    quantized_linears: int
    bits_per_weight: float
    source_bytes: int
    """As it is stored."""
    dequantized: str | None
    """How the source is stored, where that is small (FP8, MXFP4) and was dequantized."""
    output_bytes: int
    seconds: float
    seconds_per_block: float
    peak_bytes: int | None
    """Most memory of the process, or of the GPU where blocks are computed on one; None where it
    cannot be told."""
    promoted: list[str]
    """Linears that got more bits than their stage's own, to spend a target of bits per weight."""
    fallbacks: list[str]
    unmoved: dict[str, list[str]]
    """What scales could not move over without changing what a block computes, and why → blocks."""
    cache_16bit: dict[str, list[str]]
    """Why attention cannot work on an INT4 cache → the modules that keep 16 bits."""
    equal_tokens: dict[str, list[str]]
    """Why tokens count the same although a stage asks for `token_weights: attention` → the
    modules."""
    adapted: list[str]
    """What linears got instead of the group or activations that the recipe asks for, where their
    sizes do not allow those: a line for all that got the same."""
    lost: list[str]
    """What the recipe asks for and the format of the output cannot hold."""
    unserved: list[str]
    """What of an output in vLLM's own format vLLM would refuse, where, and what to do."""
    notes: list[str]
    """What of the model's folder was not read, or otherwise than config.json has it, a line each."""
    carried: dict[str, int]
    """Modules that the model has no place for and that go with it (MTP heads) → their tensors."""
    untied_head_bytes: int
    """What a head takes that shared the embedding's weight and got one of its own; 0 where none
    did."""
    restructured: list[dict[str, Any]]
    """What each restructured block became: errors of its FFN beside its baselines', time, peak
    memory."""
    activated_reduction: float | None
    """Share of the parameters a token meets that was saved; None without a restructure stage."""
    bos: bool | None
    """Whether calibration windows begin with BOS; None for data-free recipes."""
    bos_token_id: int | None
    """That token; None where they do not."""
    held_out: dict[str, Any] | None
    """How far the output is from its parent on windows that calibration did not use, fields of
    `quantize.evaluation.held_out.HeldOut`; or under `not_measured` why that is not known; None where
    it was not asked for."""
    hurt_most: dict[str, Any] | None
    """The linear with the largest relative squared error and what helps it, fields of
    `quantize.conversion.remedy.Remedy`; None where no error is known."""
    mean_output_error: float | None
    """Mean over linears of the relative squared output error on calibration text; None for
    data-free recipes."""


def summary_of(
    plan: Plan,
    state: State,
    tokens: TokenSet | None,
    seconds: float,
    seconds_per_block: float,
    output_bytes: int,
    look: dict[str, Any] | None = None,
) -> Summary:
    """Totals of a finished run. tokens: what it was calibrated on. look: at held-out windows."""
    bos = None if tokens is None else tokens.bos
    errors = [facts["output_error"] for facts in state.report.values() if "output_error" in facts]
    allocation, small = plan.decisions.allocation, plan.source.dequantized
    worst = remedy_of(plan, state)
    return Summary(
        output=str(plan.request.output),
        recipe=plan.recipe.name,
        blocks=plan.shape.n_blocks,
        quantized_linears=len(state.schemes),
        bits_per_weight=state.bits_per_weight,
        source_bytes=small.stored_bytes if small else state.source_bytes,
        dequantized=str(small) if small else None,
        output_bytes=output_bytes,
        seconds=round(seconds, 2),
        seconds_per_block=round(seconds_per_block, 3),
        peak_bytes=peak_of(plan.request.device),
        promoted=list(allocation.promoted) if allocation else [],
        fallbacks=[name for name, facts in state.report.items() if facts.get("fallback")],
        unmoved=_unmoved(state),
        cache_16bit=_by_reason(
            (name, str(facts["cache_16bit"]))
            for name, facts in state.report.items()
            if "cache_16bit" in facts
        ),
        equal_tokens=_by_reason(
            (name, str(facts["equal_tokens"]))
            for name, facts in state.report.items()
            if "equal_tokens" in facts
        ),
        adapted=adapted_lines(state.report),
        lost=lost_in(plan, state),
        unserved=[str(line) for line in unserved(plan, state.schemes)],
        notes=list(plan.source.notes),
        carried={name: len(found) for name, found in plan.source.leftovers.carried.items()},
        untied_head_bytes=state.untied_head_bytes,
        restructured=[
            {
                "name": name,
                **{key: state.report[name].get(key) for key in RESTRUCTURED},
                **asdict(cost),
            }
            for name, cost in state.costs.items()
        ],
        activated_reduction=state.report.get("ladimo", {}).get("activated_reduction"),
        bos=None if tokens is None else bos is not None,
        bos_token_id=bos,
        held_out=look,
        hurt_most=worst.as_json() if worst else None,
        mean_output_error=sum(errors) / len(errors) if errors else None,
    )


def _unmoved(state: State) -> dict[str, list[str]]:
    return _by_reason(
        (name, f"{edge}: {why}")
        for name, facts in state.report.items()
        for edge, why in facts.get("unmoved", {}).items()
    )


def _by_reason(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, reason in found:
        out.setdefault(reason, []).append(name)
    return out


def results_of(plan: Plan, state: State, dropped: int) -> dict[str, Any]:
    """What goes into the provenance after the last block. dropped: sequences that left the
    calibration."""
    allocation, leftovers = plan.decisions.allocation, plan.source.leftovers
    return {
        "bits_per_weight": state.bits_per_weight,
        "dropped_sequences": dropped,
        "attention": plan.attention,
        "allocation": allocation.as_json() if allocation else None,
        "carried": {name: len(found) for name, found in leftovers.carried.items()},
        "ignored": list(leftovers.ignored),
        "layers": state.report,
    }
