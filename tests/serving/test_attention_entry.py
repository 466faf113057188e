"""What attention by kernels promises where there is none: what it refuses, and that compilers take it whole."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_samples import ASYMMETRIC, SYMMETRIC, queries, states
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.api import (
    append_records,
    attend_fp8,
    attend_records,
    quantize_fp8,
    quantize_records,
)
from quantize.kernels.attention.reference import attend, store_reference


def test_a_whole_top_is_the_same_softmax():
    key, value, _ = states(1, 2, 30, 64)
    query = queries(1, 4, 30, 64)
    plain = attend(query, key, value, None, 0.1, False)
    torch.testing.assert_close(attend(query, key, value, None, 0.1, False, whole_top=True), plain)
    rounded = attend(query, key, value, None, 0.1, True, whole_top=True)
    assert 1e-4 < float((rounded - plain).norm() / plain.norm()) < 0.05


def test_whole_models_compile():
    key, value, S = states(1, 2, 9, 64)
    query = queries(1, 4, 2, 64)

    def step(query: Tensor, key: Tensor, value: Tensor, memory: Tensor) -> Tensor:
        keys, values = quantize_records(key, value, S, SYMMETRIC)
        append_records(key, value, S, SYMMETRIC, memory[0], memory[1], 1)
        one = attend_records(query, keys, values, S, SYMMETRIC, 0.1)
        return one + attend_records(
            query, memory[0], memory[1], S, SYMMETRIC, 0.1, lengths=torch.tensor([10])
        )

    memories = [torch.zeros(2, 1, 2, 12, 34, dtype=torch.uint8) for _ in range(2)]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(
        compiled(query, key, value, memories[0]), step(query, key, value, memories[1])
    )
    assert torch.equal(*memories)
    stored = quantize_fp8(key, value, S)
    fp8 = torch.compile(attend_fp8, backend="aot_eager", fullgraph=True)
    assert torch.equal(fp8(query, *stored, S, 0.1), attend_fp8(query, *stored, S, 0.1))


def test_nothing_gives_nothing():
    key, value, S = states(1, 2, 9, 64)
    query, records = queries(1, 4, 2, 64), quantize_records(key, value, S, SYMMETRIC)
    assert not attend_records(query, *(x[:, :, :0] for x in records), S, SYMMETRIC, 0.1).any()
    assert attend_records(query[:, :, :0], *records, S, SYMMETRIC, 0.1).shape == (1, 4, 0, 64)
    assert quantize_records(key[:, :, :0], value[:, :, :0], S, SYMMETRIC)[0].shape == (1, 2, 0, 34)


def test_what_does_not_fit_is_refused():
    key, value, S = states(2, 2, 9, 64)
    query, (keys, values) = queries(2, 4, 2, 64), store_reference(key, value, S, SYMMETRIC)

    def refused(words: str, *arguments: Any, **view: Any) -> None:
        with pytest.raises(ValueError, match=words):
            attend_records(*arguments, 0.1, **view)

    refused("query is torch.float64", query.double(), keys, values, S, SYMMETRIC)
    refused(
        "no kernel knows heads of 48 channels",
        query[..., :48],
        keys,
        values,
        S[:, :48].clone(),
        SYMMETRIC,
    )
    refused("4 groups of 16 channels, only of 1 or 2", query, keys, values, S, KvScheme(16))
    refused(
        r"keys is torch.uint8 \(2, 2, 9, 34\) on cpu, expected .* 35\)",
        query,
        keys,
        values,
        S,
        ASYMMETRIC,
    )
    refused(r"values is .* \(2, 2, 8, 34\)", query, keys, values[:, :, 1:], S, SYMMETRIC)
    refused("3 query heads cannot share 2", query[:, :3], keys, values, S, SYMMETRIC)
    refused(
        "mask is torch.float32", query, keys, values, S, SYMMETRIC, mask=torch.zeros(2, 1, 2, 9)
    )
    refused("window 0 is not positive", query, keys, values, S, SYMMETRIC, window=0)
    refused(
        r"lengths is .* expected 2 integers",
        query,
        keys,
        values,
        S,
        SYMMETRIC,
        lengths=torch.ones(2),
    )
    with pytest.raises(ValueError, match="9 tokens from 1 on do not fit a cache of 9"):
        append_records(key, value, S, SYMMETRIC, keys, values, 1)
    with pytest.raises(ValueError, match=r"value is .* expected torch.float32 \(2, 2, 9, 64\)"):
        quantize_records(key, value.half(), S, SYMMETRIC)
    with pytest.raises(ValueError, match="key_scale"):
        attend_fp8(
            query, *quantize_fp8(key, value, S)[:1], S, *quantize_fp8(key, value, S)[2:], S, 0.1
        )


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import quantize.kernels.attention.api, quantize.serving.kv_cache"
    subprocess.run([sys.executable, "-c", code], check=True)
