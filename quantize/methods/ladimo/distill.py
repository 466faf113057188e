"""Teaching a routed FFN the outputs of the dense one, layer by layer
(arXiv 2408.04278, stage 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest

import torch
from torch import Tensor

from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.lesson import Lesson
from quantize.methods.ladimo.student import Student
from quantize.parallel.ranks import ALONE, Ranks

# Of the mean diagonal: pulls the down projection towards what it was. Less would trust neurons that
# were hardly seen, more would keep the others from what they could learn.
_RIDGE = 1e-2
_WARM_UP = 20  # steps, until AdamW's running means have seen something
# Of a batch, whose gradients are added in order: the ranks share them, and no other sum comes out.
# More than so many ranks have nothing to do; every part is a pass of its own.
_PARTS = 8


@dataclass(frozen=True)
class Training:
    """Numbers of the AdamW run."""

    steps: int
    batch: int
    """Tokens of a step, over all processes."""
    rate: float
    """Step size in units of a matrix's root mean square."""
    weight_decay: float
    seed: int


@torch.no_grad()
def refit_down(student: Student, lesson: Lesson) -> None:
    """Set the down projection to the least-squares solution of a lesson.

    Given who visits whom the outputs are linear in it; a norm behind them is taken to divide by what
    it divided by before. A ridge towards its present value keeps neurons that were hardly seen.
    """
    x = lesson.x
    F, D = student.down.shape[1], student.down.shape[0]
    gram = torch.zeros(F, F, dtype=torch.float64, device=x.device)
    right = torch.zeros(F, D, dtype=torch.float64, device=x.device)
    importance = lesson.importance()
    counts = repeat(None) if importance is None else Ffn.pieces(importance)
    for piece, count in zip(lesson.pieces(), counts, strict=False):
        h = student.hidden(piece.x)
        counted = h if count is None else h * count[:, None]
        gram += (counted.T @ h).double()
        right += (counted.T @ piece.wanted()).double()
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    student.down.copy_(torch.cholesky_solve(right + ridge * student.down.T.double(), factor).T)


def distill(
    student: Student, lesson: Lesson, training: Training, ranks: Ranks = ALONE
) -> list[float]:
    """Train the experts of `student` on the mean squared error of a lesson.

    AdamW with a short warm-up and a cosine to zero. Several ranks divide every batch; all of them
    end with the same weights, which are those that one alone would learn. Returns the relative
    squared error of each step's batch.
    """
    x, y = lesson.x, lesson.y
    size = y.square().mean().clamp_min(torch.finfo(y.dtype).tiny)
    weights = list(student.parameters())
    groups = [
        {"params": [w], "lr": training.rate * float(w.detach().square().mean().sqrt())}
        for w in weights
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, training.steps)
    )
    generator = torch.Generator().manual_seed(training.seed)
    losses: list[list[float]] = []
    for _ in range(training.steps):
        rows = torch.randint(len(x), (training.batch,), generator=generator).to(x.device)
        losses.append(_set_gradients(student, lesson.part(rows), size, ranks))
        optimizer.step()
        schedule.step()
    shares = zip(*ranks.gather(losses), strict=True)
    return [sum(chain.from_iterable(zip_longest(*step, fillvalue=0.0))) for step in shares]


def _set_gradients(student: Student, lesson: Lesson, size: Tensor, ranks: Ranks) -> list[float]:
    """Set all weights' gradients of the mean squared error, in units of `size`, over
    a batch shared by the ranks.

    Returns this rank's shares of the error.
    """
    weights = list(student.parameters())
    totals: list[Tensor | None] = [None] * len(weights)
    losses: list[float] = []
    parts = lesson.split(min(_PARTS, len(lesson.x)))
    for part, present in ranks.rounds(len(parts)):
        piece = parts[part]
        with torch.enable_grad():
            student.requires_grad_(True)
            loss = piece.lost(student(piece.x)).sum() / (lesson.y.numel() * size)
            gradients = torch.autograd.grad(loss, weights)
            student.requires_grad_(False)
        totals = [
            ranks.add(total, one, present) for total, one in zip(totals, gradients, strict=True)
        ]
        losses += [float(loss.detach())] if ranks.rank < present else []
    for weight, total in zip(weights, totals, strict=True):
        assert total is not None
        weight.grad = ranks.whole(total, weight.shape)
    return losses


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
