"""The rows of `ideas.py`: what is compared with what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ideas_cache import Gear  # the scripts beside this one
from ideas_stages import BlockFloat, OutlierSmoothing

from quantize.formats.kv4 import KvNumerics, KvScheme
from quantize.formats.vllm_kv4 import VllmInt4
from quantize.methods.awq import Awq
from quantize.methods.base import Stage
from quantize.methods.fireq.attention import FireqAttention
from quantize.methods.fireq.stage import Fireq
from quantize.methods.gptq import Gptq
from quantize.model.attention_cache import CacheNumerics


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    idea: str
    """Which rows are compared with each other."""
    name: str
    stages: tuple[Stage, ...] = ()
    """Without any: the parent itself."""
    int8: bool = False
    """Whether packed linears round their inputs to INT8, for each token."""
    cache: CacheNumerics | Gear | None = None
    simulated: bool = False
    known: tuple[str, Mapping[str, str]] | None = None
    """Results file that has the row, and what finds it there: measured anew under other protocols."""


_BALANCE = Awq(weight_exponents=(1.0,))
_INT8, _FP8 = OutlierSmoothing(inputs="int8"), OutlierSmoothing(inputs="fp8")
INT4_16BIT = KvNumerics(KvScheme(symmetric=False), False, False)
"""Queries and probabilities stay in 16 bits, as in GEAR."""


def _known(recipe: str, activations: str) -> tuple[str, Mapping[str, str]]:
    return "yardstick-4bit", {"recipe": recipe, "activations": activations}


def _caches() -> Iterator[Row]:
    """GEAR beside pq's cache, whose scales are those fitted for groups of 64 throughout."""
    idea = "INT4 cache"
    ours = (FireqAttention(),)
    yield Row(idea, "`fireq-kv` as it is, queries and probabilities in FP8", ours)
    for what, gear in (
        ("", Gear("per-token")),
        (", groups of 32", Gear("per-token", group=32)),
        (", the largest of a token and head in 16 bits", Gear("per-token", apart=1)),
        (" and GEAR's s = 1.6 %", Gear("per-token", sparse=0.016)),
        (" and GEAR's r = 1", Gear("per-token", rank=1)),
        (", groups of 16", Gear("per-token", group=16)),
        (", the two largest of a token and head in 16 bits", Gear("per-token", apart=2)),
        (" and GEAR's r = 4, s = 1.6 %", Gear("per-token", rank=4, sparse=0.016)),
    ):
        yield Row(idea, f"`fireq-kv`'s cache{what}", ours, cache=gear, simulated=True)
    for name, gear in (
        ("GEAR on KCVT, 4 bits, r = 4, s = 2 %", Gear("kcvt", 4, 4, 0.02)),
        ("GEAR on KIVI, 3 bits, r = 2, s = 2 %", Gear("kivi", 3, 2, 0.02)),
        ("GEAR on KIVI, 4 bits, r = 4, s = 2 %", Gear("kivi", 4, 4, 0.02)),
        ("KIVI, 4 bits", Gear("kivi")),
        ("GEAR on KIVI, 2 bits, r = 4, s = 2 %", Gear("kivi", 2, 4, 0.02)),
        ("GEAR on KIVI, 4 bits, r = 2, s = 2 %, in chunks of 64", Gear("kivi", 4, 2, 0.02, 64)),
    ):
        yield Row(idea, name, cache=gear, simulated=True)
    yield Row(idea, "vLLM's `int4_per_token_head`", cache=VllmInt4())


def _linears() -> Iterator[Row]:
    """QQQ: weights of 4.125 bits, inputs of 8 bits."""
    idea = "inputs of 8 bits"
    yield Row(idea, "GPTQ, W4A8-FP8", (Gptq(activations="fp8"),), known=_known("gptq", "fp8"))
    yield Row(
        idea, "`fireq-linear`, W4A8-FP8", (_BALANCE, Fireq()), known=_known("fireq-linear", "fp8")
    )
    yield Row(idea, "QQQ's smoothing and GPTQ, W4A8-FP8", (_FP8, Gptq(activations="fp8")))
    stages: tuple[Stage, ...] = (_INT8, Gptq())
    yield Row(idea, "QQQ's smoothing and GPTQ, W4A8-INT8", stages, int8=True, simulated=True)
    yield Row(idea, "QQQ's smoothing and `fireq`'s solver, W4A8-FP8", (_FP8, Fireq()))
    yield Row(idea, "GPTQ, W4A8-INT8", (Gptq(),), int8=True, simulated=True)
    stages = (_BALANCE, Fireq(activations="none"))
    yield Row(idea, "`fireq-linear`, W4A8-INT8", stages, int8=True, simulated=True)


def _weights() -> Iterator[Row]:
    """Block floating point: inputs of 16 bits."""
    idea = "inputs of 16 bits"
    yield Row(idea, "GPTQ, groups of 128", (Gptq(),), known=_known("gptq", "none"))
    stages = (_BALANCE, Fireq(activations="none"))
    yield Row(idea, "`fireq-linear`, groups of 128", stages, known=_known("fireq-linear", "none"))

    def blocks(size: int, outliers: int = 0, bits: Literal[8, 16] = 8) -> Row:
        apart = f", {outliers} of 64 channels in {bits} bits" if outliers else ""
        solver = BlockFloat(group_size=size, outliers=outliers, outlier_bits=bits)
        stages = (Awq(weight_exponents=(1.0,), group_size=size), solver)
        return Row(idea, f"blocks of {size}{apart}", stages, simulated=True)

    yield blocks(128, 1)
    yield blocks(64)
    for element in _ELEMENTS:
        stage = BlockFloat(group_size=32, element=element)
        yield Row(idea, f"{element.upper()}, to the nearest", (stage,), simulated=True)
    yield Row(
        idea,
        "blocks of 128, 1 of 64 channels in 8 bits, none balanced",
        (BlockFloat(group_size=128, outliers=1),),
        simulated=True,
    )
    yield blocks(32)
    smooth, solver = (
        Awq(weight_exponents=(1.0,), group_size=64),
        Fireq(activations="none", group_size=64),
    )
    yield Row(idea, "`fireq-linear`, groups of 64", (smooth, solver))
    yield blocks(128, 1, 16)


_ELEMENTS: tuple[Literal["mxint4", "mxfp4"], ...] = ("mxint4", "mxfp4")
ROWS = (*_caches(), *_linears(), *_weights())
