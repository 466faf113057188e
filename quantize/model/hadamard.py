"""Orthonormal Hadamard matrices as products of small factors, and what is rotated with them.

H_n = H_P ⊗ H_Q, n = P·Q, with P a power of two (Sylvester's matrix) and Q = 4·odd one of N. J. A.
Sloane's library, which compressed-tensors ships. Both are in normalized form, first row and column
all ones, so that there is one H_n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST_KNOWN = 256  # what compressed-tensors has matrices for, other than powers of two
# A power of two is split into factors of at most 2^6: smaller ones take more passes over x, larger
# ones more operations for each element.
_SYLVESTER_BITS = 6


def hadamard_factors(n: int) -> tuple[int, int]:
    """Split n into (P, Q), a power of two and the size of a known matrix (1 for powers of
    two); ValueError names n."""
    power = n & -n if n > 0 else 0
    odd = n // power if power else 0
    if odd == 1:
        return n, 1
    if power < 4 or 4 * odd > _LARGEST_KNOWN:
        raise ValueError(
            f"no Hadamard matrix of size {n} is known: sizes are powers of two, or these times "
            "12, 20, 28, … 252"
        )
    return power // 4, 4 * odd


def hadamard_matrix(n: int) -> Tensor:
    """H_n, orthonormal [n, n] float64, for small n; ValueError names an n without one."""
    return apply_hadamard(torch.eye(n, dtype=torch.float64))


def apply_hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """x [..., n] → x @ H_n (transpose: x @ H_nᵀ), in x's dtype, computed at least in float32.

    Kronecker factors are applied one after the other; nothing of size n × n is made.
    ValueError names an n without H_n.
    """
    n = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    out, left = x.to(wide).reshape(-1, n), n
    for size in _sizes(n):
        left //= size
        factor = _signs(size, wide, x.device)
        factor = factor.T if transpose else factor
        # The factor acts on the middle axis of [.., size, left]; on the last
        # one, one large product does it.
        out = (
            out.reshape(-1, size) @ factor if left == 1 else factor.T @ out.reshape(-1, size, left)
        )
    return (out / math.sqrt(n)).to(x.dtype).view(x.shape)


def _sizes(n: int) -> Iterator[int]:
    P, Q = hadamard_factors(n)
    bits = P.bit_length() - 1
    for left in range(math.ceil(bits / _SYLVESTER_BITS), 0, -1):
        yield 1 << math.ceil(bits / left)
        bits -= math.ceil(bits / left)
    if Q > 1:
        yield Q


@functools.cache
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Entries ±1 of a factor [size, size]."""
    # What is made in inference mode could not take part in training later.
    with torch.inference_mode(False):
        factor: Tensor = _normalized_matrix(size).to(dtype).to(device)
        return factor


def _normalized_matrix(size: int) -> Tensor:
    # Imported late: it imports transformers, which imports pq's own format.
    from compressed_tensors.transform.utils.hadamard import (
        deterministic_hadamard_matrix,
        random_hadamard_matrix,
    )

    cpu = torch.device("cpu")
    if size & (size - 1) == 0:
        sylvester: Tensor = deterministic_hadamard_matrix(size, torch.float64, cpu)
        return sylvester
    # The library has no function without random signs; normalizing takes them away again.
    signed: Tensor = random_hadamard_matrix(
        size, torch.float64, cpu, torch.Generator().manual_seed(0)
    )
    rows = signed * signed[:, :1]
    return rows * rows[:1]


@dataclass(frozen=True)
class Rotation:
    """The randomized Hadamard rotation x → (x·s) @ H_n, s ∈ {±1}ⁿ drawn from
    `seed` (QuaRot, arXiv 2404.00456).

    The signs come first: H alone would gather what all channels have in common in one of them.
    """

    seed: int

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [..., n], in its dtype, computed at least in float32."""
        return apply_hadamard(x * _random_signs(self.seed, x.shape[-1]).to(x.device, x.dtype))

    def undo(self, x: Tensor) -> Tensor:
        """Rotate x [..., n] back."""
        return apply_hadamard(x, transpose=True) * _random_signs(self.seed, x.shape[-1]).to(
            x.device, x.dtype
        )


def widen(weight: Tensor) -> Tensor:
    """A weight in float64 where its device has it: sums of its few-digit numbers then do
    not depend on their order."""
    return weight.float() if weight.device.type == "mps" else weight.double()


@functools.cache
def _random_signs(seed: int, n: int) -> Tensor:
    with torch.inference_mode(False):
        bits = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed))
        return (2 * bits - 1).to(torch.int8)


def rotate_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a linear whose weight has columns rotated by H_K: x → x @ H_K."""
    return apply_hadamard(args[0]), *args[1:]


def rotates_inputs(module: nn.Module) -> bool:
    """Whether the linear rotates its inputs."""
    return rotate_inputs in module._forward_pre_hooks.values()


def let_rotate_inputs(linear: nn.Module) -> None:
    """Make a linear, packed or not, rotate its inputs from now on; ValueError for a size
    without a Hadamard matrix."""
    hadamard_factors(int(linear.in_features))  # type: ignore[arg-type]  # every linear has it
    linear.register_forward_pre_hook(rotate_inputs)


def keep_rotation(old: nn.Module, new: nn.Module) -> None:
    """Make `new`, which replaces the linear `old`, rotate its inputs if `old` does."""
    if rotates_inputs(old):
        let_rotate_inputs(new)
