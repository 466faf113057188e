"""What rounding keys and values costs, and the maps that are fitted to it."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.kv4 import KvScheme, fake_quantize
from quantize.kernels.attention.reference import attend
from quantize.methods.fireq.kv_affine import (
    Fit,
    _maps,
    affine_error,
    chosen,
    fitted,
    on_the_grid,
    pressures,
)
from quantize.methods.fireq.kv_search import Sample, output_error
from quantize.model.attention import KvNumerics

H, HKV, T, D = 4, 2, 24, 16
NUMERICS = KvNumerics(KvScheme(symmetric=False), affine=True)


def sample(B: int = 2, constant: float = 3.0) -> Sample:
    q = torch.randn(B, H, T, D)
    k, v = (torch.randn(B, HKV, T, D) + constant * torch.randn(HKV, 1, D) for _ in range(2))
    return Sample.of(q, k, v, None, D**-0.5)


def gram() -> Tensor:
    W = torch.randn(H, 2 * D, D)
    return W.mT @ W


def test_pressure_foretells_what_noise_costs():
    """Small noise in one token's key, or value: to first order."""
    s, G = sample(), gram()
    of_keys, of_values = pressures([s], G)
    for pressure, name in ((of_keys, "k"), (of_values, "v")):
        cost = torch.zeros(2, HKV)
        for _ in range(200):
            noise = 1e-2 * torch.randn(2, HKV, T, D)
            k, v = (s.k + noise, s.v) if name == "k" else (s.k, s.v + noise)
            delta = (attend(s.q, k, v, None, s.scaling, False) - s.exact) / 1e-2
            cost += torch.einsum("bhtd,hde,bhte->bh", delta, G, delta).view(2, HKV, -1).sum(2) / 200
        seen = pressure.form.diagonal(dim1=1, dim2=2).sum(1)
        weight = pressure.tokens[0].sum(2)
        # The form is the sum over all tokens; w shares it out among them.
        told = weight * seen / weight.sum(0) * (s.scaling**2 if name == "k" else 1)
        assert torch.allclose(told.sum(0), cost.sum(0), rtol=0.35)


def test_maps_are_better_where_they_were_not_fitted():
    found = chosen([sample(B=4)], gram(), NUMERICS, values=True, scaled_values=True)
    assert (found.after <= found.before).all()
    assert found.after.sum() < 0.5 * found.before.sum()
    left = chosen([sample(B=4)], gram(), NUMERICS, values=False, scaled_values=False)
    assert (left.over == 1).all()
    assert (left.maps.value_shift == 0).all()
    assert (left.after <= left.before).all()


def test_no_map_costs_what_the_scales_search_says():
    s, G = sample(), gram()
    none = Fit.none(s.k)
    one = torch.ones(HKV, D)
    found = affine_error([s], *_maps(none, none), G, NUMERICS)
    assert torch.allclose(found, output_error([s], one, one, G, NUMERICS), rtol=1e-4)


def test_rotations_stay_rotations():
    s = sample()
    of_keys, _ = pressures([s], gram())
    fit = fitted([s.k], of_keys, D)
    assert torch.allclose(fit.rotation @ fit.rotation.mT, torch.eye(D).expand(HKV, D, D), atol=1e-5)
    assert torch.allclose(fit.scale.log().mean(1), torch.zeros(HKV), atol=1e-4)
    unscaled = fitted([s.k], of_keys, D, scales=False)
    assert (unscaled.scale == 1).all()


def test_a_first_token_that_is_always_the_same_gets_onto_the_grid():
    s = sample()
    assert on_the_grid([s], *_maps(Fit.none(s.k), Fit.none(s.k)), NUMERICS) is None
    k, v = s.k.clone(), s.v.clone()
    k[:, :, 0], v[:, :, 0] = k[0, :, 0], v[0, :, 0]
    s = Sample.of(s.q, k, v, None, s.scaling)
    of_keys, of_values = pressures([s], gram())
    maps, over = _maps(fitted([k], of_keys, D), fitted([v], of_values, D))
    moved = on_the_grid([s], maps, over, NUMERICS)
    assert moved is not None
    for before, after in (
        (maps.keys(k), moved.keys(k)),
        (maps.values(v / over[:, None]), moved.values(v / over[:, None])),
    ):
        error = [(fake_quantize(x, NUMERICS.scheme) - x)[:, :, 0].norm() for x in (before, after)]
        assert error[1] < 0.2 * error[0]
