"""How far a correction is taken: what left-out windows say of it, without a second fit."""

import pytest
import torch
from torch import Tensor

from quantize.solvers.feedback import Damped, damp, feedback_order
from quantize.solvers.target import LeftOut, Windows, corrected_target

N, K, TOKENS, KEPT, DAMPING = 6, 48, 640, 128, 0.05


def drifted(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x̂ [T, K], what is wanted of them t [T, N], and the weight, in float64; the second half of the
    weight's rows is off, beside noise that no input explains."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, K, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(N, K, generator=generator, dtype=torch.float64)
    right = w + 0.05 * torch.randn(N, K, generator=generator, dtype=torch.float64)
    size = (x @ w.T).std()
    t = x @ right.T + noise * size * torch.randn(
        TOKENS, N, generator=generator, dtype=torch.float64
    )
    return x, t, w


def usable(hessian: Tensor) -> Damped:
    found = damp(hessian.float(), DAMPING, feedback_order(hessian.float(), "activation"))
    assert found is not None
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("by_parent", [False, True])
def test_the_share_is_that_of_a_fit_without_the_windows(noise: float, by_parent: bool):
    x, t, w = drifted(noise, 3)
    if by_parent:  # what is wanted is W x of the parent's inputs x
        parent = torch.linalg.lstsq(w, t.T).solution.T
    hessian = x.T @ x / TOKENS
    ridge = DAMPING * float(hessian.diagonal().mean()) * TOKENS * torch.eye(K, dtype=x.dtype)
    rest = slice(KEPT, None)
    lacking = t - x @ w.T
    fit = torch.linalg.solve(x[rest].T @ x[rest] + ridge, x[rest].T @ lacking[rest]).T
    predicted, kept = x[:KEPT] @ fit.T, lacking[:KEPT]
    expected = float(((predicted * kept).sum() / predicted.square().sum()).clamp(0, 1))
    if by_parent:
        known = hessian.float(), (parent.T @ x / TOKENS).float(), None
        windows = Windows(x[:KEPT].float(), parent[:KEPT].float(), None)
    else:
        known = hessian.float(), None, (t.T @ x / TOKENS).float()
        windows = Windows(x[:KEPT].float(), None, t[:KEPT].float())
    d = usable(hessian)
    target, share = corrected_target(w.float(), *known, d, LeftOut.of(windows, TOKENS, d))
    assert share == pytest.approx(expected, abs=2e-3)
    whole, all_of_it = corrected_target(w.float(), *known, d)
    assert all_of_it == 1
    assert torch.allclose(target, w.float() + share * (whole - w.float()), atol=1e-5)


def test_noise_is_not_followed_and_drift_is():
    shares = {}
    for noise in (0.0, 3.0):
        x, t, w = drifted(noise, 4)
        hessian = x.T @ x / TOKENS
        windows = Windows(x[:KEPT].float(), None, t[:KEPT].float())
        known = hessian.float(), None, (t.T @ x / TOKENS).float()
        d = usable(hessian)
        left_out = LeftOut.of(windows, TOKENS, d)
        shares[noise] = corrected_target(w.float(), *known, d, left_out)[1]
    assert shares[0.0] > 0.95
    assert shares[3.0] < 0.35


def test_a_token_alone_in_its_direction_takes_nothing_off():
    x, t, w = drifted(0.1, 5)
    x[:, -1] = 0
    x[0, -1] = 1e6  # no other token has this input
    hessian = x.T @ x / TOKENS
    known = hessian.float(), None, (t.T @ x / TOKENS).float()
    windows = Windows(x[:KEPT].float(), None, t[:KEPT].float())
    d = usable(hessian)
    _, share = corrected_target(w.float(), *known, d, LeftOut.of(windows, TOKENS, d))
    assert 0 <= share <= 1


def test_one_factor_serves_all_linears_of_an_input():
    x, _, w = drifted(0.3, 6)
    hessian = (x.T @ x / TOKENS).float()
    parent = x + 0.1 * x.flip(0)
    windows = Windows(x[:KEPT].float(), parent[:KEPT].float(), None)
    known = hessian, (parent.T @ x / TOKENS).float(), None
    d = usable(hessian)
    shared = LeftOut.of(windows, TOKENS, d)
    for rows in (w[:2].float(), w[2:].float()):
        target, share = corrected_target(rows, *known, d, shared)
        alone, share_alone = corrected_target(rows, *known, d, LeftOut.of(windows, TOKENS, d))
        assert torch.equal(target, alone)
        assert share == share_alone


def test_solving_is_a_product_with_the_damped_inverse() -> None:
    draw = torch.Generator().manual_seed(11)
    x = torch.randn(500, 96, generator=draw) @ torch.randn(96, 96, generator=draw)
    hessian = x.T @ x / len(x)
    rows = torch.randn(40, 96, generator=draw)
    for damping in (0.0, 0.05):
        usable = damp(hessian, damping, feedback_order(hessian, "activation"))
        assert usable is not None
        damped = hessian.double()
        damped.diagonal().add_(damping * damped.diagonal().mean())
        expected = rows.double() @ torch.linalg.inv(damped)
        found = usable.solve_(rows.clone()).double()
        assert float((found - expected).norm() / expected.norm()) < 1e-4
