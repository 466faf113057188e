"""Linears of a checkpoint within a linear of vLLM: q, k and v, or gate and up, are parts of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.formats.bitvec import BitVecScheme
from quantize.formats.fp8 import row_factor
from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import AnyScheme
from quantize.kernels.int4.api import fold
from quantize.kernels.int4.cpu import can_repack, repack
from quantize.kernels.int4.reference import Weight, fold_reference
from quantize.serving.native_linear import constant
from quantize.vllm import ops
from quantize.vllm.cuts import Cut


class Part(nn.Module):
    """One linear of the checkpoint, or what this GPU holds of it, [N, K]: y = x Wᵀ + b, its tensors as
    they are stored there."""

    def __init__(self, name: str, cut: Cut, scheme: AnyScheme | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.cut, self.shape, self.scheme = name, cut, cut.held, scheme
        self.stored = _layout(scheme, cut.shape, dtype)
        self.missing = set(self.stored)
        self.whole: dict[str, Tensor] = {}
        for suffix, (kind, size) in _layout(scheme, cut.held, dtype).items():
            self.register_parameter(suffix, constant(torch.empty(size, dtype=kind)))

    def load(self, suffix: str, found: Tensor) -> None:
        """Take over a tensor of the checkpoint; ValueError for one that config.json does not imply."""
        dtype, size = self.stored[suffix]
        if found.shape != size or (found.dtype != dtype and suffix != "weight"):
            raise ValueError(
                f"{self.name}.{suffix} is {found.dtype} {tuple(found.shape)}, config.json implies "
                f"{dtype} {size}; convert or download the checkpoint again"
            )
        self.whole[suffix] = found
        self.missing.discard(suffix)
        if not self.missing:  # a tensor may need another one to be cut
            self.take(self.whole)
            self.whole = {}

    def take(self, whole: dict[str, Tensor]) -> None:
        """Keep what this GPU holds of all tensors; ValueError for those that contradict config.json."""
        for suffix, part in self.cut.of(whole, self.scheme).items():
            self.get_parameter(suffix).data.copy_(part)

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

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K], bias [N] → [..., N] in x's dtype."""
        return F.linear(x, self.weight, bias)


class PackedPart(Part):
    """A packed linear."""

    weight_shape: Tensor

    def take(self, whole: dict[str, Tensor]) -> None:
        """As `Part.take`; also for a shape that is another one's."""
        if tuple(whole["weight_shape"].tolist()) != self.cut.shape:
            raise ValueError(
                f"{self.name}.weight_shape says {whole['weight_shape'].tolist()}, config.json implies "
                f"{list(self.cut.shape)}; convert or download the checkpoint again"
            )
        super().take(whole)


class BitVecPart(PackedPart):
    """Sums of bit vectors, the codebook of coefficients its own."""

    weight_planes: Tensor
    weight_index: Tensor
    weight_lines: Tensor
    weight_scales: Tensor

    scheme: BitVecScheme

    def check(self) -> None:
        """As `Part.check`; also for an index outside the codebook, where a kernel would read what
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

    scheme: IntScheme
    folded: Tensor | None
    factor: Tensor | None
    repacked: Tensor | None
    repacked_scale: Tensor | None

    def __init__(self, name: str, cut: Cut, scheme: IntScheme, dtype: torch.dtype) -> None:
        super().__init__(name, cut, scheme, dtype)
        for form in ("folded", "factor", "repacked", "repacked_scale"):
            self.register_buffer(form, None, persistent=False)

    def take(self, whole: dict[str, Tensor]) -> None:
        """As `PackedPart.take`; where a row of E4M3 products is divided, the factor of all of it is kept."""
        super().take(whole)
        if self.scheme.fp8_activations and self.cut.inputs is not None:
            factor = row_factor(whole["weight_scale"].to(self.weight_scale.device))
            self.factor = fold_reference(self.weight_scale.data, factor)[1]

    def prepare(self, dtype: torch.dtype) -> None:
        """Fold scales for kernels with E4M3 activations, or repack for torch's operator on CPUs."""
        (N, K), scheme = self.shape, self.scheme
        weight = Weight(self.weight_packed.data, self.weight_scale.data)
        if scheme.fp8_activations and weight.packed.is_cuda:
            if self.factor is None:
                self.folded, self.factor = fold(weight)[1:]
            else:
                self.folded, self.factor = fold_reference(weight.scale, self.factor[:, None] / 8)
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


def part_of(name: str, cut: Cut, scheme: AnyScheme | None, dtype: torch.dtype) -> Part:
    """An empty linear of this scheme, or a plain one; dtype: of the activations."""
    if scheme is None:
        return PlainPart(name, cut, None, dtype)
    if isinstance(scheme, BitVecScheme):
        return BitVecPart(name, cut, scheme, dtype)
    assert isinstance(scheme, IntScheme), scheme
    return IntPart(name, cut, scheme, dtype)


def _layout(
    scheme: AnyScheme | None, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {"weight": (dtype, shape)} if scheme is None else scheme.layout(*shape)


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
    name, cut = f"{above.name} and {below.name}", Cut((N, above.shape[1]))
    made = IntPart(name, cut, above.scheme, above.weight_scale.dtype)
    for suffix in ("weight_packed", "weight_scale"):
        both = [part.get_parameter(suffix).data for part in (above, below)]
        setattr(made, suffix, constant(torch.cat(both)))
    made.weight_shape = constant(torch.tensor(made.shape))
    made.missing.clear()
    return made
