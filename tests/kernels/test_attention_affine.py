"""Shifts and rotations of keys and values: attention is what it was, and the cache errs less."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.affine import Affine
from quantize.kernels.attention.api import quantize_records
from quantize.kernels.attention.reference import attend, read_reference
from quantize.model.attention import KvAttention, KvNumerics

H, HKV, D = 4, 2, 32
EXACT = KvNumerics(KvScheme(symmetric=False), fp8_query=False, fp8_probabilities=False, affine=True)


def states(T: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with large constants in every channel."""
    q = torch.randn(2, H, T, D)
    k, v = (torch.randn(2, HKV, T, D) + 8 * torch.randn(HKV, 1, D) for _ in range(2))
    return q, k, v


def turns() -> Tensor:
    return torch.linalg.qr(torch.randn(HKV, D, D))[0]


def module(k: Tensor, v: Tensor, numerics: KvNumerics = EXACT) -> KvAttention:
    """One that takes the means away."""
    kv = KvAttention(numerics, HKV, D)
    kv.scale.copy_((0.3 * torch.randn(HKV, D)).exp())
    kv.key_shift.copy_(k.mean((0, 2)))
    kv.value_shift.copy_(v.mean((0, 2)))
    kv.key_rotation.copy_(turns())
    kv.value_rotation.copy_(turns())
    return kv


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.double().repeat_interleave(H // HKV, 1) for x in (k, v))
    scores = (q.double() @ k.mT / math.sqrt(D)).masked_fill(
        ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]),
        -math.inf,
    )
    return scores.softmax(-1) @ v


def test_without_rounding_they_change_nothing():
    q, k, v = states()
    maps = module(k, v).affine(q.device)
    assert maps is not None
    stored = maps.queries(q), maps.keys(k), maps.values(v)
    found = maps.output(attend(*stored, None, D**-0.5, False), torch.float32)
    assert torch.allclose(found.double(), wanted(q, k, v), atol=2e-4)
    assert (stored[1] - k).norm() > 0.5 * k.norm()  # they do something


def test_neutral_ones_are_none_at_all():
    q, k, v = states()
    plain = KvAttention(KvNumerics(EXACT.scheme), HKV, D)
    assert [name for name, _ in plain.named_buffers()] == ["scale"]
    neutral = KvAttention(KvNumerics(EXACT.scheme, affine=True), HKV, D)
    out = neutral(q, k, v, None, 0.2)
    assert torch.allclose(out, plain(q, k, v, None, 0.2), atol=1e-6)


def test_constants_cost_nothing():
    """Shifted, keys and values are rounded by what is left of them, for every dtype that comes in."""
    q, k, v = states(T=64)
    exact = wanted(q, k, v)

    def error(kv: KvAttention, dtype: torch.dtype = torch.float32) -> float:
        found = kv(*(x.to(dtype) for x in (q, k, v)), None, D**-0.5)
        assert found.dtype == dtype
        return float((found.double() - exact).norm() / exact.norm())

    plain = error(KvAttention(KvNumerics(EXACT.scheme), HKV, D))
    kv = module(k, v)
    assert error(kv) < 0.3 * plain
    kv.value_shift.zero_()
    assert error(kv) > 2 * error(module(k, v))  # each of them counts


@pytest.mark.parametrize("T", [1, 7])
def test_stored_tokens_are_read_alike(T: int):
    """New tokens, their records, and what records give back."""
    q, k, v = states()
    kv = module(k, v, KvNumerics(EXACT.scheme, affine=True))
    q = q[:, :, -T:]
    mask = torch.ones(T, 9, dtype=torch.bool).tril(9 - T)[None, None]
    fresh = kv(q, k, v, mask, 0.2)
    records = quantize_records(*kv.entering(k, v), kv.scheme)
    assert torch.allclose(kv(q, *records, mask, 0.2), fresh, atol=1e-5)
    keys, values = (read_reference(x, kv.scheme, D) for x in records)
    keys.pq_stored = True  # type: ignore[attr-defined]
    assert torch.allclose(kv(q, keys, values, mask, 0.2), fresh, atol=1e-5)


def test_a_cast_leaves_them_as_they_are():
    _, k, v = states()
    kv = module(k, v)
    before = {name: tensor.clone() for name, tensor in kv.named_buffers()}
    kv.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kv.named_buffers())
    assert kv.is_like(kv)
    other = module(k, v)
    assert not kv.is_like(other)
    assert not kv.is_like(KvAttention(KvNumerics(EXACT.scheme), HKV, D))


def test_heads_lie_before_tokens_with_or_without_a_batch():
    """As an engine has them: [H, T, d]."""
    q, k, v = states()
    tensors = dict(module(k, v).named_buffers())
    maps = Affine.of(tensors["scale"], tensors)
    assert torch.allclose(maps.queries(q[0]), maps.queries(q)[0], atol=1e-5)
    assert torch.allclose(maps.output(q[0], q.dtype), maps.output(q, q.dtype)[0], atol=1e-5)
    assert torch.allclose(maps.keys(k[0]), maps.keys(k)[0], atol=1e-5)
