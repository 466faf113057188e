"""A plan as plain data, for JSON and for whoever shows it."""

from __future__ import annotations

from typing import Any

from quantize.plan.deploy import Plan, name_of
from quantize.plan.latency import ERRORS, Error, Estimate
from quantize.plan.memory import Memory
from quantize.plan.shared import Shared
from quantize.plan.shortage import shortages
from quantize.plan.simulated import QUANTILES
from quantize.plan.sizing import Option, tpot_at


def as_json(plan: Plan, errors: dict[str, Error] | None = None) -> dict[str, Any]:
    """Everything of a plan. Times in seconds with the range that four of five measurements fell in;
    sizes in bytes. errors: of the latency model; None: those of the fit."""
    errors = errors or ERRORS
    return {
        "feasible": plan.feasible,
        "gpus": plan.gpus,
        "models": [
            {
                "name": name_of(demand),
                "model": demand.model,
                "asked": demand.model_dump(exclude={"model", "name"}),
                "chosen": (
                    option_json(plan.chosen[name_of(demand)], errors)
                    if name_of(demand) in plan.chosen
                    else None
                ),
                "options": [option_json(o, errors) for o in plan.options[name_of(demand)]],
            }
            for demand in plan.request.models
        ],
        "cluster": [
            {"gpu": n.kind.name, "gpus": n.gpus, "nodes": n.nodes, "memory": n.kind.memory_bytes}
            for n in plan.request.cluster
        ],
        "engines": [
            {"name": e.name, "kind": e.nodes, "node": e.node, "gpus": list(e.gpus)}
            for e in plan.engines
        ],
        "shared": shared_json(plan.shared),
        "short": [
            {"name": s.name, "short": s.short, "by": s.by, "remedies": list(s.remedies)}
            for s in shortages(plan)
        ],
        "errors": {
            name: {"low": e.low, "high": e.high, "median": e.median, "mean": e.mean}
            for name, e in errors.items()
        },
    }


def shared_json(shared: Shared | None) -> dict[str, Any] | None:
    """How engines share GPUs; None where each has its own."""
    if shared is None:
        return None
    return {
        "gpus_alone": shared.alone,
        "attainment": {d.name: a for d, a in zip(shared.asked, shared.attainment, strict=True)},
        "load": shared.placement.load(shared.cluster),
        "preemptions": shared.outcome.preemptions,
        "prefix_cache": not shared.whole,
        "engines": [
            {
                "name": replica.demand.name,
                "gpus": list(replica.gpus),
                "weights_and_engine": replica.option.shard.weights,
                "kv": shared.kv(i),
                "kv_most": shared.kv_used(i, float(used.max(initial=0.0))),
            }
            for i, replica in enumerate(shared.placement.replicas)
            for used in [shared.outcome.samples_of(i)["used"]]
        ],
    }


def option_json(option: Option, errors: dict[str, Error]) -> dict[str, Any]:
    """One way to run one model."""
    found: dict[str, Any] = {
        "gpu": option.gpu.name,
        "tp": option.tp,
        "engines": option.replicas,
        "gpus": option.gpus,
        "refused": option.refused,
        "memory": memory_json(option.fit.memory),
        "context": option.fit.context,
        "kv_tokens": option.fit.kv_tokens,
        "sequences": option.fit.sequences,
        "kv_bytes_per_token": option.model.kv_bytes_per_token(option.tp),
        "compute": option.model.compute,
        "batched_tokens": option.engine.batched_tokens,
        "max_sequences": option.engine.max_sequences,
        "notes": list(option.model.notes),
    }
    if option.refused:
        return found
    found["tpot_alone"] = _range(errors["tpot"].around(option.alone))
    found["tpot_full"] = _range(errors["tpot"].around(tpot_at(option, option.together)))
    found["ttft_alone"] = _range(errors["ttft"].around(option.first))
    found["rate_of_one"], found["binds"] = option.rate, option.binds
    if (state := option.state) is not None:
        found["steady"] = {
            "running": state.running,
            "busy_with_prompts": state.busy,
            "ttft": _range(errors["ttft"].around(state.ttft)),
            "ttft_share": _range(errors["ttft"].around(state.ttft_share)),
            "tpot": _range(errors["tpot"].around(state.tpot)),
        }
    if (simulated := option.simulated) is not None:
        found["simulated"] = {
            "attainment": simulated.attainment,
            "quantiles": list(QUANTILES),
            "ttft": [_range(errors["ttft"].around(value)) for value in simulated.ttft],
            "tpot": [_range(errors["tpot"].around(value)) for value in simulated.tpot],
            "tokens_per_second": simulated.tokens_per_second,
            "preemptions": simulated.preemptions,
            "prefix_hit_rate": simulated.outcome.hit_rate,
            "busy": simulated.busy,
        }
    return found


def memory_json(memory: Memory) -> dict[str, int]:
    """Of one GPU, in bytes."""
    return {
        "total": memory.total,
        "budget": memory.budget,
        "weights": memory.weights,
        "activations": memory.activations,
        "overhead": memory.overhead,
        "kv": memory.kv,
    }


def _range(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.mid, estimate.high]
