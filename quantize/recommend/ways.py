"""Ways to serve a model: as it is, and by each recipe in question, with what they take and cost.

An output's sizes are told from the parent's headers; nothing is converted, and no weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantize.conversion.foretold import foretold
from quantize.conversion.request import Request
from quantize.errors import ModelError, PqError, UsageError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.registry import FORMATS
from quantize.inspect.engines import Loadings, loadings, loadings_as
from quantize.inspect.inspection import Inspection
from quantize.plan.checkpoint import model_of, served_model
from quantize.plan.gpu_counts import COUNTS
from quantize.plan.memory import Engine, activation_bytes, engine_for, fit, short_of
from quantize.plan.request import Demand
from quantize.plan.served import ServedModel
from quantize.plan.sizing import Option, option_for, tpot_at
from quantize.recipe.files import find
from quantize.recipe.measured import Measured, measured
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.recommend.target import Runner, Target, cache_of, runner_of

AS_IT_IS = "as it is"
_PROGRAM = 1 << 30
"""Bytes of an engine on a CPU beside weights, cache and one pass."""
_HOST_ENGINE = Engine(batched_tokens=512)
"""What llama.cpp computes of a prompt at once."""
_OUTPUT = 256
"""Tokens of an answer, of those that a sequence has room for."""


@dataclass(frozen=True)
class Asked:
    """What is to be served."""

    model: str
    """As it was called."""
    folder: Path
    context: int
    """Tokens of a sequence."""
    sequences: int
    """At once."""

    def demand(self) -> Demand:
        """The same for the plan: a long prompt and a short answer."""
        output = max(1, min(_OUTPUT, self.context // 4))
        prompt = max(1, self.context - output)
        context = max(self.context, prompt + output)
        return Demand(
            model=self.model,
            sequences=self.sequences,
            input=prompt,
            output=output,
            context=context,
        )


@dataclass(frozen=True)
class Output:
    """What a recipe would make of the model, whatever it runs on."""

    name: str
    recipe: Recipe | None
    """None: the model as it is."""
    settings: tuple[str, ...]
    served: ServedModel | None
    found: Loadings | None
    cache: str | None
    losses: Mapping[str, Measured]
    refused: str | None = None
    """Why it cannot be made."""

    @property
    def bits(self) -> int:
        """Of most of its weights; 16 where none is packed."""
        stages = self.recipe.stages if self.recipe else ()
        encodes = [stage for stage in stages if stage.kind == "encode"]
        return int(getattr(encodes[-1], "bits", 16)) if encodes else 16


@dataclass(frozen=True)
class Way:
    """One output on one target."""

    output: Output
    runner: Runner
    weights: int = 0
    """Bytes of all."""
    cache: int = 0
    """Bytes of keys and values of all sequences."""
    count: int | None = None
    """GPUs, or 1 for a machine; None: it does not run there."""
    option: Option | None = None
    why_not: str | None = None

    @property
    def kld(self) -> float | None:
        """The worst that we measured; None: nothing was."""
        return max((one.kld for one in self.output.losses.values()), default=None)

    @property
    def first(self) -> float | None:
        """Seconds to the first token of a prompt that has the engine to itself; None: not known."""
        return None if self.option is None else self.option.first

    @property
    def each(self) -> float | None:
        """Seconds a token with all sequences at their full length; None: not known."""
        if self.option is None:
            return None
        return tpot_at(self.option, self.option.demand.sequences or 1)


def asked_for(model: str, folder: Path, context: int | None, sequences: int) -> Asked:
    """What is to be served. UsageError for a context that the model ends before."""
    served = served_model(folder, name=model)
    most = served.max_context
    if context is None:
        context = min(4096, most or 4096)
    elif most is not None and context > most:
        raise UsageError(f"--context {context}: {model} ends at {most:,} tokens")
    return Asked(model, folder, context, sequences)


def outputs_of(asked: Asked, names: tuple[str, ...]) -> list[Output]:
    """The model as it is, then what these recipes would make of it.

    ModelError where none of them can be made, for one reason.
    """
    folder = asked.folder
    outputs = [_made(asked, name) for name in names]
    reasons = {output.refused for output in outputs}
    if outputs and None not in reasons and len(reasons) == 1:
        raise ModelError(str(outputs[0].refused))
    plain = Output(
        AS_IT_IS,
        None,
        (),
        served_model(folder, name=asked.model),
        loadings(folder),
        cache_of(Checkpoint(folder).config),
        {},
    )
    return [plain, *outputs]


def _made(asked: Asked, name: str) -> Output:
    recipe, found = load_recipe(name), find(name)
    losses = measured(found.path.stem, found.settings)
    base = Output(name, recipe, found.settings, None, None, None, losses)
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    try:
        told, config = foretold(Request(asked.folder, recipe, Path("out"), cpu, dtype))
        served = model_of(told, config, name=name)
        engines = loadings_as(FORMATS[recipe.format].name, config, shapes_of(told))
    except PqError as err:
        return replace(base, refused=str(err).splitlines()[0])
    return replace(base, served=served, found=engines, cache=cache_of(config))


def shapes_of(found: Inspection) -> dict[str, tuple[int, int]]:
    """[N, K] of all linears of the blocks by full name."""
    return {
        f"{block.name}.{linear.name}": linear.shape
        for block in found.blocks
        for linear in block.linears
        if linear.shape is not None
    }


def way(output: Output, target: Target, asked: Asked) -> Way:
    """Whether and how an output runs on a target."""
    if output.served is None or output.found is None:
        return Way(output, Runner(None), why_not=output.refused)
    runner = runner_of(target, output.found, output.cache)
    kept = round(asked.sequences * output.served.kv_bytes(asked.context))
    base = Way(output, runner, output.served.weights(), kept, why_not=runner.why_not)
    if runner.engine is None:
        return base
    return _on_gpus(base, target, asked) if target.gpu else _on_host(base, target, asked)


def _on_gpus(base: Way, target: Target, asked: Asked) -> Way:
    model, gpu = base.output.served, target.gpu
    assert model is not None
    assert gpu is not None
    engine, why = engine_for(gpu), None
    for count in (count for count in COUNTS if count <= target.most):
        if refused := model.refuses(count):
            why = why or refused
            continue
        found = fit(model, gpu, count, engine, asked.context)
        if found.memory.fits and found.sequences >= asked.sequences:
            option = option_for(asked.demand(), model, gpu, count)
            return replace(base, count=count, option=option)
        lacks = short_of(model, found, count, asked.sequences)
        why = f"short of {max(lacks, 1) / 1e9:.1f} GB on each of {count} × {gpu.name}"
    return replace(base, why_not=why)


def _on_host(base: Way, target: Target, asked: Asked) -> Way:
    model = base.output.served
    assert model is not None
    need = base.weights + base.cache + _PROGRAM
    need += activation_bytes(model, 1, replace(_HOST_ENGINE, max_sequences=asked.sequences))
    if target.memory is not None and need > target.memory:
        lacks = f"needs {need / 1e9:.1f} GB of memory, of which there are"
        return replace(base, why_not=f"{lacks} {target.memory / 1e9:.1f} GB")
    return replace(base, count=1)


def host_memory() -> int | None:
    """Bytes of this machine's memory; None where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
