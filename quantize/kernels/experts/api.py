"""Routed experts of a Mixture of Experts, all at once, from stacked weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.kernels.device import has_kernel

# Measured on two cores with 16 and 8 experts.
# Bytes of a weight that takes less time than a call, so that a batch of all experts is faster.
_SMALL = 1 << 20
_PADDED = 2  # rows of that batch for every row that is needed, at most
_FEW = 32  # rows up to which splitting the outputs is faster


def routed_experts(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: Callable[[Tensor], Tensor] = F.silu,
    most: int | None = None,
) -> Tensor:
    """y[m] = Σ_e weights[m, e] · (act(x[m] W_gᵀ) ⊙ x[m] W_uᵀ) W_dᵀ over the experts
    e of nonzero weight → [M, D].

    x [M, D]; weights [M, N] of any floating dtype, with any number of nonzero ones for a token,
    also none; gate_up [N, 2E, D], the rows of W_g above those of W_u, and down [N, D, E],
    contiguous, in x's dtype. Products are summed in float32, and y has x's dtype. `most` is how
    many experts a token visits at most (default: N); it saves memory on a GPU, where a token
    that visits more may come out as NaN: to count would make the host wait. ValueError for
    wrong shapes, dtypes or devices.

    Triton computes SiLU experts without gradients, in a number of launches that
    depends on M alone, so that CUDA graphs can hold them and results are the same in
    every run. Else torch does, for CPUs.
    """
    _check(x, weights, gate_up, down)
    if not x.numel() or not gate_up.numel():
        return torch.zeros_like(x)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    if learns or act is not F.silu or not has_kernel(x):
        return _by_torch(x, weights, gate_up, down, act)
    from quantize.kernels.experts import launch

    N = len(down)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = x if x.stride(1) == 1 else x.contiguous()
        return launch.routed_experts(rows, weights.contiguous(), gate_up, down, min(most or N, N))


def _by_torch(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    counts = (weights != 0).sum(0).tolist()
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if not any(counts):
        return y.to(x.dtype)
    even = max(counts) * len(counts) <= _PADDED * sum(counts)
    compute = _all_at_once if even and gate_up[0].nbytes <= _SMALL else _one_by_one
    return compute(y, x, weights, gate_up, down, act, counts).to(x.dtype)


def _one_by_one(
    y: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    counts: list[int],
) -> Tensor:
    # Reads experts that have visitors, and no others.
    expert, token = weights.T.nonzero(as_tuple=True)
    outputs = []
    for e, rows in enumerate(torch.split(x[token], counts)):
        if len(rows):
            gate, up = _product(rows, gate_up[e]).chunk(2, dim=1)
            outputs.append(_product(act(gate) * up, down[e]))
    return y.index_add(0, token, torch.cat(outputs) * weights[token, expert, None].to(y.dtype))


def _all_at_once(
    y: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    counts: list[int],
) -> Tensor:
    # Small experts take less time than calls: all in one batch, filled up with
    # tokens that do not visit them.
    token = torch.sort(weights.T == 0, dim=1, stable=True).indices[:, : max(counts)]
    gate, up = torch.bmm(x[token], gate_up.mT).chunk(2, dim=2)
    output = torch.bmm(act(gate) * up, down.mT)
    weight = weights.T.gather(1, token)[:, :, None].to(y.dtype)
    part = torch.where(weight != 0, output * weight, 0.0)
    return y.index_add(0, token.flatten(), part.flatten(0, 1))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    # MKL multiplies few rows in one thread: the outputs of a large weight go as one batch a thread.
    threads = torch.get_num_threads()
    small = weight.nbytes <= _SMALL or len(weight) % threads
    if small or x.is_cuda or x.dtype != torch.float32 or len(x) > _FEW:
        return F.linear(x, weight)
    batches = weight.view(threads, -1, weight.shape[1])
    return torch.bmm(x.expand(threads, *x.shape), batches.mT).transpose(0, 1).reshape(len(x), -1)


def _check(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if x.ndim != 2 or down.ndim != 3:
        raise ValueError(f"x {tuple(x.shape)} must have 2 axes and down {tuple(down.shape)} 3")
    (M, D), (N, _, E) = x.shape, down.shape
    wanted = {
        "weights": (weights, (M, N)),
        "gate_up": (gate_up, (N, 2 * E, D)),
        "down": (down, (N, D, E)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            found = f"{tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(
                f"{name} is {found}, expected {shape} on {x.device} for {M} tokens and {N} "
                f"experts of {E}"
            )
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and {x.dtype} like x, it is {tensor.dtype}"
            )
