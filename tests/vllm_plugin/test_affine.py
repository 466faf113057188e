"""Shifts and rotations of keys and values in vLLM's attention layer, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantize.formats.kv4 import KvNumerics, KvScheme
from quantize.model.attention import KvAttention

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_read_as_the_native_loader_reads_records(dtype: torch.dtype):
    from quantize.vllm.attention import Int4Attention

    T, H, Hkv, d, size = 11, 4, 2, 64, 16
    numerics = KvNumerics(KvScheme(symmetric=False), affine=True)
    kv = KvAttention(numerics, Hkv, d)
    kv.scale.copy_(torch.rand(Hkv, d) + 0.5)
    kv.key_shift.copy_(5 * torch.randn(Hkv, d))
    kv.value_shift.copy_(5 * torch.randn(Hkv, d))
    kv.key_rotation.copy_(torch.linalg.qr(torch.randn(Hkv, d, d))[0])
    kv.value_rotation.copy_(torch.linalg.qr(torch.randn(Hkv, d, d))[0])
    q = torch.randn(T, H, d).to(dtype)
    k, v = (torch.randn(T, Hkv, d).to(dtype) + c.to(dtype) for c in (kv.key_shift, kv.value_shift))

    impl = Int4Attention()
    impl.numerics, impl.scale, impl.sliding_window = numerics, d**-0.5, -1
    layer = SimpleNamespace(**{f"pq_{name}": tensor for name, tensor in kv.named_buffers()})
    pages = torch.zeros(2, Hkv, size, 2 * numerics.scheme.record_bytes(d), dtype=torch.uint8)
    impl.do_kv_cache_update(layer, k, v, pages, size + torch.arange(T))
    facts = SimpleNamespace(
        num_actual_tokens=T, block_table=torch.tensor([[1]]), query_start_loc=torch.tensor([0, T]),
        seq_lens=torch.tensor([T]), max_query_len=T, max_seq_len=T,
    )  # fmt: skip
    padded = torch.full((T + 3, H, d), 9.0, dtype=dtype)
    found = impl.forward(layer, torch.cat((q, q[:3])), k, v, pages, facts, padded)
    wanted = kv(*(x.transpose(0, 1)[None] for x in (q, k, v)), None, d**-0.5)[0].transpose(0, 1)
    assert found is padded
    assert torch.allclose(
        found[:T].float(), wanted.float(), atol=1e-4 if dtype == torch.float32 else 0.05
    )
    assert (found[T:] == 9).all()
