"""y = x̂ Ŵᵀ + b with Ŵ packed INT4 (`quantize/formats/packed_int.py`) and x̂ = x or x
rounded to E4M3, on any device.

Triton computes it on NVIDIA devices, in a number of launches that depends on shapes alone and
without waiting, so that CUDA graphs can hold it, and with the same results in every run;
elsewhere the plain-torch twin does. While `torch.compile` traces, everything is an operator of
the library `pq`. There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from quantize.kernels.device import DTYPES, runs_fp8_on, runs_on
from quantize.kernels.fp8.api import GROUP_SIZES, Variant, as_rows, is_folded, quantize_tokens
from quantize.kernels.int4.reference import Weight, fold_reference, multiply_reference


def takes(bits: int, group_size: int, x: Tensor, fp8_activations: bool) -> bool:
    """Whether a kernel multiplies x with such weights: else `multiply`
    would use its twin, or refuse."""
    runs = runs_fp8_on if fp8_activations else runs_on
    return bits == 4 and group_size in GROUP_SIZES and x.dtype in DTYPES and runs(x.device)


def fold(weight: Weight) -> Weight:
    """The weight with E4M3 scales and a factor for each row: to do so once saves a
    launch of every folded product."""
    return Weight(weight.packed, *(_FOLD if is_compiling() else _fold)(weight.scale))


def multiply(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    fp8_activations: bool,
    variant: Variant = "folded",
) -> Tensor:
    """x [..., K] → [..., N] in x's dtype (bfloat16, float16 or float32; any
    strides), summed in float32.

    Groups are of 32, 64 or 128 inputs; bias [N] of any floating dtype. Without E4M3
    activations the variant is `exact`.
    ValueError for wrong shapes, dtypes or devices.
    """
    return _run(x, (weight,), bias, fp8_activations, variant)


def multiply_gated(
    x: Tensor, gate: Weight, up: Weight, *, fp8_activations: bool, variant: Variant = "folded"
) -> Tensor:
    """silu(x̂ Ŵ_gᵀ) ⊙ x̂ Ŵ_uᵀ [..., N] as `multiply` computes products, not rounded in between."""
    return _run(x, (gate, up), None, fp8_activations, variant)


def multiply_codes(
    codes: Tensor,
    token_scale: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    variant: Variant = "folded",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`multiply` of what `quantize_tokens` made for this group size and
    variant → [..., N] in dtype."""
    return _run_codes(codes, token_scale, (weight,), bias, variant, dtype)


def multiply_gated_codes(
    codes: Tensor,
    token_scale: Tensor,
    gate: Weight,
    up: Weight,
    *,
    variant: Variant = "folded",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`multiply_gated` of what `quantize_tokens` made for this group size and
    variant → [..., N] in dtype."""
    return _run_codes(codes, token_scale, (gate, up), None, variant, dtype)


def bytes_moved(
    M: int, N: int, K: int, group_size: int, itemsize: int, fp8_activations: bool, weights: int = 1
) -> int:
    """The fewest bytes that a product moves: weights, scales, x (its codes, where it is
    rounded) and y, each once."""
    read = M * (K + 4) if fp8_activations else M * K * itemsize
    return weights * (N * K // 2 + N * (K // group_size) * 2) + read + M * N * itemsize


def _run(
    x: Tensor,
    weights: tuple[Weight, ...],
    bias: Tensor | None,
    fp8_activations: bool,
    variant: Variant,
) -> Tensor:
    _check(x, weights, bias, DTYPES)
    if fp8_activations:
        group_size = x.shape[-1] // weights[0].scale.shape[1]
        codes, scale = quantize_tokens(x, group_size=group_size, variant=variant)
        return _run_codes(codes, scale, weights, bias, variant, x.dtype)
    if any(weight.factor is not None for weight in weights):
        raise ValueError("the weight is folded for E4M3 activations, but there are none")
    return _product(x, None, weights, bias, x.dtype)


def _run_codes(
    codes: Tensor,
    token_scale: Tensor,
    weights: tuple[Weight, ...],
    bias: Tensor | None,
    variant: Variant,
    dtype: torch.dtype,
) -> Tensor:
    _check(codes, weights, bias, (torch.float8_e4m3fn,))
    found = (token_scale.dtype, token_scale.shape, token_scale.device)
    if found != (torch.float32, codes.shape[:-1], codes.device):
        raise ValueError(
            f"token_scale is {token_scale.dtype} {tuple(token_scale.shape)}, codes "
            f"{tuple(codes.shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"a product in {dtype} was asked for, expected bfloat16, float16 or float32"
        )
    if is_folded(variant):
        weights = tuple(weight if weight.factor is not None else fold(weight) for weight in weights)
    elif any(weight.factor is not None for weight in weights):
        raise ValueError("the weight is folded, but the variant is 'exact'")
    return _product(codes, token_scale.reshape(-1), weights, bias, dtype)


def _product(
    x: Tensor,
    token_scale: Tensor | None,
    weights: tuple[Weight, ...],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    nothing: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    up = weights[1] if len(weights) == 2 else nothing
    y: Tensor = (_MULTIPLY if is_compiling() else _multiply)(
        as_rows(x), token_scale, *weights[0], *up, bias, dtype
    )
    return y.view(*x.shape[:-1], len(weights[0].packed))


def _check(
    x: Tensor, weights: tuple[Weight, ...], bias: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"activations are {x.dtype}, expected {names}")
    first = weights[0]
    K = x.shape[-1]
    N = first.packed.shape[0]
    G = first.scale.shape[-1]
    if G * 32 > K or K % G or K // G not in GROUP_SIZES:
        raise ValueError(f"{K} inputs in {G} groups: a group must have 32, 64 or 128 inputs")
    for packed, scale, factor in weights:
        _check_tensor("packed", packed, torch.int32, (N, K // 8), x)
        _check_tensor(
            "scale", scale, torch.bfloat16 if factor is None else torch.float16, (N, G), x
        )
        if factor is not None:
            _check_tensor("factor", factor, torch.float32, (N,), x)
        if (factor is None) != (first.factor is None):
            raise ValueError("only one of gate and up is folded")
    if bias is not None and (tuple(bias.shape) != (N,) or bias.device != x.device):
        raise ValueError(
            f"bias is {tuple(bias.shape)} on {bias.device}, expected {(N,)} on {x.device}"
        )


def _check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], x: Tensor
) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}, expected {dtype} {shape} for {x.shape[-1]} inputs")
    if tensor.device != x.device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on {x.device}")


def _fold(scale: Tensor) -> tuple[Tensor, Tensor]:
    if not scale.numel() or not runs_fp8_on(scale.device):
        return fold_reference(scale)
    from quantize.kernels.int4 import launch

    with torch.cuda.device_of(scale):  # type: ignore[no-untyped-call]
        return launch.fold(scale)


_FOLD = torch.library.custom_op("pq::fold_int4_scales", _fold, mutates_args=())


@_FOLD.register_fake
def _(scale: Tensor) -> tuple[Tensor, Tensor]:
    return scale.new_empty(scale.shape, dtype=torch.float16), scale.new_empty(
        scale.shape[:1], dtype=torch.float32
    )


def _multiply(
    x: Tensor,
    token_scale: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    factor: Tensor | None,
    up_packed: Tensor | None,
    up_scale: Tensor | None,
    up_factor: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weights = [Weight(packed, scale, factor)]
    if up_packed is not None and up_scale is not None:
        weights.append(Weight(up_packed, up_scale, up_factor))
    runs = runs_fp8_on if x.dtype == torch.float8_e4m3fn else runs_on
    if not x.numel() or not packed.numel() or not runs(x.device):
        return multiply_reference(x, token_scale, weights, bias, dtype)
    from quantize.kernels.int4 import launch

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return launch.multiply(x, token_scale, weights, bias, dtype)


_MULTIPLY = torch.library.custom_op("pq::int4_multiply", _multiply, mutates_args=())


@_MULTIPLY.register_fake
def _(
    x: Tensor,
    token_scale: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    factor: Tensor | None,
    up_packed: Tensor | None,
    up_scale: Tensor | None,
    up_factor: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=dtype)
