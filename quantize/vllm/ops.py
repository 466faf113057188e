"""Products of packed linears as operators of vLLM: `torch.compile` and CUDA graphs take each as a whole, so
that what is done inside may depend on the number of tokens.

Triton computes them on NVIDIA devices, plain torch elsewhere.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from quantize.formats.fp8 import quantize_activations
from quantize.kernels.bitvec import api as bitvec
from quantize.kernels.bitvec.lookup import Stored
from quantize.kernels.by_rows import multiply_by_rows
from quantize.kernels.device import has_kernel
from quantize.kernels.int4 import api as int4
from quantize.kernels.int4.cpu import multiply_repacked, prefers_repacked
from quantize.kernels.int4.decode import decode
from quantize.kernels.int4.reference import Weight
from quantize.model.hadamard import apply_hadamard

# What compiled code reads of an operator's output it reads where its fake has it: row after row.
# The schema of an operator is read from these annotations, which must name torch's own types.
# ruff: noqa: UP045


def _bitvec(
    x: torch.Tensor,
    planes: torch.Tensor,
    index: torch.Tensor,
    lines: torch.Tensor,
    scales: torch.Tensor,
    bias: Optional[torch.Tensor],
    bits: int,
    group_size: int,
) -> torch.Tensor:
    if has_kernel(x):
        weight = (planes, index, lines, scales)
        return bitvec.multiply(x, *weight, bias, bits=bits, group_size=group_size)
    return Stored(planes, index, lines, scales, bits, group_size).multiply(x, bias).contiguous()


def _bitvec_like(
    x: Tensor, planes: Tensor, index: Tensor, lines: Tensor, scales: Tensor, *rest: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[0])


def _int(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    folded: Optional[torch.Tensor],
    factor: Optional[torch.Tensor],
    repacked: Optional[torch.Tensor],
    repacked_scale: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    bits: int,
    fp8_activations: bool,
) -> torch.Tensor:
    N, K = packed.shape[0], x.shape[-1]
    if int4.takes(bits, K // scale.shape[1], x, fp8_activations):
        weight = Weight(packed, scale if folded is None else folded, factor)
        return int4.multiply(x, weight, bias, fp8_activations=fp8_activations)
    if repacked is not None and repacked_scale is not None and prefers_repacked(x):
        return multiply_repacked(x, repacked, repacked_scale, bias).contiguous()
    if fp8_activations:
        x = quantize_activations(x).to(x.dtype)

    def rows(first: int, last: int, dtype: torch.dtype) -> Tensor:
        part = slice(first, last)
        own = None if factor is None else factor[part]
        return decode(packed[part], scale[part], bits, K, fp8_activations, dtype, own)

    return multiply_by_rows(x, N, rows, None if bias is None else bias.to(x.dtype)).contiguous()


def _int_like(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _rotate(x: torch.Tensor) -> torch.Tensor:
    return apply_hadamard(x).contiguous()


direct_register_custom_op("pq_bitvec_linear", _bitvec, fake_impl=_bitvec_like)
direct_register_custom_op("pq_int_linear", _int, fake_impl=_int_like)
direct_register_custom_op("pq_rotate_inputs", _rotate, fake_impl=torch.empty_like)

bitvec_linear = torch.ops.vllm.pq_bitvec_linear
"""x [..., K], the tensors of `quantize.kernels.bitvec.api.multiply`, bias [N] or None → [..., N]."""
int_linear = torch.ops.vllm.pq_int_linear
"""x [..., K], a weight packed, its folded and repacked forms or None, bias [N] or None → [..., N]."""
rotate_inputs = torch.ops.vllm.pq_rotate_inputs
"""x [..., K] → x @ H_K."""
