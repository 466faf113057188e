"""Tensors that can be quantized: plain floats, all of them finite."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.errors import ModelError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What can be quantized."""
TABLE = torch.int64
"""What models keep tables in, such as experts by token; no format packs weights in it."""


def require_finite_floats(tensors: dict[str, Tensor], where: str) -> None:
    """ModelError for a tensor that holds NaN or Inf, or is neither a float that the pipeline can
    quantize nor a table of integers."""
    for name, tensor in tensors.items():
        if tensor.dtype == TABLE:
            continue
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"{where}{name}: dtype {str(tensor.dtype).removeprefix('torch.')} is not a plain "
                "float; the source seems to be quantized already, give the original model"
            )
        # In pieces: the work space of isfinite is larger than the tensor, and embeddings are large.
        if not all(torch.isfinite(piece).all() for piece in torch.split(tensor.flatten(), 1 << 24)):
            raise ModelError(f"{where}{name}: holds NaN or Inf; the source checkpoint is broken")
