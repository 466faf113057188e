"""Teaching a routed FFN the outputs of the dense one, layer by layer (arXiv 2408.04278, stage 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from quantize.ladimo.dense import Ffn
from quantize.ladimo.student import Student

_RIDGE = 1e-2  # of the mean diagonal, pulls the down projection towards what it was
_WARM_UP = 20


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
def refit_down(student: Student, x: Tensor, y: Tensor) -> None:
    """Set the down projection to the least-squares solution for inputs x [M, D] and targets y [M, D].

    Given who visits whom the outputs are linear in it. A ridge towards its present value keeps neurons that were hardly
    seen.
    """
    F, D = student.down.shape[1], student.down.shape[0]
    gram = torch.zeros(F, F, dtype=torch.float64, device=x.device)
    right = torch.zeros(F, D, dtype=torch.float64, device=x.device)
    for inputs, targets in zip(Ffn.pieces(x), Ffn.pieces(y), strict=True):
        h = student.hidden(inputs)
        gram += (h.T @ h).double()
        right += (h.T @ targets).double()
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    student.down.copy_(torch.cholesky_solve(right + ridge * student.down.T.double(), factor).T)


def distill(student: Student, x: Tensor, y: Tensor, training: Training) -> list[float]:
    """Train the experts of `student` on the mean squared error against targets y [M, D] of inputs x [M, D].

    AdamW with a short warm-up and a cosine to zero. Under several processes of accelerate or torch.distributed every
    process takes its share of each batch and gradients are averaged; the batches do not hang on how many there are.
    Returns the relative squared error of each step's batch.
    """
    accelerator = Accelerator(cpu=x.device.type == "cpu")
    size = y.square().mean().clamp_min(torch.finfo(y.dtype).tiny)
    weights = list(student.parameters())
    groups = [{"params": [w], "lr": training.rate * float(w.detach().square().mean().sqrt())} for w in weights]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training.steps))
    model: nn.Module = student
    generator = torch.Generator().manual_seed(training.seed)
    losses: list[float] = []
    student.requires_grad_(True)
    if accelerator.num_processes > 1:
        model, optimizer = accelerator.prepare(student, optimizer)
    with torch.enable_grad():
        for _ in range(training.steps):
            rows = torch.randint(len(x), (training.batch,), generator=generator)
            mine = rows[accelerator.process_index :: accelerator.num_processes].to(x.device)
            loss = (model(x[mine]) - y[mine]).square().mean() / size
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    student.requires_grad_(False)
    return losses


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
