"""What LaDiMo's experts are taught where a norm stands behind the FFN."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.block.post_norm import PostNorm
from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.distill import Training, distill, refit_down
from quantize.methods.ladimo.lesson import Lesson, Outlet
from quantize.methods.ladimo.routing import Budget
from quantize.methods.ladimo.split import Layout
from quantize.methods.ladimo.student import Student
from quantize.methods.ladimo.trial import Start

LAYOUT = Layout(n=3, size=8, shared=16)
TRAINING = Training(steps=60, batch=256, rate=0.025, weight_decay=0.0, seed=0)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(torch.seed() % 2**31)


@pytest.fixture
def ffn(draw: torch.Generator) -> Ffn:
    gate, up = (torch.randn(40, 24, generator=draw) * 24**-0.5 for _ in range(2))
    return Ffn(gate, up, torch.randn(24, 40, generator=draw) * 40**-0.5, F.silu)


@pytest.fixture
def x(draw: torch.Generator) -> Tensor:
    return torch.randn(3000, 24, generator=draw)


@pytest.fixture
def outlet(ffn: Ffn, draw: torch.Generator) -> Outlet:
    gains = 0.3 + 3 * torch.rand(24, generator=draw)
    return Outlet(PostNorm(gains), ffn)


def student_of(ffn: Ffn, lesson: Lesson, mean: float = 1.0) -> Student:
    budget = Budget(mean, adaptive=True)
    start = Start.of(ffn, lesson, LAYOUT, "clustered", 0)
    return copy.deepcopy(start.student(budget, start.router(budget, 0)))


def test_errors_are_those_of_what_is_added_to_the_stream(
    ffn: Ffn, x: Tensor, outlet: Outlet, draw: torch.Generator
):
    y = torch.randn(x.shape, generator=draw)
    outputs = torch.randn(x.shape, generator=draw)
    z = outputs.double()
    sent = outlet.norm.gains.double() * z / z.square().mean(1, keepdim=True).sqrt()
    wanted = (sent - y).square().sum() / y.double().square().sum()
    lesson = Lesson(x, y, outlet)
    assert lesson.error(lambda part: outputs[: len(part)]) == pytest.approx(float(wanted), rel=1e-5)
    plain = (z - y).square().sum() / y.double().square().sum()
    found = Lesson(x, y).error(lambda part: outputs[: len(part)])
    assert found == pytest.approx(float(plain), rel=1e-5)


def test_outputs_that_the_norm_makes_the_targets_of(ffn: Ffn, x: Tensor, outlet: Outlet):
    """For small steps: the size of the outputs is taken to stay."""
    z = ffn(x)
    assert torch.allclose(outlet.before(x, outlet.after(z)), z, atol=1e-5)
    step = 1e-3 * torch.randn(z.shape) * z.norm(dim=1, keepdim=True) / 24**0.5
    step -= z * (z * step).sum(1, keepdim=True) / z.square().sum(1, keepdim=True)
    found = outlet.before(x, outlet.after(z + step)) - z
    assert float((found - step).norm() / step.norm()) < 1e-2


def test_teaching_behind_a_norm_repairs_more_than_teaching_before_it(
    ffn: Ffn, x: Tensor, outlet: Outlet, draw: torch.Generator
):
    """Tokens of small outputs count there as those of large ones do, and drift can be repaired."""
    x *= 3 * torch.rand(len(x), 1, generator=draw)
    drift = 0.05 * torch.randn(x.shape, generator=draw)
    target = Lesson(x, outlet.after(ffn(x)) + drift @ torch.ones(24, 24) / 24, outlet)
    before = Lesson(x, ffn(x))
    errors = {}
    for name, lesson in (("before", before), ("behind", target)):
        student = student_of(ffn, lesson)
        errors[f"{name}, untrained"] = target.error(student)
        refit_down(student, lesson)
        errors[f"{name}, refitted"] = target.error(student)
        distill(student, lesson, TRAINING)
        errors[name] = target.error(student)
    assert errors["behind, refitted"] < 0.95 * errors["before, refitted"]
    assert errors["behind"] < 0.95 * errors["before"]
    assert errors["behind"] < errors["behind, refitted"] < errors["behind, untrained"]
