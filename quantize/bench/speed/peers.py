"""Products of the same INT4 weight by other means: torch's own and, where installed, gemlite's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.bench.speed.stand import Calls, Stand
from quantize.formats.packed_int import unpack_codes
from quantize.kernels.int4.reference import Weight

Prepared = Callable[[Tensor], Calls]
"""Takes x [M, K] and gives products with copies of the weight that take turns."""


def peers(stand: Stand, weight: Weight) -> dict[str, Prepared]:
    """Peers by name. Copies of the weight are made at the first call; what a machine
    does not know raises then."""
    makers: dict[str, Callable[[Stand, Weight], Prepared]] = {
        stand.plain: _plain,
        "torch fp8": _scaled_mm,
    }
    if stand.device.type == "cuda":
        makers |= {
            "torch int4": _tinygemm,
            "gemlite W4A16": partial(_gemlite, name="A16W4_HQQ_INT"),
        }
        makers["gemlite W4A8"] = partial(_gemlite, name="A8W4_HQQ_INT_dynamic")
    return {name: _once(partial(make, stand, weight)) for name, make in makers.items()}


def _once(make: Callable[[], Prepared]) -> Prepared:
    made = functools.cache(make)
    return lambda x: made()(x)


def clones(stand: Stand, tensor: Tensor) -> list[Tensor]:
    """The tensor, and as many copies of it as it takes to exceed the caches."""
    return [tensor, *(tensor.clone() for _ in range(stand.copies(tensor.nbytes) - 1))]


def _plain(stand: Stand, weight: Weight) -> Prepared:
    weights = clones(stand, weight.decode().to(stand.dtype))
    return lambda x: [partial(F.linear, x, w) for w in weights]


def _scaled_mm(stand: Stand, weight: Weight) -> Prepared:
    codes, scale = row_codes(weight.decode())
    weights = clones(stand, codes)

    def calls(x: Tensor) -> Calls:
        tokens, token_scale = row_codes(x)
        product = partial(
            torch._scaled_mm, scale_a=token_scale, scale_b=scale.T.contiguous(), out_dtype=x.dtype
        )
        return [partial(product, tokens, w.T, use_fast_accum=True) for w in weights]

    return calls


def row_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] and scales float32 [M, 1] of x [M, K], by plain torch."""
    scale = x.abs().amax(dim=1, keepdim=True).float() / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def _tinygemm(stand: Stand, weight: Weight) -> Prepared:
    N, G = weight.scale.shape
    codes = _unsigned_codes(weight)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    weights = clones(stand, packed)
    group_size = codes.shape[1] // G
    scales = torch.stack([weight.scale.T, torch.zeros(G, N, device=codes.device)], dim=2).to(
        stand.dtype
    )
    return lambda x: [partial(torch._weight_int4pack_mm, x, w, group_size, scales) for w in weights]


def _gemlite(stand: Stand, weight: Weight, name: str) -> Prepared:
    made = getattr(importlib.import_module("gemlite.helper"), name)(
        device=str(stand.device), dtype=stand.dtype
    )
    codes = _unsigned_codes(weight)
    scale = weight.scale.reshape(-1, 1).to(stand.dtype)
    zero = torch.full_like(scale, 8)
    layers = [
        made.from_weights(codes, scale, zero) for _ in range(stand.copies(weight.packed.nbytes))
    ]
    return lambda x: [partial(layer, x) for layer in layers]


def _unsigned_codes(weight: Weight) -> Tensor:
    # Codes + 8, uint8 [N, K].
    return (unpack_codes(weight.packed, 4, weight.packed.shape[1] * 8) + 8).to(torch.uint8)
