"""Hadamard rotations that spread outliers over all channels (QuaRot, arXiv 2404.00456;
SpinQuant, arXiv 2405.16406).

R1 turns the residual stream, h → hQ: RMSNorm without weights commutes with a rotation, so the
norms' weights move into the linears that read them, W → W·diag(γ)·Q; what writes the stream becomes
QᵀW. R2 turns the values of each kv head. R4 turns the inputs of down_proj while the model runs, as
nothing before them commutes with a rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from quantize.cost.footprint import BlockSizes
from quantize.errors import ModelError
from quantize.methods.base import Kind, Stage
from quantize.model.hadamard import Rotation, apply_hadamard, hadamard_factors, widen
from quantize.model.roles import role_by_name
from quantize.model.stream import Stream

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.model.arch import Architecture, Shape

# Largest difference of a rotated block's output, relative to what it adds to the stream: some
# roundings of a sum over the hidden size.
_SAME = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# Of a matrix outside the blocks rotated at once: 32 MB in float64, where a whole embedding would
# take gigabytes.
_WEIGHTS = 1 << 22


class Rotate(Stage):
    """Rotate the residual stream, the values of every head, and the inputs of down_proj.

    With `residual`, a head that was tied to the embedding gets a weight of its own: the
    final norm moves into it alone.
    """

    kind: ClassVar[Kind] = "smooth"
    once: ClassVar[bool] = True
    method: Literal["rotate"] = "rotate"
    residual: bool = True
    """Rotate the residual stream by a randomized Hadamard matrix and fold the norms (R1)."""
    values: bool = True
    """Rotate the values of every kv head by the Hadamard matrix of head_dim (R2);
    balance their channels before."""
    down: bool = False
    """Rotate the inputs of down_proj at run time (R4); only `format: pq` can hold it."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the signs of R1."""

    @model_validator(mode="after")
    def _rotates_something(self) -> Self:
        if not (self.residual or self.values or self.down):
            raise ValueError(
                "residual, values and down are all off; turn one on or remove the stage"
            )
        return self

    @property
    def needs_inputs(self) -> bool:
        """Reads weights only."""
        return False

    @property
    def native_field(self) -> str | None:
        """A rotation at run time needs a loader that knows of it."""
        return "down" if self.down else None

    @property
    def changes_basis(self) -> bool:
        """R1 does."""
        return self.residual

    def to_basis(self, hidden: Tensor) -> Tensor:
        """Hidden states h [..., D] → hQ."""
        return self._rotation.apply(hidden) if self.residual else hidden

    def from_basis(self, hidden: Tensor) -> Tensor:
        """Hidden states hQ [..., D] → h."""
        return self._rotation.undo(hidden) if self.residual else hidden

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.seed)

    def check_model(
        self, arch: Architecture, shape: Shape, linears: Mapping[str, tuple[int, int]]
    ) -> None:
        """ModelError names a size without a known Hadamard matrix, or what does not commute with a
        rotation, and the field to turn off."""
        if self.residual and (reason := _why_no_rotation(arch)):
            raise ModelError(f"recipe stage rotate: {reason}; set residual: false")
        for field, what, size in self._rotated_sizes(arch, shape, linears):
            try:
                hadamard_factors(size)
            except ValueError as err:
                raise ModelError(
                    f"recipe stage rotate: {what} {size}: {err}; set {field}: false"
                ) from None

    def _rotated_sizes(
        self, arch: Architecture, shape: Shape, linears: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[str, str, int]]:
        if self.residual:
            yield "residual", "hidden size", shape.hidden
        if self.values:
            yield "values", "head size", shape.head_dim
        if self.down:
            sizes = {K: name for name, (_, K) in linears.items() if role_by_name(name) == "down"}
            for size, name in sorted(sizes.items()):
                yield "down", f"inputs of {name.rpartition('.')[2]}", size

    def outside(self, tensors: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
        """Rotate the embedding's rows; fold the final norm into the head and
        rotate its columns. In place."""
        if not self.residual:
            return tensors
        embedding, norm, head = (
            f"{name}.weight" for name in (arch.embedding, arch.final_norm, arch.head)
        )
        if embedding in tensors:
            self._rotate_rows(tensors[embedding])
        if head in tensors:
            self._rotate_rows(tensors[head], tensors[norm] + arch.final_offset)
            tensors[norm].fill_(1 - arch.final_offset)
        return tensors

    def _rotate_rows(self, weight: Tensor, gamma: Tensor | None = None) -> None:
        """Rotate every row of weight [V, D], times γ [D] if one is given, some rows at a time."""
        for rows in torch.split(weight, max(1, _WEIGHTS // weight.shape[1])):
            wide = widen(rows) if gamma is None else widen(rows) * widen(gamma)
            rows.copy_(self._rotation.apply(wide))

    def room(self, sizes: BlockSizes) -> int:
        """A weight in float64 on both sides of a product, and as it will be."""
        return 24 * sizes.largest

    def apply(self, block: Block) -> None:
        """Rotate what the fields ask for."""
        with self._proof(block):
            if self.residual:
                for module, arch in block.versions:
                    self._rotate_residual(module, arch)
            if self.values:
                if block.find_edge("v_o") is None:
                    block.note(block.arch.attention, rotated_values=False)
                else:
                    _rotate_values(block)
        if self.residual:
            block.map_inputs(self._rotation.apply)
        if self.down:
            for name in (name for name, role in block.arch.roles.items() if role == "down"):
                block.rotate_inputs(name)

    @contextmanager
    def _proof(self, block: Block) -> Iterator[None]:
        """Hold the block that comes out against the one that went in; ModelError where it computes
        something else."""
        draw = torch.Generator().manual_seed(0)
        first = next(block.module.parameters())
        stream = block.stream or Stream.plain(block.shape.hidden)
        hidden = stream.draw(1, 12, draw, first.dtype).to(first.device)
        with torch.no_grad():
            before = block.forward(block.module, hidden).float()
            yield
            turned = block.forward(block.module, self.to_basis(hidden)).float()
        error = (self.from_basis(turned) - before).abs().max()
        size = block.states_of(before - hidden.float()).abs().max()
        if not error <= _SAME[first.dtype] * size:
            raise ModelError(
                f"{block.full_name('')[:-1]}: computes something else when it is "
                f"rotated (difference {float(error / size):.2g}); remove stage rotate"
            )

    def _rotate_residual(self, module: nn.Module, arch: Architecture) -> None:
        rotation = self._rotation
        for edge in arch.edges:
            if edge.source_kind != "norm":
                continue
            if edge.source not in arch.stream_norms:
                continue
            gamma = module.get_submodule(edge.source).get_parameter("weight")
            for sink in edge.sinks:
                weight = module.get_submodule(sink).get_parameter("weight")
                factor = widen(gamma) + edge.offset
                weight.data = rotation.apply(widen(weight) * factor).to(weight.dtype)
            gamma.data = torch.full_like(gamma, 1 - edge.offset)
        for name in arch.writers:
            _change_outputs(module.get_submodule(name), rotation.apply)


def _why_no_rotation(arch: Architecture) -> str:
    """Why the residual stream cannot be rotated; empty where nothing seen so far is against it."""
    if arch.carries:
        return arch.carries
    if arch.beside:
        return f"{arch.beside[0]} may write to the stream too, in the parent's basis"
    if arch.before != (arch.embedding,):
        others = [name for name in arch.before if name != arch.embedding]
        return f"{others[0]} changes what enters the first block"
    if not arch.final_norm:
        return "no single norm stands between the last block and the head"
    moved = {edge.source for edge in arch.edges if edge.source_kind == "norm"}
    for norm in arch.stream_norms:
        if norm not in moved:
            return f"the weight of {norm} cannot move into the linears that read it"
    if not arch.writers:
        return "what the block adds to the stream is no plain output of linears"
    return ""


def _rotate_values(block: Block) -> None:
    def per_head(x: Tensor) -> Tensor:
        return apply_hadamard(x.view(*x.shape[:-1], -1, block.shape.head_dim)).flatten(-2)

    edge = block.find_edge("v_o")
    assert edge is not None
    _change_outputs(block.linear(edge.source), per_head, edge.rows)
    for sink in map(block.linear, edge.sinks):
        sink.weight.data = per_head(widen(sink.weight)).to(sink.weight.dtype)


def _change_outputs(
    linear: nn.Module,
    rotate: Callable[[Tensor], Tensor],
    rows: tuple[int, int] | None = None,
) -> None:
    """Make a linear's outputs [..., N] those that `rotate` makes of them: its
    weight's columns and its bias. rows: [first, end) of the outputs that are meant, None: all."""
    weight, bias = linear.get_parameter("weight"), dict(linear.named_parameters()).get("bias")
    first, end = rows or (0, len(weight))
    changed = weight.detach().clone()
    changed[first:end] = rotate(widen(weight[first:end]).T).T.to(weight.dtype)
    weight.data = changed
    if bias is not None:
        moved = bias.detach().clone()
        moved[first:end] = rotate(widen(bias[first:end])).to(bias.dtype)
        bias.data = moved
