"""Where a model is to run, and which engine runs an output there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.errors import UsageError
from quantize.formats.engines import CPU, LLAMA_CPP, TRANSFORMERS, VLLM, runs_on
from quantize.inspect.engines import Loading, Loadings
from quantize.plan.gpus import GPUS, Gpu, gpu_named

HOSTS = ("cpu", "mac")
GPU_RECIPES = ("w4a16", "w4a8", "w4a8kv4", "w3a16", "w2a16")
HOST_RECIPES = ("gguf-q4_0", "gguf-q4_1", "w4a16", "w3a16", "w2a16")
"""Names of recipes that are looked at, of those that fit alike the best first."""
_TRITON, _E4M3 = 8.0, 8.9
"""Compute capability that pq's kernels need, and those of them that multiply E4M3."""


@dataclass(frozen=True)
class Target:
    """GPUs of one kind, or a machine without."""

    name: str
    gpu: Gpu | None = None
    most: int = 1
    """GPUs that there are."""
    memory: int | None = None
    """Bytes of a machine without GPUs; None: not known."""

    @property
    def recipes(self) -> tuple[str, ...]:
        """Names of recipes that come into question."""
        return GPU_RECIPES if self.gpu is not None else HOST_RECIPES


@dataclass(frozen=True)
class Runner:
    """An engine that runs an output, or why none does."""

    engine: str | None
    install: tuple[str, ...] = ()
    """What pip must install beside it."""
    why_not: str | None = None


def target_named(name: str, most: int = 8, memory: int | None = None) -> Target:
    """The target of a name: cpu, mac, or a GPU of the plan's table; UsageError with the nearest names.

    most: GPUs that there are. memory: bytes of a machine without.
    """
    if name.lower() in HOSTS:
        return Target(name.lower(), None, 1, memory)
    if memory is not None:
        raise UsageError("--memory goes with --gpu cpu or mac; the table knows what GPUs have")
    try:
        gpu = gpu_named(name)
    except UsageError as err:
        raise UsageError(f"{err}; or {', '.join(HOSTS)}") from None
    return Target(gpu.name, gpu, most)


def all_targets(most: int) -> list[Target]:
    """Every GPU of the table, and machines without."""
    return [*(Target(gpu.name, gpu, most) for gpu in GPUS), *(Target(name) for name in HOSTS)]


def runner_of(target: Target, found: Loadings, cache: str | None) -> Runner:
    """What runs a checkpoint there. found: what engines make of it; cache: how pq's own format keeps
    keys and values, None where it leaves them alone."""
    if target.gpu is None:
        return _on_host(target, found)
    capability = target.gpu.capability
    places = _in(found, VLLM.name)
    here = [place for place in places if runs_on(place.where, capability)]
    for place in sorted(here, key=lambda place: (not place.loads, bool(place.install))):
        if not place.loads:
            return Runner(None, why_not="; ".join(place.notes) or "vLLM does not load it")
        if not place.install:
            return Runner(place.engine)
        least = _E4M3 if found.fp8 or cache is not None else _TRITON
        if capability < least:
            return Runner(None, why_not=_needs(least, target.name, capability))
        return Runner(place.engine, place.install)
    if any(place.loads for place in places):
        return Runner(None, why_not=_needs(_E4M3, target.name, capability))
    return Runner(None, why_not=f"{VLLM} does not read format {found.format}")


def _needs(least: float, name: str, capability: float) -> str:
    return f"the kernels for it need compute capability {least}, {name} has {capability}"


def _on_host(target: Target, found: Loadings) -> Runner:
    """llama.cpp, vLLM on CPUs, or transformers where it keeps weights packed."""
    if any(place.loads for place in _in(found, LLAMA_CPP.name)):
        return Runner(LLAMA_CPP.name)
    if target.name == "cpu":
        for place in _in(found, VLLM.name, CPU):
            if place.loads and not place.install:
                return Runner(place.engine)
    for place in _in(found, TRANSFORMERS.name):
        # Of what it reads without pq it unpacks all when it loads.
        if place.loads and place.first is not None:
            return Runner(place.engine, place.install)
    return Runner(None, why_not="no engine there keeps its weights packed")


def _in(found: Loadings, engine: str, where: str | None = None) -> list[Loading]:
    return [
        place
        for place in found.engines
        if place.engine.startswith(engine) and where in (None, place.where)
    ]


def cache_of(config: Mapping[str, Any]) -> str | None:
    """How pq's own format keeps keys and values; None where it leaves them alone."""
    section = config.get("quantization_config")
    attention = section.get("attention") if isinstance(section, dict) else None
    return "int4" if attention else None
