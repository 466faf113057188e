"""`pq plan`: from checkpoints to a deployment that meets its goals, or what it lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli import options
from quantize.cli.common import local_model, quiet_libraries
from quantize.errors import PlanError, UsageError

if TYPE_CHECKING:
    from quantize.plan.deploy import Plan
    from quantize.plan.latency import Constants, Error
    from quantize.plan.request import Request
    from quantize.plan.served import ServedModel
    from quantize.plan.simulate.costs import StepCosts


def plan(
    context_of_call: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="YAML file of models and a cluster."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="One model: a folder or Hub id; no FILE.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Its GPU: h100, a100-40, rtx-4090, …")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of one node.", min=1, max=64)] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 16,
    tp: Annotated[int | None, typer.Option(help="GPUs of one engine; else the fewest.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the longest sequence that must fit.")
    ] = None,
    input_tokens: Annotated[
        int | None, typer.Option("--input", help="Tokens of a prompt, in the mean: 1024.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output", help="Tokens of an answer, in the mean: 256.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Sequences of the full context to run at once.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second.")] = None,
    trace: Annotated[
        str | None, typer.Option(help="CSV or name of a trace of requests instead.")
    ] = None,
    ttft: Annotated[float | None, typer.Option(help="Goal: seconds to the first token.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Goal: seconds a token after it.")] = None,
    attainment: Annotated[
        float | None, typer.Option(help="Share of requests that should meet the goals: 0.9.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="KV cache: bf16, fp8, fp8-head, int8, int4; auto: its own.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Another checkpoint, or a recipe for this one: GPUs that it saves. Repeatable."
        ),
    ] = None,
    emit: Annotated[
        str | None,
        typer.Option(help="Print files instead: vllm, compose, production-stack, llm-d."),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of `vllm bench serve` on this model, GPU and tp. Repeatable."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="CSV[@MODEL/FORMAT]", help="Measured times of its steps; no latency model."
        ),
    ] = None,
    trace_dir: Annotated[
        Path | None, typer.Option(help="Folder with the public traces; else PQ_TRACE_DIR.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of it here.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """GPUs, memory and latency of serving checkpoints; exit code 10 where goals cannot be met."""
    from quantize.plan.answer import as_json as plain
    from quantize.plan.request import load_request, single
    from quantize.plan.sharing import plan_of
    from quantize.plan.simulate.requests import TRACE_DIR

    if trace_dir is not None:
        os.environ[TRACE_DIR] = str(trace_dir)
    if (file is None) == (model is None):
        raise UsageError("give a FILE, or --model with --gpu")
    _together(emit, html, as_json, compare, profile)
    if file is not None:
        _nothing_beside(file, context_of_call)
        request = load_request(file)
        if compare and len(request.models) > 1:
            raise UsageError("--compare goes with one model; this FILE has more")
    else:
        if gpu is None:
            raise UsageError("--model: name its GPU with --gpu, e.g. h100")
        request = single(
            str(model),
            gpu,
            gpus,
            nodes,
            tp=tp,
            context=context,
            input=input_tokens,
            output=output_tokens,
            sequences=sequences,
            rate=rate,
            trace=trace,
            ttft=ttft,
            tpot=tpot,
            attainment=attainment,
            kv=kv,
        )
    models = _models(request)
    if file is None and {input_tokens, output_tokens, context, trace} == {None}:
        request = _within_context(request, models)
    constants, errors = _constants(request, models, calibrate or [])
    measured = None if profile is None else _profile(profile, request)
    found = plan_of(request, models, constants, measured)
    if emit is not None:
        from quantize.plan.emit import emit as text_of

        typer.echo(text_of(emit, found), nl=False)
        return
    others = [_instead(request, other, constants) for other in compare or []]
    if html is not None:
        _page(found, html, errors)
    if as_json:
        data = plain(found, errors)
        if others:
            data["compared"] = [plain(other, errors) for other in others]
        typer.echo(json.dumps(data, indent=2))
    else:
        from quantize.cli.plan_table import print_comparison, print_plan

        print_plan(found, errors, bool(calibrate), measured is not None)
        if others:
            print_comparison([found, *others])
    if not found.feasible:
        raise PlanError(f"no plan: {', '.join(found.missing)} cannot be served as asked")


def _together(
    emit: str | None,
    html: Path | None,
    as_json: bool,
    compare: list[str] | None,
    profile: str | None,
) -> None:
    """Refuse, before anything is read, what does not go together. UsageError."""
    from quantize.plan.emit import KINDS

    if emit is not None and emit not in KINDS:
        raise UsageError(f"--emit {emit}: choose one of {', '.join(KINDS)}")
    beside = [("--html", html is not None), ("--json", as_json), ("--compare", bool(compare))]
    for option, given in beside:
        if emit is not None and given:
            raise UsageError(f"--emit prints one kind of file alone; leave {option} out")
    if compare and profile is not None:
        raise UsageError("--compare: --profile has measured one checkpoint; leave one of them out")
    if html is not None and html.suffix not in (".html", ".htm"):
        raise UsageError(f"--html {html}: must end in .html; the JSON goes beside it")


_OF_ONE = {
    name: "--" + name.removesuffix("_tokens")
    for name in (
        *("gpu", "gpus", "nodes", "tp", "context", "input_tokens", "output_tokens", "sequences"),
        *("rate", "trace", "ttft", "tpot", "attainment", "kv"),
    )
}
"""What a FILE says itself, as parameters and options."""


def _nothing_beside(file: Path, context: typer.Context) -> None:
    """Refuse options that only go with --model. UsageError."""
    given = [
        option
        for name, option in _OF_ONE.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        verb = "goes" if len(given) == 1 else "go"
        raise UsageError(f"{', '.join(given)} {verb} with --model; write it into {file}")


def _models(request: Request) -> dict[str, ServedModel]:
    from quantize.plan.checkpoint import served_model
    from quantize.plan.deploy import name_of

    return {
        name_of(demand): served_model(local_model(demand.model), demand.kv, name_of(demand))
        for demand in request.models
    }


def _within_context(request: Request, models: Mapping[str, ServedModel]) -> Request:
    """A request of usual lengths, cut to what its model takes: nobody asked for more."""
    (demand,), (model,) = request.models, models.values()
    most = model.max_context
    if most is None or demand.input + demand.output <= most:
        return request
    output = max(1, most * demand.output // (demand.input + demand.output))
    shorter = demand.model_copy(update={"input": max(1, most - output), "output": output})
    return request.model_copy(update={"models": (shorter,)})


def _instead(request: Request, other: str, constants: Constants) -> Plan:
    """The plan for another checkpoint in the place of the one model, or for what a recipe would make
    of it."""
    from quantize.plan.deploy import name_of
    from quantize.plan.sharing import plan_of

    first = request.models[0]
    if _is_recipe(other):
        name = f"{name_of(first)} by {Path(other).name.removesuffix('.yaml')}"
        demand = first.model_copy(update={"name": name})
        models = {name: _foretold(first.model, other, first.kv, name)}
    else:
        demand = first.model_copy(update={"model": other, "name": None})
        models = _models(request.model_copy(update={"models": (demand,)}))
    return plan_of(request.model_copy(update={"models": (demand,)}), models, constants)


def _is_recipe(other: str) -> bool:
    """Whether what is compared is a recipe: no folder, and a YAML file or a shipped name."""
    from quantize.recipe.files import shipped_recipes

    if Path(other).is_dir():
        return False
    names = {path.stem for path in shipped_recipes()}
    return other.endswith((".yaml", ".yml")) or other in names


def _foretold(model: str, recipe: str, kv: str, name: str) -> ServedModel:
    """What a recipe would make of a model, by the sizes that a conversion reckons with."""
    import torch

    from quantize.conversion.foretold import foretold
    from quantize.conversion.request import Request as Conversion
    from quantize.plan.checkpoint import model_of
    from quantize.recipe.recipe import load_recipe

    quiet_libraries()
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    asked = Conversion(local_model(model), load_recipe(recipe), Path("out"), cpu, dtype)
    return model_of(*foretold(asked), kv, name)


def _constants(
    request: Request, models: dict[str, ServedModel], files: list[Path]
) -> tuple[Constants, dict[str, Error]]:
    """Constants of the latency model and how far it errs."""
    from quantize.plan.latency import CONSTANTS, ERRORS

    if not files:
        return CONSTANTS, ERRORS
    from quantize.plan.calibrate import calibrated, read_run
    from quantize.plan.deploy import name_of

    demand = request.models[0]
    if len(request.models) > 1 or demand.tp is None:
        raise UsageError("--calibrate needs one model and --tp, those that were measured")
    runs = [read_run(path) for path in files]
    return calibrated(models[name_of(demand)], request.cluster[0].kind, demand.tp, runs)


def _profile(given: str, request: Request) -> dict[int, StepCosts]:
    """Costs by tp of the rows that `CSV[@MODEL/FORMAT]` names."""
    from quantize.plan.simulate.tables import profiles, read_rows

    path, _, wanted = given.partition("@")
    found = profiles(read_rows(Path(path)))
    names = sorted({f"{model}/{form}" for model, form, _ in found})
    if len(request.models) > 1:
        raise UsageError("--profile needs one model, the one that was measured")
    if not wanted and len(names) == 1:
        wanted = names[0]
    if wanted not in names:
        raise UsageError(
            f"--profile {given}: name its rows as {path}@{names[0]}; it has {', '.join(names)}"
        )
    return {
        tp: one.costs for (model, form, tp), one in found.items() if f"{model}/{form}" == wanted
    }


def _page(found: Plan, path: Path, errors: dict[str, Error]) -> None:
    from quantize.report.html import write_page
    from quantize.report.plan import plan_report
    from quantize.version import __version__

    write_page(plan_report(found, __version__, errors), path)
