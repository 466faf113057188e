"""Accuracy on the embedded reference model, so that no change costs some unseen.

Measured with CPython 3.11's documentation: KLD 0.256 rtn, 0.133 fireq-paper, 0.056 gptq, 0.025 fireq, all W4A8-FP8;
0.016 fireq W4A16. The text differs between versions of Python; its eighths differ by up to 25 %, which the ceilings
leave room for, while ratios between methods hardly move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch

from quantize.conversion.loop import Request, convert
from quantize.evaluation import Evaluation, evaluate
from quantize.files.resources import data_dir
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import load_recipe

# `make gate`, which continuous integration runs beside the tests, holds every recipe to its figures.
pytestmark = pytest.mark.slow

MODEL = data_dir("eval") / "reference-model"
CPU = torch.device("cpu")
CEILING = 0.034
CEILING_W4A16 = 0.022

Measure = Callable[..., Evaluation]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Convert and evaluate (once) the reference model: measured("gptq", "activations=fp8")."""

    @functools.cache
    def run(name: str, *changes: str) -> Evaluation:
        recipe = load_recipe(name).with_overrides("builtin", nsamples=16, seqlen=256)
        output = tmp_path_factory.mktemp("reference") / "out"
        convert(Request(MODEL, with_stage_fields(recipe, changes), output, CPU, torch.float32))
        return evaluate(output, MODEL, seqlen=256, max_windows=16)

    return run


def kld(figures: Evaluation) -> float:
    assert figures.kld_mean is not None
    return figures.kld_mean


def test_the_protocol(measured: Measure):
    figures = measured("rtn", "activations=fp8")
    assert (figures.protocol, figures.numerics, figures.tokens) == (
        "strided-256",
        "kernel",
        16 * 255,
    )
    assert figures.bits_per_weight == 4.125
    assert figures.baseline_perplexity is not None
    assert 12 < figures.baseline_perplexity < 32


def test_fireq_beats_gptq_beats_rounding(measured: Measure):
    fireq = measured("fireq-linear")
    gptq, rtn = (measured(name, "activations=fp8") for name in ("gptq", "rtn"))
    assert fireq.bits_per_weight == gptq.bits_per_weight == rtn.bits_per_weight
    assert kld(fireq) < 0.52 * kld(gptq)  # measured: 0.44 … 0.45 of it
    assert kld(gptq) < 0.5 * kld(rtn)
    assert fireq.perplexity < gptq.perplexity < rtn.perplexity


def test_fireq_stays_below_its_ceiling(measured: Measure):
    figures = measured("fireq-linear")
    assert kld(figures) < CEILING
    assert figures.baseline_perplexity is not None
    assert figures.perplexity < 1.06 * figures.baseline_perplexity


def test_fireq_with_16_bit_activations_stays_below_its_own(measured: Measure):
    assert kld(measured("fireq-linear", "activations=none")) < min(
        CEILING_W4A16, kld(measured("fireq-linear"))
    )


def test_the_paper_is_finite_and_between(measured: Measure):
    figures = measured("fireq-paper-linear")
    assert math.isfinite(kld(figures))
    assert math.isfinite(figures.perplexity)
    assert kld(measured("fireq-linear")) < kld(figures) < kld(measured("rtn", "activations=fp8"))


def test_the_ceiling_catches_a_bad_recipe(measured: Measure):
    assert kld(measured("fireq-linear", "activations=none", "bits=2")) > 2 * CEILING
    assert kld(measured("gptq", "activations=fp8")) > CEILING
