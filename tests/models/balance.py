"""Random weights that make a model behave like a trained one: scales of blocks, head and embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.passes import entropy, logits, measure, tokens
from models.stack import Blocks, find_blocks

ENTROPY = (1.0, 5.0)
"""Bounds of the mean entropy of the next token, nats; 512 tokens alike have 6.2."""
CHANGE = (0.1, 1.0)
"""Bounds of a block's change of its stream, ‖out − in‖ / ‖in‖."""
AIM_ENTROPY, AIM_CHANGE = 3.0, 0.4
ROUNDS = 12
FARTHEST = 50.0
"""The most that a block is scaled in all; what needs more does not answer to its scale."""


@torch.no_grad()
def enliven(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter values of a trained model's kind, by its shape and what the model made it."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if is_vector(parameter) or is_structured(parameter):
                # Norms, biases, gates and decay rates: near what the model needs them to be.
                parameter.add_(noise * 0.2 * parameter.abs().clamp(0.5, 1.0))
            elif isinstance(module, nn.Embedding):
                parameter.copy_(noise)
                if module.padding_idx is not None:
                    parameter[module.padding_idx] = 0
            else:
                parameter.copy_(noise * fan_in(module, name, parameter) ** -0.5)
        for name, table in module.named_buffers(recurse=False):
            if name == "tid2eid":  # zeros, which would hide that the tokens are lost
                order = torch.rand(len(table), module.num_experts, generator=generator).argsort()
                table.copy_(order[:, : table.shape[1]])


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter has one axis longer than one."""
    return sum(size > 1 for size in parameter.shape) < 2


def is_structured(parameter: Tensor) -> bool:
    """Whether the model made a matrix of anything but noise around zero: constants, decay rates."""
    values = parameter.float()
    if not bool(torch.isfinite(values).all()):
        return False
    deviation = float(values.std())
    return abs(float(values.mean())) > 0.5 * deviation and float(values.abs().max()) > 0


def fan_in(module: nn.Module, name: str, parameter: Tensor) -> float:
    """How many terms a sum over this weight has; for stacked experts, whose order varies, a mean."""
    if isinstance(module, Conv1D):
        return parameter.shape[0]
    if parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
        return math.sqrt(parameter.shape[1] * parameter.shape[2])
    return parameter[0].numel()


@torch.no_grad()
def balance(model: PreTrainedModel) -> None:
    """Scale embeddings, heads and blocks until entropy and the blocks' changes lie in their bounds.

    It stops after ROUNDS in any case: checks, not this, say whether a model is degenerate. Blocks are
    settled anew before every look at the entropy: where head and embedding are one, both depend on it.
    """
    ids = tokens(seed=12345)
    blocks = find_blocks(model, lambda: logits(model, ids))
    volumes: list[Volume] = []
    for block in blocks.modules:
        volumes.append(Volume(block, shared=[p for volume in volumes for p in volume.parameters]))
    head = head_weights(model)
    for _ in range(ROUNDS):
        scores = settle(model, blocks, volumes, ids)
        found = entropy(scores)
        if ENTROPY[0] * 1.5 < found < ENTROPY[1] * 0.85:
            break
        rescale(head, found, scores)


def settle(model: PreTrainedModel, blocks: Blocks, volumes: list[Volume], ids: Tensor) -> Tensor:
    """Turn the blocks' volumes until each changes its stream by some tens of percent → logits."""
    low, high = CHANGE[0] * 1.8, CHANGE[1] * 0.75
    for volume in volumes:
        volume.last = volume.quiet = None  # of before the embedding was scaled
    for _ in range(ROUNDS):
        changes, scores = measure(model, blocks, ids)
        wrong = [
            (volume, change)
            for volume, change in zip(volumes, changes, strict=True)
            if math.isfinite(change) and not low < change < high and not volume.stuck
        ]
        if not wrong:
            break
        for volume, change in wrong:
            volume.turn(change, AIM_CHANGE)
    return scores


class Volume:
    """Scales how much a block adds to its stream: by its matrices, or by norms where these undo that."""

    def __init__(self, block: nn.Module, shared: list[nn.Parameter]) -> None:
        """`shared` parameters are of blocks before this one, which turn them alone."""
        others = {id(p) for p in shared}
        self.parameters = [p for p in block.parameters() if id(p) not in others]
        biases = {
            id(p)
            for name, p in block.named_parameters()
            if name.endswith("bias") and not is_structured(p)
        }
        self.matrices = [
            p for p in self.parameters if id(p) in biases or not (is_vector(p) or is_structured(p))
        ]
        # A norm multiplies by w, or by 1 + w where w is around zero: both are to scale alike.
        self.vectors = [
            (p, 0.0 if float(p.mean()) > 0.5 else 1.0)
            for name, p in block.named_parameters()
            if is_vector(p) and id(p) not in biases | others and "norm" in name
        ]
        self.power = 2.0
        """By which power of its matrices' scale the block's change goes; two for most, one after another."""
        self.unmoved = 0
        """How many turns in a row of its matrices changed nothing."""
        self.last: tuple[float, float] | None = None
        self.quiet: float | None = None
        """The block's change before norms were scaled last."""
        self.scales = [1.0, 1.0]
        """Of matrices and of norms, since this was made."""
        self.made = [p.clone() for p in self.parameters]
        self.stuck = False
        """Whether this block's change cannot be turned: what it gives is not its stream with something added."""

    def turn(self, change: float, aim: float) -> None:
        """Scale towards `aim` from `change`, going by what the last turn did."""
        if self.last is not None:
            before, factor = self.last
            seen = math.log(max(change, 1e-9) / max(before, 1e-9)) / math.log(factor)
            # Blocks before it turn at the same time: once is no proof that its matrices do nothing.
            self.unmoved = self.unmoved + 1 if seen < 0.5 else 0
            self.power = 0.0 if self.unmoved > 1 else min(max(seen, 1.0), 8.0)
        wanted = min(max(aim / max(change, 1e-9), 1e-3), 1e3)
        if self.power > 0.5:
            factor = min(max(wanted ** (1 / self.power), 0.2), 5.0)
            if self.gives_up(0, factor):
                return
            for matrix in self.matrices:
                matrix.mul_(factor)
            self.last, self.quiet = (change, factor), None
            return
        factor = min(max(wanted**0.7, 0.2), 5.0)
        if self.quiet is not None and abs(math.log(change / self.quiet)) < 0.1 * math.log(5.0):
            # Initialized as if it were the other form, as some classes' norms of 1 + w are.
            self.vectors = [(vector, 1.0 - shift) for vector, shift in self.vectors]
        if self.gives_up(1, factor):
            return
        for vector, shift in self.vectors:
            vector.copy_((vector + shift) * factor - shift)
        self.last = None
        self.quiet = change

    def gives_up(self, which: int, factor: float) -> bool:
        """Note a scale; where it goes too far the block becomes what it was made, for good."""
        self.scales[which] *= factor
        if 1 / FARTHEST < self.scales[which] < FARTHEST:
            return False
        self.stuck = True
        for parameter, made in zip(self.parameters, self.made, strict=True):
            parameter.copy_(made)
        return True


def rescale(head: list[nn.Parameter], found: float, scores: Tensor) -> None:
    """Scale the weights that logits are linear in towards the entropy aimed at."""
    if not math.isfinite(found):
        factor = 0.5
    else:
        low, high = 1e-3, 1e3
        for _ in range(40):
            factor = math.sqrt(low * high)
            low, high = (low, factor) if entropy(scores * factor) < AIM_ENTROPY else (factor, high)
    for weight in head:
        weight.mul_(min(max(factor, 0.05), 20.0))


def head_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """What turns the last hidden states into logits; tied, it is the embedding as well."""
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        if head is not None:
            return [p for p in head.parameters() if not is_vector(p)]
    return []
