"""The affine maps by which keys and values enter an INT4 cache, and what undoes them on its other side.

Stored keys are ((K − μ)·S) R and queries meet them as (Q/S) R, with R orthogonal: a query's product with a
stored key is Q·K less Q·μ, which is the same for all keys, so that a softmax does not see it. Stored
values are (V − ν) P; attention gives (Σ p V − ν) P, since probabilities add up to one, and Pᵀ and ν are
undone on that. Neither holds for scores that are capped, or where a sink takes a share.

Whoever attends to what is stored sees scores as ever, so that kernels know nothing of it: they are given
an S of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.formats.kv4 import AFFINE_TENSORS


@dataclass(frozen=True)
class Affine:
    """The maps of an attention module; all float32 and on one device."""

    scale: Tensor  # [Hkv, d]: S
    key_shift: Tensor  # [Hkv, d]: μ
    key_rotation: Tensor  # [Hkv, d, d]: R
    value_shift: Tensor  # [Hkv, d]: ν
    value_rotation: Tensor  # [Hkv, d, d]: P

    @classmethod
    def of(cls, scale: Tensor, tensors: Mapping[str, Tensor]) -> Affine:
        """tensors: by their names in a checkpoint (`AFFINE_TENSORS`)."""
        return cls(scale, **{name: tensors[name] for name in AFFINE_TENSORS})

    def keys(self, key: Tensor) -> Tensor:
        """What is stored of keys [..., Hkv, T, d]: float32."""
        return ((key.float() - self.key_shift[:, None]) * self.scale[:, None]) @ self.key_rotation

    def values(self, value: Tensor) -> Tensor:
        """What is stored of values [..., Hkv, T, d]: float32."""
        return (value.float() - self.value_shift[:, None]) @ self.value_rotation

    def queries(self, query: Tensor) -> Tensor:
        """As queries [..., H, T, d] meet stored keys: float32."""
        grouped = self._grouped(query.float()) / self.scale[:, None, None]
        return (grouped @ self.key_rotation[:, None]).view(query.shape)

    def output(self, mixed: Tensor, dtype: torch.dtype) -> Tensor:
        """Attention of the plain values, of what it gives [..., H, T, d] with stored ones."""
        mixed_back = self._grouped(mixed.float()) @ self.value_rotation.mT[:, None]
        return (mixed_back + self.value_shift[:, None, None]).view(mixed.shape).to(dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """[..., H, T, d] → [..., Hkv, R, T, d]: query heads by the key head that they read."""
        return x.reshape(*x.shape[:-3], len(self.scale), -1, *x.shape[-2:])
