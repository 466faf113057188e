"""Linears of a checkpoint within a linear of vLLM: q, k and v, or gate and up, are parts of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats.bitvec import BitVecScheme
from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import AnyScheme
from quantize.kernels.int4.api import fold
from quantize.kernels.int4.cpu import can_repack, repack
from quantize.kernels.int4.reference import Weight
from quantize.serving.native_linear import constant
from quantize.vllm import ops


class Part(nn.Module):
    """One linear [N, K] of the checkpoint: y = x Wᵀ + b, its tensors as they are stored there."""

    def __init__(
        self,
        name: str,
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.name, self.shape, self.missing = name, shape, set(layout)
        for suffix, (dtype, size) in layout.items():
            self.register_parameter(suffix, constant(torch.empty(size, dtype=dtype)))

    def load(self, suffix: str, found: Tensor) -> None:
        """Take over a tensor of the checkpoint; ValueError for one that config.json does not imply."""
        own = self.get_parameter(suffix)
        if own.shape != found.shape or (own.dtype != found.dtype and suffix != "weight"):
            raise ValueError(
                f"{self.name}.{suffix} is {found.dtype} {tuple(found.shape)}, config.json implies "
                f"{own.dtype} {tuple(own.shape)}; convert or download the checkpoint again"
            )
        own.data.copy_(found)
        self.missing.discard(suffix)

    def check(self) -> None:
        """ValueError where a tensor was not loaded, or does not fit the others."""
        if self.missing:
            raise ValueError(
                f"{self.name}.{min(self.missing)} is missing from the checkpoint; download it again"
            )

    def prepare(self, dtype: torch.dtype) -> None:
        """Make what is multiplied beside the stored tensors; dtype: of the activations."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], bias [N] → [..., N] in x's dtype."""
        raise NotImplementedError


class PlainPart(Part):
    """A linear that stayed 16-bit, beside packed ones."""

    weight: Tensor

    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(name, {"weight": (dtype, shape)}, shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], bias [N] → [..., N] in x's dtype."""
        return F.linear(x, self.weight, bias)


class PackedPart(Part):
    """A packed linear."""

    weight_shape: Tensor

    def __init__(self, name: str, shape: tuple[int, int], scheme: AnyScheme) -> None:
        super().__init__(name, scheme.layout(*shape), shape)

    def check(self) -> None:
        """As `Part.check`; also for a shape that is another one's."""
        super().check()
        if tuple(self.weight_shape.tolist()) != self.shape:
            raise ValueError(
                f"{self.name}.weight_shape says {self.weight_shape.tolist()}, config.json implies "
                f"{list(self.shape)}; convert or download the checkpoint again"
            )


class BitVecPart(PackedPart):
    """Sums of bit vectors, the codebook of coefficients its own."""

    weight_planes: Tensor
    weight_index: Tensor
    weight_lines: Tensor
    weight_scales: Tensor

    def __init__(self, name: str, shape: tuple[int, int], scheme: BitVecScheme) -> None:
        super().__init__(name, shape, scheme)
        self.scheme = scheme

    def check(self) -> None:
        """As `PackedPart.check`; also for an index outside the codebook, where a kernel would read what
        is not its own."""
        super().check()
        lines, largest = self.scheme.lines * self.scheme.scales, int(self.weight_index.int().max())
        if largest >= lines:
            raise ValueError(
                f"{self.name}.weight_index names line {largest} of a codebook of {lines}; download it again"
            )

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], bias [N] → [..., N] in x's dtype."""
        weight = (self.weight_planes, self.weight_index, self.weight_lines, self.weight_scales)
        y: Tensor = ops.bitvec_linear(x, *weight, bias, self.scheme.bits, self.scheme.group_size)
        return y


class IntPart(PackedPart):
    """Packed integers."""

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, name: str, shape: tuple[int, int], scheme: IntScheme) -> None:
        super().__init__(name, shape, scheme)
        self.scheme = scheme
        for form in ("folded", "factor", "repacked", "repacked_scale"):
            self.register_buffer(form, None, persistent=False)

    def prepare(self, dtype: torch.dtype) -> None:
        """Fold scales for kernels with E4M3 activations, or repack for torch's operator on CPUs."""
        (N, K), scheme = self.shape, self.scheme
        weight = Weight(self.weight_packed.data, self.weight_scale.data)
        if scheme.fp8_activations and weight.packed.is_cuda:
            self.folded, self.factor = fold(weight)[1:]
        plain = scheme.bits == 4 and not scheme.fp8_activations and not weight.packed.is_cuda
        if plain and can_repack(N, scheme.group(K), dtype):
            self.repacked, self.repacked_scale = repack(weight.packed, weight.scale, K)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], bias [N] → [..., N] in x's dtype."""
        forms = (self.folded, self.factor, self.repacked, self.repacked_scale)
        weight = (self.weight_packed, self.weight_scale)
        bits, fp8 = self.scheme.bits, self.scheme.fp8_activations
        y: Tensor = ops.int_linear(x, *weight, *forms, bias, bits, fp8)
        return y


def part_of(
    name: str, shape: tuple[int, int], scheme: AnyScheme | None, dtype: torch.dtype
) -> Part:
    """An empty linear [N, K] of this scheme, or a plain one; dtype: of the activations."""
    if scheme is None:
        return PlainPart(name, shape, dtype)
    if isinstance(scheme, BitVecScheme):
        return BitVecPart(name, shape, scheme)
    assert isinstance(scheme, IntScheme), scheme
    return IntPart(name, shape, scheme)


def joined(parts: Sequence[Part]) -> list[Part]:
    """Loaded parts that one product can do, as one: integers of the same scheme. Rows have scales of their
    own, so that nothing is rounded otherwise; codebooks stay apart."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        alike = isinstance(part, IntPart) and isinstance(last, IntPart)
        if alike and part.scheme == last.scheme:  # type: ignore[union-attr]
            out[-1] = _stacked(last, part)  # type: ignore[arg-type]
        else:
            out.append(part)
    return out


def _stacked(above: IntPart, below: IntPart) -> IntPart:
    N = above.shape[0] + below.shape[0]
    made = IntPart(f"{above.name} and {below.name}", (N, above.shape[1]), above.scheme)
    for suffix in ("weight_packed", "weight_scale"):
        both = [part.get_parameter(suffix).data for part in (above, below)]
        setattr(made, suffix, constant(torch.cat(both)))
    made.weight_shape = constant(torch.tensor(made.shape))
    made.missing.clear()
    return made
