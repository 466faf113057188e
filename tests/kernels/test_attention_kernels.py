"""Attention on the INT4 cache and in FP8: in Triton's interpreter, on a GPU where there is one, and by torch alone.

The interpreter must be chosen before Triton is imported, so its tests run in a child process: this file, once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_samples import (
    ASYMMETRIC,
    SMALL,
    SYMMETRIC,
    UNEVEN,
    expected,
    held,
    padding,
    queries,
    seen_by,
    states,
)
from conftest import ModelMaker
from interpreted import GPU, INTERPRETED, needs_gpu, run_interpreted
from kv_models import in_pieces, kv_model, some_ids
from torch import Tensor
from transformers import Cache

from quantize.formats.kv4 import KvCodes, KvScheme, quantize
from quantize.kernels.attention.api import (
    append_records,
    attend_fp8,
    attend_records,
    quantize_fp8,
    quantize_records,
    takes,
)
from quantize.kernels.attention.reference import attend, read_reference, store_reference
from quantize.model.attention import KvAttention, KvNumerics
from quantize.serving.kv_cache import int4_cache

DEVICES = ["cpu"] if INTERPRETED else ["cpu", GPU]

# Of the output's norm: float32 outputs show that few queries weigh values with 11 bits, the others their own rounding
# (Triton's interpreter cuts bfloat16 off).
LIMITS = {torch.float32: 2**-11, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FLIPPED = (
    2**-5
)  # of the largest output: a probability at the border of two E4M3 numbers may become the other one
SUBNORMAL = 2**-13  # of the norm: tiny probabilities round finer against the maximum of a part
FP8_SUMS = (
    2**-7
)  # of the norm: scores that FP8 tensor cores add with 14 bits cross more of those borders


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(out: Tensor, wanted: Tensor, dtype: torch.dtype, fp8_sums: bool = False) -> None:
    assert (out.dtype, out.shape) == (dtype, wanted.shape)
    delta = out.double().cpu() - wanted
    limit = FP8_SUMS if fp8_sums and out.is_cuda else LIMITS[dtype]
    assert float(delta.norm() / wanted.norm()) <= limit
    assert float(delta.abs().max() / wanted.abs().max()) <= FLIPPED


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


# Records


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("scheme", "T", "d", "bad"),
    [
        (SYMMETRIC, 1, 64, math.nan),
        (SYMMETRIC, 17, 128, math.inf),
        (SYMMETRIC, 7, 256, -math.inf),
        (ASYMMETRIC, 16, 32, -math.inf),
        (ASYMMETRIC, 17, 80, math.nan),
        (SMALL, 5, 80, math.nan),
        (SMALL, 15, 96, math.inf),
        (UNEVEN, 17, 64, math.inf),
        (KvScheme(128, False, "e4m3"), 3, 256, -math.inf),
    ],
)
def test_records_are_those_of_the_format(scheme: KvScheme, T: int, d: int, bad: float, device: str):
    key, value, S = states(2, 2, T, d)
    for size, place in ((1e-42, 0), (1e-30, 1), (1e36, 2), (0.0, 3), (448.0, 4)):
        value[:, :, place:][:, :, :1] *= size
    value[0, 0, -1, 2], key[1, 0, -1, 1] = bad, -bad
    found = quantize_records(key.to(device), value.to(device), S.to(device), scheme)
    for records, x in zip(found, (key * S[:, None], value), strict=True):
        codes, wanted = KvCodes.from_records(records.cpu(), scheme, d), quantize(x, scheme)
        assert torch.equal(codes.packed, wanted.packed)
        broken = wanted.scale.float().isnan()
        assert int(broken.sum()) == 1
        assert torch.equal(
            codes.scale.float().isnan(), broken
        )  # the bits of NaN are the processor's choice
        differs = codes.scale.view(torch.uint8) != wanted.scale.view(torch.uint8)
        assert not bool(differs.unflatten(-1, (broken.shape[-1], -1)).any(-1)[~broken].any())
        assert (codes.zero is None) == scheme.symmetric
        assert codes.zero is None or torch.equal(codes.zero, wanted.zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_records_of_any_dtype_and_strides(dtype: torch.dtype, device: str):
    key, value, S = states(2, 2, 19, 64, dtype)
    wanted = store_reference(key, value, S, SYMMETRIC)
    crossed = key.transpose(1, 2).contiguous().transpose(1, 2), value.mT.contiguous().mT
    found = quantize_records(*(x.to(device) for x in crossed), S.to(device), SYMMETRIC)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "row"), [(SYMMETRIC, 48), (UNEVEN, 42)])
def test_tokens_are_written_in_place(scheme: KvScheme, row: int, device: str):
    key, value, S = (x.to(device) for x in states(2, 2, 18, 64))
    wanted = quantize_records(key, value, S, scheme)
    memory = [torch.full((2, 2, 40, row), 99, dtype=torch.uint8, device=device) for _ in range(2)]
    keys, values = (x[..., : wanted[0].shape[3]] for x in memory)
    append_records(key[:, :, :17], value[:, :, :17], S, scheme, keys, values, 3)
    append_records(
        key[:, :, 17:],
        value[:, :, 17:],
        S,
        scheme,
        keys,
        values,
        torch.tensor([20, 39], device=device),
    )
    for whole, records, new in zip(memory, (keys, values), wanted, strict=True):
        assert torch.equal(records[:, :, 3:20], new[:, :, :17])
        assert torch.equal(records[0, :, 20], new[0, :, 17])
        assert torch.equal(records[1, :, 39], new[1, :, 17])
        records[:, :, 3:20] = records[0, :, 20] = records[1, :, 39] = 99
        assert bool((whole == 99).all())


# Few queries


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("scheme", "d", "B", "H", "R", "T", "L", "dtype"),
    [
        (SYMMETRIC, 128, 1, 2, 4, 1, 1, torch.float32),
        (SYMMETRIC, 64, 2, 1, 8, 1, 63, torch.bfloat16),
        (SYMMETRIC, 128, 2, 2, 4, 1, 64, torch.float16),
        (SYMMETRIC, 256, 1, 1, 2, 2, 130, torch.float32),
        (ASYMMETRIC, 80, 1, 2, 1, 5, 65, torch.float32),
        (ASYMMETRIC, 128, 2, 1, 8, 3, 129, torch.float32),  # rows of 32
        (SMALL, 96, 1, 1, 2, 17, 70, torch.float32),  # rows of 64
        (SMALL, 32, 1, 2, 8, 8, 66, torch.float16),
        (UNEVEN, 64, 2, 2, 4, 4, 200, torch.float32),  # two groups
        (KvScheme(256), 256, 1, 1, 4, 1, 67, torch.float32),
    ],
)
def test_few_queries(
    scheme: KvScheme,
    d: int,
    B: int,
    H: int,
    R: int,
    T: int,
    L: int,
    dtype: torch.dtype,
    device: str,
):
    key, value, S = states(B, H, L, d)
    records = store_reference(key, value, S, scheme)
    query = queries(B, H * R, T, d, dtype)
    memory = [held(x, L + 70, x.shape[3] + 14, device)[:, :, :L] for x in records]
    out = attend_records(query.to(device), *memory, S.to(device), scheme, 0.1)
    k, v = (read_reference(x, scheme, d) for x in records)
    check(out, expected(query, k, v, S, 0.1, seen_by(T, L)), dtype)
    assert out.transpose(1, 2).is_contiguous()
    again = attend_records(query.to(device), *memory, S.to(device), scheme, 0.1)
    assert torch.equal(again, out)


VIEWS: list[dict[str, Any]] = [
    {"causal": False},
    {"window": 1},
    {"window": 64},
    {"window": 65, "mask": True},
    {"mask": True},
    {"causal": False, "mask": True},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize(("T", "R", "L"), [(3, 2, 150), (130, 1, 150)])
def test_what_queries_may_see(view: dict[str, Any], T: int, R: int, L: int, device: str):
    key, value, S = states(2, 1, L, 64)
    records, query = store_reference(key, value, S, SYMMETRIC), queries(2, R, T, 64)
    view = view | ({"mask": padding(2, L)} if "mask" in view else {})
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in view.items()}
    out = attend_records(
        query.to(device), *(x.to(device) for x in records), S.to(device), SYMMETRIC, 0.1, **moved
    )
    k, v = (read_reference(x, SYMMETRIC, 64) for x in records)
    check(out, expected(query, k, v, S, 0.1, seen_by(T, L, **view)), torch.float32, T > 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "R"), [(3, 2), (65, 1)])
def test_any_mask(T: int, R: int, device: str):
    key, value, S = states(2, 1, 70, 64)
    records, query = store_reference(key, value, S, SYMMETRIC), queries(2, R, T, 64)
    k, v = (read_reference(x, SYMMETRIC, 64) for x in records)
    every = torch.rand(2, 1, T, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    every[0, :, 1] = False  # a query that sees nothing
    out = attend_records(
        query.to(device),
        *(x.to(device) for x in records),
        S.to(device),
        SYMMETRIC,
        0.1,
        mask=every.to(device),
    )
    check(out, expected(query, k, v, S, 0.1, seen_by(T, 70, mask=every)), torch.float32, T > 64)
    assert not out[0, :, 1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("T", "R"), [(2, 4), (65, 1)])
def test_sequences_of_different_lengths(T: int, R: int, window: int | None, device: str):
    key, value, S = states(3, 2, 140, 64)
    query, lengths = queries(3, 2 * R, T, 64), [140, 66, 1]
    records = [x.to(device) for x in store_reference(key, value, S, SYMMETRIC)]
    for x in records:
        x[1, :, 66:] = x[2, :, 1:] = 255  # what holds no tokens yet
    there = torch.tensor(lengths, device=device)
    out = attend_records(
        query.to(device), *records, S.to(device), SYMMETRIC, 0.1, window=window, lengths=there
    )
    assert bool(out.isfinite().all())
    for b, length in enumerate(lengths):
        short = min(length, T)
        k, v = (read_reference(x[b : b + 1, :, :length].cpu(), SYMMETRIC, 64) for x in records)
        wanted = expected(
            query[b : b + 1, :, -short:], k, v, S, 0.1, seen_by(short, length, window=window)
        )
        check(out[b : b + 1, :, -short:], wanted, torch.float32, T > 64)
        assert not out[b, :, :-short].any()


# Many queries


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("scheme", "d", "B", "H", "R", "T", "L", "dtype"),
    [
        (SYMMETRIC, 128, 1, 1, 2, 65, 65, torch.float32),
        (SYMMETRIC, 128, 1, 1, 1, 129, 200, torch.bfloat16),
        (SYMMETRIC, 64, 2, 1, 2, 130, 130, torch.float32),
        (SYMMETRIC, 256, 1, 1, 1, 66, 70, torch.float32),
        (ASYMMETRIC, 80, 1, 1, 4, 17, 64, torch.float16),
        (SMALL, 96, 1, 2, 1, 127, 127, torch.float32),
        (UNEVEN, 64, 1, 1, 8, 9, 131, torch.float32),
        (KvScheme(16), 32, 1, 1, 2, 65, 65, torch.float32),
    ],
)
def test_many_queries(
    scheme: KvScheme,
    d: int,
    B: int,
    H: int,
    R: int,
    T: int,
    L: int,
    dtype: torch.dtype,
    device: str,
):
    key, value, S = states(B, H, L, d)
    query = queries(B, H * R, T, d, dtype)
    records = store_reference(key, value, S, scheme)
    out = attend_records(
        query.to(device), *(x.to(device) for x in records), S.to(device), scheme, 0.1
    )
    k, v = (read_reference(x, scheme, d) for x in records)
    check(out, expected(query, k, v, S, 0.1, seen_by(T, L)), dtype, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", [{}, {"window": 40}, {"mask": True}], ids=str)
@pytest.mark.parametrize(
    ("d", "R", "T", "L"), [(128, 2, 1, 3), (64, 1, 65, 130), (96, 1, 17, 64), (256, 1, 70, 70)]
)
def test_keys_and_values_in_fp8(d: int, R: int, T: int, L: int, view: dict[str, Any], device: str):
    key, value, S = states(2, 1, L, d)
    query, stored = queries(2, R, T, d), quantize_fp8(key, value, S)
    view = view | ({"mask": padding(2, L)} if "mask" in view else {})
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in view.items()}
    out = attend_fp8(query.to(device), *(x.to(device) for x in stored), S.to(device), 0.1, **moved)
    k, v = (
        stored[0].double() * stored[1][..., None],
        stored[2].double() * stored[3][..., None, None],
    )
    assert float((k - key * S[:, None]).norm() / k.norm()) < 0.04
    assert float((v - value).norm() / v.norm()) < 0.04
    check(out, expected(query, k, v, S, 0.1, seen_by(T, L, **view)), torch.float32, True)


# What holds them together


@pytest.mark.skipif(not INTERPRETED, reason="needs a kernel")
@pytest.mark.parametrize("window", [None, 90])
def test_parts_of_a_sequence_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch):
    from quantize.kernels.attention import launch as attention_launch

    key, value, S = states(1, 1, 400, 64)
    records, query = store_reference(key, value, S, SYMMETRIC), queries(1, 4, 2, 64)
    outs = []
    for parts in (1, 3, 99):
        monkeypatch.setattr(attention_launch, "_PER_PROCESSOR", parts)
        outs.append(attend_records(query, *records, S, SYMMETRIC, 0.1, window=window))
    k, v = (read_reference(x, SYMMETRIC, 64) for x in records)
    wanted = expected(query, k, v, S, 0.1, seen_by(2, 400, window=window))
    for out in outs:
        check(out, wanted, torch.float32)
        assert float((out - outs[0]).norm() / out.norm()) <= SUBNORMAL


@pytest.mark.skipif(not INTERPRETED, reason="needs a kernel")
def test_torch_alone_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    key, value, S = states(2, 2, 70, 64)
    query, lengths = queries(2, 4, 3, 64), torch.tensor([70, 41])
    assert takes(query, SYMMETRIC)
    for view in ({}, {"window": 9}, {"lengths": lengths, "mask": padding(2, 70)}):
        records = quantize_records(key, value, S, SYMMETRIC)
        by_kernel = attend_records(query, *records, S, SYMMETRIC, 0.1, **view)
        with monkeypatch.context() as patch:
            patch.setattr("quantize.kernels.device.has_kernel", lambda x: False)
            assert not takes(query, SYMMETRIC)
            again = quantize_records(key, value, S, SYMMETRIC)
            out = attend_records(query, *again, S, SYMMETRIC, 0.1, **view)
        assert all(torch.equal(one, other) for one, other in zip(records, again, strict=True))
        assert out.stride() == by_kernel.stride()
        check(out, by_kernel.double(), torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="needs a kernel")
def test_models_work_on_records(tiny: ModelMaker, monkeypatch: pytest.MonkeyPatch):
    model, ids = kv_model(tiny, "mistral", UNEVEN, num_hidden_layers=1).float(), some_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def run(sizes: list[int]) -> tuple[Tensor, Cache]:
        cache = int4_cache(model)
        return in_pieces(model, ids, sizes, cache, mask)[mask.bool()], cache

    by_kernel, cache = run([7, 1])
    assert cache.layers[0].keys.dtype == torch.uint8
    assert cache.update(*torch.ones(2, 2, 2, 1, 64), 0)[0].dtype == torch.uint8
    whole, _ = run([8])
    monkeypatch.setattr("quantize.kernels.device.has_kernel", lambda x: False)
    monkeypatch.setattr("quantize.model.attention.attend", partial(attend, whole_top=True))
    by_torch, cache = run([7, 1])
    assert cache.update(*torch.ones(2, 2, 2, 1, 64), 0)[0].dtype == torch.float32
    differences = [float((out - by_torch).norm() / by_torch.norm()) for out in (by_kernel, whole)]
    assert max(differences) < 2**-10


@pytest.mark.skipif(not INTERPRETED, reason="needs a kernel")
def test_attention_that_no_kernel_knows_reads_records_by_torch():
    key, value, S = states(1, 2, 9, 64)
    query, numerics = queries(1, 4, 9, 64), KvNumerics()
    kv = KvAttention(numerics, 2, 64)
    kv.scale.copy_(S)
    by_kernel = kv(query, key, value, None, 0.1)
    stored = quantize_records(key, value, S, kv.scheme)
    assert torch.equal(kv(query, *stored, None, 0.1), by_kernel)
    additive = torch.zeros(9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)[
        None, None
    ]
    learning = kv(query.clone().requires_grad_(True), key, value, None, 0.1).detach()
    for out in (kv(query, *stored, additive, 0.1), learning):
        assert float((out - by_kernel).norm() / by_kernel.norm()) < 0.05
    half = KvAttention(replace(numerics, fp8_query=False), 2, 64)
    half.scale.copy_(S)
    k, v = (read_reference(x, kv.scheme, 64) for x in stored)
    q = query / S.repeat_interleave(2, 0)[:, None]
    assert torch.equal(half(query, *stored, None, 0.1), attend(q, k, v, None, 0.1, True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("T", [1, 130])
def test_a_graph_replays_other_lengths(T: int):
    key, value, S = (x.cuda() for x in states(2, 2, 300, 128, torch.bfloat16))
    query, lengths = (
        queries(2, 8, T, 128, torch.bfloat16).cuda(),
        torch.tensor([200, 300], device="cuda"),
    )
    keys, values = quantize_records(key, value, S, SYMMETRIC)
    run = lambda: attend_records(query, keys, values, S, SYMMETRIC, 0.1, lengths=lengths)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    lengths.copy_(torch.tensor([131, 257]))
    append_records(key[:, :, :1], value[:, :, :1], S, SYMMETRIC, keys, values, lengths - 1)
    graph.replay()
    assert torch.equal(out, run())
