"""Time of products with packed INT4 weights, of gated FFN fronts, of whole
FFNs and of rounding to E4M3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.bench.speed.peers import clones, peers, row_codes
from quantize.bench.speed.rows import Row
from quantize.bench.speed.stand import CHAIN_LIMIT, Calls, Stand, require_close
from quantize.formats.fp8 import quantize_activations
from quantize.kernels.fp8 import api as fp8
from quantize.kernels.fp8.reference import operand_order
from quantize.kernels.int4 import api as int4
from quantize.kernels.int4.reference import Weight

Shape = tuple[int, int]
GROUP_SIZE = 128
_EPS = 1e-5  # of RMSNorm, as in Llama's config
_ROUNDING_LIMIT = 4e-2  # a step of E4M3 is a fourteenth of the largest value

Products = dict[str, Sequence[Callable[[], Tensor]]]
Kind = Literal["folded", "exact", "W4A16"]
KINDS: tuple[Kind, ...] = ("folded", "exact", "W4A16")


def random_weight(stand: Stand, N: int, K: int) -> Weight:
    """A weight [N, K] whose products with numbers of unit variance have about that, too."""
    packed = torch.randint(-(1 << 31), 1 << 31, (N, K // 8), device=stand.device).to(torch.int32)
    scale = (torch.rand(N, K // GROUP_SIZE, device=stand.device) + 0.5) / (4.6 * K**0.5)
    return Weight(packed, scale.to(torch.bfloat16))


def time_linears(stand: Stand, shapes: Sequence[Shape], batches: Sequence[int]) -> Iterator[Row]:
    """Products [M, K] · [N, K]ᵀ of all kinds, of E4M3 codes that are there already, and
    `from x`, which rounds first.

    QualityError before the first wrong product is timed, as everywhere here:
    results are compared with float64.
    """
    for N, K in shapes:
        weight = random_weight(stand, N, K)
        weights, prepared = _kinds(stand, weight), peers(stand, weight)
        for M in batches:
            x = stand.random(M, K)
            ours: Products = {
                kind: _products(kind, of_kind, x) for kind, of_kind in weights.items()
            }
            ours["folded from x"] = [
                partial(int4.multiply, x, w, fp8_activations=True) for w in weights["folded"]
            ]
            shape, exact = f"{N}x{K}", partial(_exact, x)
            for name, calls in ours.items():
                kind = _kind_of(name)
                require_close(
                    calls[0](),
                    exact(weights[kind][0], kind),
                    f"INT4 product {name} {shape}, {M} rows",
                )
            others = stand.working(
                {name: partial(peer, x) for name, peer in prepared.items()}, exact(weight, "W4A16")
            )
            yield from _rows(stand, ours, others, shape, M, (N, K), 1)


def time_gated(stand: Stand, shapes: Sequence[Shape], batches: Sequence[int]) -> Iterator[Row]:
    """silu(x Wgᵀ) ⊙ x Wuᵀ with gate and up of each shape [N, K], against one torch
    product, SiLU and a product."""
    for N, K in shapes:
        pair = random_weight(stand, N, K), random_weight(stand, N, K)
        weights = [_kinds(stand, weight) for weight in pair]
        both = clones(stand, torch.cat([weight.decode().to(stand.dtype) for weight in pair]))
        for M in batches:
            x = stand.random(M, K)
            ours: Products = {
                f"gated {kind}": _fronts(kind, weights[0][kind], weights[1][kind], x)
                for kind in KINDS
            }
            shape = f"2x{N}x{K}"
            for name, calls in ours.items():
                kind = _kind_of(name)
                gate, up = (_exact(x, of_one[kind][0], kind) for of_one in weights)
                require_close(
                    calls[0](), F.silu(gate) * up, f"INT4 FFN front {name} {shape}, {M} rows"
                )
            others: dict[str, Calls] = {stand.plain: [partial(gated_plain, x, w) for w in both]}
            yield from _rows(stand, ours, others, shape, M, (N, K), 2)


def time_rounding(stand: Stand, widths: Sequence[int], batches: Sequence[int]) -> Iterator[Row]:
    """Rounding of x [M, K] to E4M3, alone and after RMSNorm, against the same in eager torch."""
    for K in widths:
        for M in batches:
            first = stand.random(M, K)
            norm, held = stand.random(K).abs() + 0.5, clones(stand, first)
            for name, weight in (("round", None), ("norm + round", norm)):
                ours = [
                    partial(fp8.quantize_tokens, x, weight, _EPS, group_size=GROUP_SIZE)
                    for x in held
                ]
                _require_rounded(*ours[0](), first, weight, f"{name} to E4M3, {M} x {K}")
                spreads = stand.clock(
                    {"pq": ours, "eager": [partial(_round_plain, x, weight) for x in held]}
                )
                moved = M * (K * first.element_size() + K + 4)
                facts = spreads.pop("pq"), moved, (4 if weight is None else 8) * M * K, spreads
                yield stand.row(name, f"{K}", M, K, *facts, precision="none")


def time_ffn(stand: Stand, shapes: Sequence[Shape], batches: Sequence[int]) -> Iterator[Row]:
    """A whole gated FFN of each [intermediate, hidden] in INT4×FP8, x and
    result in full precision."""
    for N, K in shapes:
        plain = [random_weight(stand, *shape) for shape in ((N, K), (N, K), (K, N))]
        folded = [int4.fold(weight) for weight in plain]
        full = [weight.decode().to(stand.dtype) for weight in plain]
        both = torch.cat(full[:2])
        for M in batches:
            x = stand.random(M, K)
            what = f"INT4 FFN {N} x {K}, {M} rows"
            require_close(ffn(x, folded), _exact_ffn(x, folded), what, CHAIN_LIMIT)
            calls: dict[str, Calls] = {
                "pq": [partial(ffn, x, folded)],
                stand.plain: [partial(_ffn_plain, x, both, full[2])],
            }
            spreads, moved = (
                stand.clock(calls),
                2 * x.nbytes + sum(w.packed.nbytes + w.scale.nbytes for w in plain),
            )
            yield stand.row(
                "FFN", f"{N}x{K}", M, N * K, spreads.pop("pq"), moved, 6 * M * N * K, spreads
            )


def ffn(x: Tensor, weights: Sequence[Weight]) -> Tensor:
    """down(silu(gate(x)) ⊙ up(x)) with folded weights gate, up and down."""
    gate, up, down = weights
    codes, scale = fp8.quantize_tokens(x, group_size=GROUP_SIZE)
    hidden = int4.multiply_gated_codes(codes, scale, gate, up, dtype=x.dtype)
    codes, scale = fp8.quantize_tokens(hidden, group_size=GROUP_SIZE)
    return int4.multiply_codes(codes, scale, down, dtype=x.dtype)


def gated_plain(x: Tensor, both: Tensor) -> Tensor:
    """silu(x Wgᵀ) ⊙ x Wuᵀ, the weights one below the other."""
    gate, up = F.linear(x, both).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _ffn_plain(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    return F.linear(gated_plain(x, both), down)


def exact_product(x: Tensor, weight: Weight, fp8: bool = True) -> Tensor:
    """x Wᵀ in float64, x rounded to E4M3 or not."""
    rounded = quantize_activations(x) if fp8 else x
    return rounded.double() @ weight.decode().double().T


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, in float64 but for transformers' roundings to x's dtype
    before and after the weight."""
    return weight * F.rms_norm(x.double(), weight.shape, eps=eps).to(x.dtype)


def _exact(x: Tensor, weight: Weight, kind: Kind) -> Tensor:
    return exact_product(x, weight, kind != "W4A16")


def _exact_ffn(x: Tensor, weights: Sequence[Weight]) -> Tensor:
    gate, up, down = weights
    hidden = F.silu(exact_product(x, gate)).mul_(exact_product(x, up)).to(x.dtype)
    return exact_product(hidden, down)


def _kinds(stand: Stand, weight: Weight) -> dict[Kind, list[Weight]]:
    # Copies that take turns: folded, and as they are for the other two.
    packed, folded = clones(stand, weight.packed), int4.fold(weight)
    plain = [weight._replace(packed=codes) for codes in packed]
    return {
        "folded": [folded._replace(packed=codes) for codes in packed],
        "exact": plain,
        "W4A16": plain,
    }


def _kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind in name)


def _products(kind: Kind, weights: Sequence[Weight], x: Tensor) -> list[Callable[[], Tensor]]:
    if kind == "W4A16":
        return [partial(int4.multiply, x, w, fp8_activations=False) for w in weights]
    codes, scale = fp8.quantize_tokens(x, group_size=GROUP_SIZE, variant=kind)
    return [
        partial(int4.multiply_codes, codes, scale, w, variant=kind, dtype=x.dtype) for w in weights
    ]


def _fronts(
    kind: Kind, gates: Sequence[Weight], ups: Sequence[Weight], x: Tensor
) -> list[Callable[[], Tensor]]:
    pairs = list(zip(gates, ups, strict=True))
    if kind == "W4A16":
        return [partial(int4.multiply_gated, x, *pair, fp8_activations=False) for pair in pairs]
    codes, scale = fp8.quantize_tokens(x, group_size=GROUP_SIZE, variant=kind)
    return [
        partial(int4.multiply_gated_codes, codes, scale, *pair, variant=kind, dtype=x.dtype)
        for pair in pairs
    ]


def _rows(
    stand: Stand,
    ours: Products,
    others: Mapping[str, Calls],
    shape: str,
    M: int,
    sizes: Shape,
    weights: int,
) -> Iterator[Row]:
    (N, K), spreads = sizes, stand.clock({**ours, **others})
    facts = {name: spreads[name] for name in others}
    for name in ours:
        fp8, codes = "W4A16" not in name, name not in ("W4A16", "gated W4A16", "folded from x")
        moved = int4.bytes_moved(M, N, K, GROUP_SIZE, stand.dtype.itemsize, codes, weights)
        precision, flops = "fp8" if fp8 else stand.plain, 2 * weights * M * N * K
        yield stand.row(
            name, shape, M, weights * N * K, spreads[name], moved, flops, facts, precision
        )


def _round_plain(x: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    return row_codes(x if norm is None else F.rms_norm(x, norm.shape, norm, _EPS))


def _require_rounded(
    codes: Tensor, scale: Tensor, x: Tensor, norm: Tensor | None, what: str
) -> None:
    if norm is not None:
        x = exact_norm(x, norm, _EPS)
    order = operand_order(x.shape[1], GROUP_SIZE, True, x.device)
    found = torch.empty_like(x, dtype=torch.float32).index_copy_(
        1, order, codes.float() * scale[:, None]
    )
    require_close(found, quantize_activations(x), what, _ROUNDING_LIMIT)
