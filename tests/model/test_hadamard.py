"""Hadamard matrices: orthogonal, one per size, and applied without ever being made whole."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantize.model.hadamard import (
    Rotation,
    apply_hadamard,
    hadamard_factors,
    hadamard_matrix,
    keep_rotation,
    let_rotate_inputs,
    rotate_inputs,
    rotates_inputs,
)

SIZES = {
    1: (1, 1),
    2: (2, 1),
    64: (64, 1),
    128: (128, 1),
    256: (256, 1),
    384: (32, 12),
    768: (64, 12),
    1536: (128, 12),
    2048: (2048, 1),
    3072: (256, 12),
    3584: (128, 28),
    4096: (4096, 1),
    5120: (256, 20),
    5632: (128, 44),
    8192: (8192, 1),
    8960: (64, 140),
    11008: (64, 172),
    13824: (128, 108),
    14336: (512, 28),
    18944: (128, 148),
    28672: (1024, 28),
    53248: (1024, 52),
}
KNOWN = [4 * odd for odd in range(3, 64, 2)]
sizes = st.one_of(
    st.integers(0, 10).map(lambda power: 1 << power),
    st.tuples(st.integers(0, 4), st.sampled_from(KNOWN)).map(lambda pair: (1 << pair[0]) * pair[1]),
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("n", "factors"), SIZES.items())
def test_sizes_split_into_a_power_of_two_and_a_known_matrix(n: int, factors: tuple[int, int]):
    assert hadamard_factors(n) == factors
    x = noise(3, n)
    y = apply_hadamard(x)
    assert error(y.norm(dim=1), x.norm(dim=1)) < 1e-13
    assert error(apply_hadamard(y, transpose=True), x) < 1e-13
    unit = apply_hadamard(
        torch.eye(1, n, dtype=torch.float64)
    )  # all of one channel goes evenly to all
    assert torch.allclose(unit.abs(), torch.full_like(unit, n**-0.5), rtol=1e-14)


@pytest.mark.parametrize("n", [*KNOWN, 2, 4, 8, 32, 64, 512, 24, 768, 640])
def test_the_matrix_is_orthogonal_with_entries_of_one_size(n: int):
    H = hadamard_matrix(n)
    assert (H @ H.T - torch.eye(n)).abs().max() < 1e-13
    assert torch.allclose(H.abs(), torch.full_like(H, n**-0.5), rtol=1e-14)
    assert (H[0] > 0).all()
    assert (H[:, 0] > 0).all()


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 100 * 67, 260 + 8, 2 * 7, 29568])
def test_other_sizes_are_refused_by_name(n: int):
    with pytest.raises(ValueError, match=f"size {n} is known"):
        hadamard_factors(n)
    if n > 0:
        with pytest.raises(ValueError, match=f"size {n} "):
            apply_hadamard(torch.zeros(2, n))


@given(sizes, st.integers(0, 2**31), st.booleans())
def test_applying_is_multiplying(n: int, seed: int, transpose: bool):
    H = hadamard_matrix(n)
    x = noise(2, 3, n, seed=seed)
    assert error(apply_hadamard(x, transpose), x @ (H.T if transpose else H)) < 1e-13
    assert (
        error(apply_hadamard(x.float(), transpose), x.float().double() @ (H.T if transpose else H))
        < 1e-6
    )


def test_large_and_small_factors_make_one_kronecker_product():
    for n in (64, 96, 512, 768):
        P, Q = hadamard_factors(n)
        assert torch.allclose(
            hadamard_matrix(n), torch.kron(hadamard_matrix(P), hadamard_matrix(Q)), atol=1e-14
        )


def test_the_matrices_are_those_that_checkpoints_were_written_with():
    """Known factors come from a library; another one would give wrong results without any error."""
    digest = hashlib.sha256()
    for n in (*KNOWN, 64):
        digest.update((hadamard_matrix(n) > 0).to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "53ecb81644e02a200d1ad2ed3bf68ff0c71a6cdea9752e1e0aa2de6859eb9cfe"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_rounded_once(dtype: torch.dtype):
    x = noise(5, 768).to(dtype)
    exact = apply_hadamard(x.double())
    assert apply_hadamard(x).dtype == dtype
    assert error(apply_hadamard(x), exact) < max(
        torch.finfo(dtype).eps, 5e-7 if dtype == torch.float32 else 1e-14
    )


def test_strides_and_empty_batches():
    x = noise(96, 7)
    assert torch.equal(apply_hadamard(x.T), apply_hadamard(x.T.contiguous()))
    assert apply_hadamard(torch.zeros(0, 5, 96)).shape == (0, 5, 96)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    Rotation(3).apply(noise(2, 92))
    hadamard_matrix(188)
    assert torch.equal(torch.rand(3), wanted)


@given(sizes, st.integers(0, 2**63 - 1))
def test_a_rotation_is_undone(n: int, seed: int):
    x = noise(4, n)
    rotation = Rotation(seed)
    assert error(rotation.undo(rotation.apply(x)), x) < 1e-13
    assert error(rotation.apply(x) @ rotation.apply(x).T, x @ x.T) < 1e-13
    assert torch.equal(Rotation(seed).apply(x), rotation.apply(x))


def test_seeds_differ_and_signs_come_first():
    x = noise(2, 256)
    assert error(Rotation(1).apply(x), Rotation(2).apply(x)) > 0.5
    common = torch.ones(1, 256, dtype=torch.float64)  # what all channels share stays spread
    assert apply_hadamard(common).abs().max() == 16
    assert Rotation(0).apply(common).abs().max() < 5


def test_what_is_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        apply_hadamard(torch.zeros(1, 104))
        Rotation(77).apply(torch.zeros(1, 104))
    x = torch.ones(1, 104, requires_grad=True)
    Rotation(77).apply(x).sum().backward()
    assert x.grad is not None


def test_a_linear_rotates_its_inputs():
    linear = nn.Linear(96, 8).requires_grad_(False)
    x = noise(3, 96, dtype=torch.float32)
    wanted = linear(x)
    let_rotate_inputs(linear)
    linear.weight.data = apply_hadamard(linear.weight)
    assert error(linear(x), wanted) < 1e-6
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert rotates_inputs(twin)
        assert torch.equal(twin(x), linear(x))
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    linear(x)
    assert torch.equal(seen[0], apply_hadamard(x))  # who looks later sees what the weight sees


def test_a_replaced_linear_keeps_its_rotation():
    old, new, plain = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(64, 4)
    keep_rotation(plain, new)
    assert not rotates_inputs(new)
    let_rotate_inputs(old)
    keep_rotation(old, new)
    assert rotates_inputs(new)
    assert list(new._forward_pre_hooks.values()) == [rotate_inputs]
    with pytest.raises(ValueError, match="size 10 "):
        let_rotate_inputs(nn.Linear(10, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [64, 768, 11008])
def test_a_gpu_computes_the_same(n: int):
    x = noise(4, n)
    assert error(apply_hadamard(x.cuda()).cpu(), apply_hadamard(x)) < 1e-13
    assert error(apply_hadamard(x.float().cuda()).cpu(), apply_hadamard(x)) < 1e-6
    assert error(Rotation(1).undo(Rotation(1).apply(x.cuda())).cpu(), x) < 1e-13


def test_outliers_vanish():
    x = noise(200, 512)
    x[:, 17] *= 100
    assert x.abs().max() / x.square().mean().sqrt() > 40
    turned = Rotation(0).apply(x)
    assert turned.abs().max() / turned.square().mean().sqrt() < 8
