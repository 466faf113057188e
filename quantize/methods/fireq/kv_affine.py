"""Shifts, scales and rotations of keys and values, fitted to what rounding them costs behind o_proj.

Rounding a token's states within a group of channels adds noise to each of them whose power grows with the
square of their range. A key's noise moves the scores of every query, a value's the output itself. To
first order attention's output behind o_proj errs by Σ_i w_i · range_i² · Σ_c form_c, with a weight w_i of
each token, and form the power with which a channel of the noise is seen, by queries or by o_proj
(`Pressure`). The map x → ((x − μ)·A) R changes the range of tokens, and the form to
diag(Rᵀ A⁻¹ F A⁻¹ R): its parameters descend the gradient of the product.

A shift costs nothing on the other side, a scale and a rotation are undone by the inverse. Hadamard
matrices alone (QuaRot, arXiv 2404.00456) take a third less off than rotations that are learned from there,
as in SpinQuant (arXiv 2405.16406), which learns them by the whole model's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import fake_quantize
from quantize.kernels.attention.affine import Affine
from quantize.kernels.attention.reference import SCORES, attend
from quantize.methods.fireq.kv_search import Sample, first_of, output_power, quarter
from quantize.model.attention import KvNumerics
from quantize.model.hadamard import hadamard_matrix
from quantize.threads import side_by_side

_STEPS = 150
_RATE = 0.03
"""Of shifts, in standard deviations, and of scales' logarithms; rotations turn a third as fast. Errors
settle within the steps."""
_ROWS = 128
"""Queries at once."""


@dataclass(frozen=True)
class Pressure:
    """What rounding errors of keys, or of values, cost behind o_proj."""

    tokens: list[Tensor]  # [B, Hkv, T] of each sample: w
    form: Tensor  # [Hkv, d, d]: F


def pressures(samples: Sequence[Sample], gram: Tensor) -> tuple[Pressure, Pressure]:
    """Those of keys and of values. gram: Wᵀ W [H, d, d] of o_proj's columns for each query head.

    An error δ of the score of token i moves a query's output o by p_i δ (v_i − o).
    """
    Hkv, d = samples[0].k.shape[1], samples[0].k.shape[3]
    R = len(gram) // Hkv
    forms = torch.zeros(2, Hkv, d, d, device=gram.device)
    keys, values = [], []
    for s in samples:
        B, _, T, _ = s.q.shape
        L = s.k.shape[2]
        key_weight, value_weight = torch.zeros(2, B, Hkv, L, device=gram.device)
        rows = min(_ROWS, max(1, SCORES // (R * L)))
        for b in range(B):
            for h in range(Hkv):
                k, v, G = s.k[b, h], s.v[b, h], gram[h * R : (h + 1) * R]
                seen = v @ G  # [R, L, d]
                size = (seen * v).sum(dim=-1)
                for first in range(0, T, rows):
                    part = slice(first, min(first + rows, T))
                    q, o = s.q[b, h * R : (h + 1) * R, part], s.exact[b, h * R : (h + 1) * R, part]
                    squared = _shares(q @ k.mT * s.scaling, s.mask, b, h, R, part).square()
                    apart = size[:, None] + ((o @ G) * o).sum(dim=-1)[..., None]
                    moved = squared * (apart - 2 * o @ seen.mT).clamp_min(0)
                    key_weight[b, h] += moved.sum(dim=(0, 1))
                    value_weight[b, h] += squared.sum(dim=(0, 1))
                    weighted = q * moved.sum(dim=-1, keepdim=True)
                    forms[0, h] += torch.einsum("rtd,rte->de", weighted, q)
                    forms[1, h] += (squared.sum(dim=(1, 2))[:, None, None] * G).sum(dim=0)
        keys.append(key_weight)
        values.append(value_weight)
    return Pressure(keys, forms[0]), Pressure(values, forms[1])


def _shares(scores: Tensor, mask: Tensor | None, b: int, h: int, R: int, part: slice) -> Tensor:
    """Probabilities of scores [R, rows, L] of the query heads of key head h."""
    L = scores.shape[2]
    if mask is None:
        place = torch.arange(part.start, part.stop, device=scores.device)
        allowed = torch.arange(L, device=scores.device) <= place[:, None]
    else:
        heads = slice(h * R, (h + 1) * R) if mask.shape[1] > 1 else slice(None)
        allowed = mask[b if len(mask) > 1 else 0, heads, part]
    if allowed.dtype == torch.bool:
        allowed = torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(~allowed, -torch.inf)
    scores = scores + allowed
    return scores.softmax(dim=-1).nan_to_num(nan=0.0)  # a row of padding sees nothing


@dataclass(frozen=True)
class Fit:
    """x → ((x − shift)·scale) rotation, for each key head."""

    shift: Tensor  # [Hkv, d]
    scale: Tensor  # [Hkv, d], its geometric mean over a head 1
    rotation: Tensor  # [Hkv, d, d]

    @classmethod
    def none(cls, like: Tensor) -> Fit:
        """The map that changes nothing, for heads like states [B, Hkv, T, d]."""
        Hkv, d = like.shape[1], like.shape[3]
        one = torch.ones(Hkv, d, device=like.device)
        return cls(torch.zeros_like(one), one, torch.eye(d, device=like.device).repeat(Hkv, 1, 1))


def fitted(states: Sequence[Tensor], pressure: Pressure, group: int, scales: bool = True) -> Fit:
    """The map of states [B, Hkv, T, d] under which rounding groups of channels costs least.

    scales: whether channels may be scaled. Starts from a Hadamard matrix, the mean, and scales that would
    be right for noise in proportion to a token's length (`kv_search.key_balance`).
    """
    x = torch.cat([s.transpose(0, 1).flatten(1, 2) for s in states], dim=1)
    w = torch.cat([t.transpose(0, 1).flatten(1) for t in pressure.tokens], dim=1)
    w = w / w.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    trace = pressure.form.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    form = pressure.form / trace.clamp_min(torch.finfo(torch.float32).tiny)
    Hkv, _, d = x.shape
    middle = x.mean(dim=1)
    around = (x - middle[:, None]).square().mean(dim=1)
    unit = around.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    balance = quarter(form.diagonal(dim1=1, dim2=2), around).log()
    with torch.enable_grad():
        shift = (middle / unit).requires_grad_()
        log = (balance if scales else torch.zeros_like(balance)).requires_grad_(scales)
        turn = _start(d).to(x).repeat(Hkv, 1, 1).requires_grad_()
        groups = [{"params": [p], "lr": rate} for p, rate in
                  ((shift, _RATE), (log, _RATE), (turn, _RATE / 3)) if p.requires_grad]  # fmt: skip
        descent = torch.optim.Adam(groups)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(descent, _STEPS)
        for _ in range(_STEPS):
            centred = (x - (shift * unit)[:, None]) * log.exp()[:, None]
            rotation = torch.linalg.qr(turn)[0]
            parts = (centred @ rotation).unflatten(2, (-1, group))
            span = parts.amax(dim=-1).clamp_min(0) - parts.amin(dim=-1).clamp_max(0)
            inner = form * (-log).exp()[:, :, None] * (-log).exp()[:, None]
            seen = ((inner @ rotation) * rotation).sum(dim=1).unflatten(1, (-1, group)).sum(dim=-1)
            cost = ((span.square() * w[..., None]).sum(dim=1) * seen).sum(dim=1)
            descent.zero_grad()
            cost.clamp_min(torch.finfo(torch.float32).tiny).log().sum().backward()
            descent.step()
            slower.step()
    log = log.detach()
    scale = (log - log.mean(dim=1, keepdim=True)).exp()
    return Fit((shift * unit).detach(), scale, torch.linalg.qr(turn.detach())[0])


def _start(d: int) -> Tensor:
    """An orthogonal matrix [d, d] that spreads every channel over all: a Hadamard matrix with its
    rows' signs at random, or where there is none of that size, a random one."""
    draw = torch.Generator().manual_seed(0)
    try:
        signs = torch.randint(0, 2, (d, 1), generator=draw) * 2 - 1
        start = (signs * hadamard_matrix(d)).float()
    except ValueError:
        start = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
    return start


def affine_error(
    samples: Sequence[Sample], maps: Affine, over: Tensor, gram: Tensor, numerics: KvNumerics
) -> Tensor:
    """As `kv_search.output_error`, under `maps`, whose values are those over λ [Hkv, d] (`over`)."""
    Hkv = len(over)
    R = len(gram) // Hkv
    total = torch.zeros(Hkv, dtype=torch.float64)
    for s in samples:
        q = maps.queries(s.q)
        q = quantize_activations(q) if numerics.fp8_query else q
        k = fake_quantize(maps.keys(s.k), numerics.scheme)
        v = fake_quantize(maps.values(s.v / over[:, None]), numerics.scheme)
        mixed = attend(q, k, v, s.mask, s.scaling, numerics.fp8_probabilities)
        mixed = maps.output(mixed, torch.float32) * over.repeat_interleave(R, dim=0)[:, None]
        delta = mixed - s.exact
        per_head = torch.einsum("bhtd,hde,bhte->h", delta, gram, delta)
        total += per_head.double().cpu().view(Hkv, R).sum(dim=1)
    return total


def on_the_grid(
    samples: Sequence[Sample], maps: Affine, over: Tensor, numerics: KvNumerics
) -> Affine | None:
    """`maps` with shifts by which the first token's keys and values have no rounding error; None
    where windows do not begin alike.

    Those of BOS are the same in every sequence, and all later tokens look at them.
    """
    key, value = first_of([s.k for s in samples]), first_of([s.v / over[:, None] for s in samples])
    if key is None or value is None:
        return None
    stored = maps.keys(key[:, None])
    error = fake_quantize(stored, numerics.scheme) - stored
    key_shift = maps.key_shift - (error @ maps.key_rotation.mT)[:, 0] / maps.scale
    stored = maps.values(value[:, None])
    error = fake_quantize(stored, numerics.scheme) - stored
    value_shift = maps.value_shift - (error @ maps.value_rotation.mT)[:, 0]
    return Affine(maps.scale, key_shift, maps.key_rotation, value_shift, maps.value_rotation)


@dataclass(frozen=True)
class Choice:
    """The maps of an attention module."""

    maps: Affine
    over: Tensor  # [Hkv, d]: λ, by which values are divided before, to be folded
    before: Tensor  # [Hkv]: `affine_error` without any map
    after: Tensor  # [Hkv]
    power: float
    """Of the exact output, on the tokens of these errors."""


def chosen(
    samples: Sequence[Sample], gram: Tensor, numerics: KvNumerics, values: bool, scaled_values: bool
) -> Choice:
    """Fit maps to every other window, and take those under which the others err less, for each head.

    values: whether values may have a map at all; scaled_values: whether their channels may be scaled.
    """
    windows = [one for s in samples for one in s.windows()]
    fit, judge = windows[0::2], windows[1::2] or windows
    group = numerics.scheme.group(samples[0].k.shape[3])
    of_keys, of_values = pressures(fit, gram)
    none = Fit.none(samples[0].k)
    before = affine_error(judge, *_maps(none, none), gram, numerics)
    power = float(output_power(judge, gram, len(before)).sum())
    found = Choice(*_maps(none, none), before, before, power)

    def consider(maps: Affine, over: Tensor) -> None:
        nonlocal found
        error = affine_error(judge, maps, over, gram, numerics)
        better = error < found.after
        rows = better.to(over.device)
        held = {
            f.name: _rows(rows, getattr(maps, f.name), getattr(found.maps, f.name))
            for f in fields(Affine)
        }
        after = torch.where(better, error, found.after)
        found = replace(found, maps=Affine(**held), over=_rows(rows, over, found.over), after=after)

    key_fit, value_fit = side_by_side(
        [
            lambda: fitted([s.k for s in fit], of_keys, group),
            lambda: fitted([s.v for s in fit], of_values, group, scaled_values) if values else none,
        ],
        *(s.k for s in fit),
    )
    for key, value in ((none, value_fit), (key_fit, none), (key_fit, value_fit)):
        consider(*_maps(key, value))
    if (moved := on_the_grid(judge, found.maps, found.over, numerics)) is not None:
        consider(moved, found.over)
    return found


def _maps(key: Fit, value: Fit) -> tuple[Affine, Tensor]:
    """Both as they are applied: a value's scale is folded, and its shift is that of scaled values."""
    shift = value.shift * value.scale
    return Affine(key.scale, key.shift, key.rotation, shift, value.rotation), 1 / value.scale


def _rows(chosen: Tensor, this: Tensor, that: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (this.ndim - 1)), this, that)
