"""Random INT4 weights for tests, and what products with them must be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.packed_int import PackedInt, pack_codes
from quantize.kernels.int4.reference import Weight

KINDS: dict[str, dict[str, Any]] = {
    "W4A16": {"fp8_activations": False},
    "exact": {"fp8_activations": True, "variant": "exact"},
    "folded": {"fp8_activations": True, "variant": "folded"},
}

# Units of rounding of a result; Triton's interpreter cuts bfloat16 off.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}
# Of the sum of a result's terms' sizes: float32 sums, and on Hopper those of E4M3 products, which keep 13 bits or so.
OF_TERMS = {"cpu": 2**-18, "cuda": 2**-18, "cuda E4M3": 2**-10}


def random_weight(
    N: int, K: int, group_size: int = 128, spread: float = 0.02, seed: int = 0
) -> PackedInt:
    """Codes of all sizes; scales of both signs that differ by up to 2⁸ within a row."""
    generator = torch.Generator().manual_seed(N + K + group_size + seed)
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=generator)
    scale = torch.exp2(-8 * torch.rand(N, K // group_size, generator=generator)) * spread
    scale *= torch.randn(scale.shape, generator=generator).sign()
    return PackedInt(codes, scale.to(torch.bfloat16), 4, group_size)


def weight_of(packed: PackedInt, device: str = "cpu") -> Weight:
    return Weight(pack_codes(packed.codes, 4).to(device), packed.scale.to(device))


def exact_product(x: Tensor, packed: PackedInt, kind: str) -> tuple[Tensor, Tensor]:
    """x̂ Ŵᵀ in float64, and the sum of its terms' absolute values, which bounds what rounding can do."""
    x = (x.cpu() if kind == "W4A16" else quantize_activations(x.cpu())).double()
    values = (packed.kernel_weight() if kind == "folded" else packed.unpack()).double()
    return x @ values.T, x.abs() @ values.abs().T


def check(y: Tensor, x: Tensor, packed: PackedInt, kind: str, bias: Tensor | None = None) -> None:
    expected, size = exact_product(x, packed, kind)
    if bias is not None:
        expected, size = expected + bias.double().cpu(), size + bias.double().abs().cpu()
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    of_terms = OF_TERMS[f"{y.device.type} E4M3" if y.is_cuda and kind != "W4A16" else y.device.type]
    limit = TOLERANCE[x.dtype] * expected.abs() + of_terms * size + 1e-6
    assert bool(((y.double().cpu() - expected).abs() <= limit).all())


def check_gated(y: Tensor, x: Tensor, gate: PackedInt, up: PackedInt, kind: str) -> None:
    (gates, gate_size), (ups, up_size) = (exact_product(x, packed, kind) for packed in (gate, up))
    expected = F.silu(gates) * ups
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    of_terms = OF_TERMS[f"{y.device.type} E4M3" if y.is_cuda and kind != "W4A16" else y.device.type]
    size = (
        1.1 * gate_size * ups.abs() + F.silu(gates).abs() * up_size
    )  # the slope of SiLU is 1.1 at most
    limit = (TOLERANCE[x.dtype] + 2**-18) * expected.abs() + of_terms * size + 1e-6
    assert bool(((y.double().cpu() - expected).abs() <= limit).all())
