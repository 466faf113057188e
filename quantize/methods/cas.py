"""Channel-wise absmean scaling (FireQ, arXiv 2505.20839): λ_j = c / mean_n
|W[n, j]| over an edge's sinks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantize.block.smoothing import column_absmean, per_source_channel
from quantize.cost.footprint import FLOAT, BlockSizes
from quantize.methods.base import Kind, Stage

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.model.arch import Edge

_CONSTANTS: Mapping[str, str] = {"attn_norm": "qkv", "mlp_norm": "up_gate", "up_down": "down"}


class Cas(Stage):
    """Give every input column of an edge's sinks the same mean magnitude; the inverse
    goes into the edge's source.

    A constant only shifts the common factor of an edge; 0 leaves the edge alone. The defaults are
    the constants that the authors ship for Llama-3-8B.
    """

    kind: ClassVar[Kind] = "smooth"
    method: Literal["cas"] = "cas"
    up_gate: float = Field(default=0.0096, ge=0, le=1e4)
    """Target absmean of up_proj and gate_proj columns (Λ2)."""
    down: float = Field(default=0.015, ge=0, le=1e4)
    """Target absmean of down_proj columns (Λ3)."""
    qkv: float = Field(default=0.0, ge=0, le=1e4)
    """Target absmean of q_proj, k_proj and v_proj columns; off in the paper's script."""
    v_mul: float = Field(default=0.9, gt=0, le=1e4)
    """Scalar that v_proj is multiplied by, its inverse going to o_proj
    (Λ1); 1 leaves the edge alone."""

    @property
    def needs_inputs(self) -> bool:
        """Reads weights only."""
        return False

    def room(self, sizes: BlockSizes) -> int:
        """New weights of the linears that share an input, and the magnitudes of the old ones."""
        return sizes.folding() + FLOAT * sizes.largest

    def apply(self, block: Block) -> None:
        """Fold λ over every edge whose constant is set."""
        for edge in block.edges:
            scale = self._scale(block, edge)
            if scale is not None:
                block.fold(edge, scale)

    def _scale(self, block: Block, edge: Edge) -> Tensor | None:
        if edge.name == "v_o":
            channels = block.shape.n_kv_heads * block.shape.head_dim
            return None if self.v_mul == 1 else torch.full((channels,), 1 / self.v_mul)
        constant = float(getattr(self, _CONSTANTS[edge.name.partition(".")[0]]))
        if not constant:
            return None
        mean = per_source_channel(block, edge, column_absmean(block, edge))
        return torch.where(
            mean > 0,
            constant / mean.clamp_min(torch.finfo(torch.float32).tiny),
            torch.ones_like(mean),
        )
