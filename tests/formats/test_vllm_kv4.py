"""vLLM's INT4 cache: against its arithmetic written out with matrices, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from scipy.linalg import hadamard
from torch import Tensor

from quantize.cli.options import kv_numerics
from quantize.errors import UsageError
from quantize.evaluation.streamed import StreamedModel
from quantize.formats.vllm_kv4 import VllmInt4, rotate, round_rotated
from quantize.model.attention_vllm import VllmKvAttention

# vLLM 0.32's own signs for heads of 16, as its function gave them
SIGNS_16 = (1, -1, 1, 1, -1, -1, -1, -1, 1, -1, -1, 1, 1, -1, 1, -1)


def matrix(d: int) -> Tensor:
    """Rotation of a head of d channels as one matrix, found by rotating unit vectors of a Sylvester matrix."""
    b = d & -d
    draw = torch.Generator().manual_seed(2654435769)
    signs = 2 * torch.bernoulli(torch.full((b,), 0.5), generator=draw) - 1
    block = torch.diag(signs.double()) @ torch.tensor(hadamard(b), dtype=torch.float64)
    return torch.block_diag(*[block] * (d // b))


def rounded(x: Tensor) -> Tensor:
    """Of rotated values [..., d], in float64, value by value."""
    out = torch.empty_like(x)
    for row, into in zip(x.flatten(0, -2), out.view(-1, x.shape[-1]), strict=True):
        s = max(float(row.max() - row.min()) / 15, 1e-6)
        z = min(max(away(-float(row.min()) / s), 0), 15)
        for i, value in enumerate(row.tolist()):
            into[i] = (min(max(away(value / s + z), 0), 15) - z) * s
    return out


def away(x: float) -> int:
    return int(x + 0.5) if x >= 0 else -int(-x + 0.5)


def test_signs_are_those_of_vllm():
    unit = torch.zeros(16)
    found = []
    for i in range(16):
        unit.zero_()[i] = 1
        found.append(int(rotate(unit)[0]))
    assert tuple(found) == SIGNS_16


@pytest.mark.parametrize("d", [16, 64, 96, 256, 6])
def test_rotation_is_signs_and_hadamard_and_can_be_undone(d: int):
    x = torch.randn(2, 3, d)
    assert torch.allclose(rotate(x).double(), x.double() @ matrix(d), atol=1e-4)
    assert torch.allclose(rotate(rotate(x), inverse=True) / (d & -d), x, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5, 100.0, -100.0])
def test_rounding_is_asymmetric_over_the_values_own_range(shift: float):
    x = torch.randn(2, 5, 16) + shift
    found = round_rotated(x)
    assert torch.allclose(found.double(), rounded(x.double()), atol=1e-5 * (1 + abs(shift)))
    cut = (found - x).abs().amax(-1) > 0.51 * (x.amax(-1) - x.amin(-1)) / 15
    # A range that does not hold 0 is cut off.
    assert bool(cut.any()) == (abs(shift) == 100)


def test_halves_go_away_from_zero():
    x = torch.tensor([[-7.0, 8.0, 0.5, -0.5, 1.5, -1.5, 2.5, 3.4]])
    assert round_rotated(x).tolist() == [[-7, 8, 1, 0, 2, -1, 3, 3]]


def test_attention_computes_on_what_the_cache_gives_back():
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    R = matrix(8)
    kk, vv = (rounded(x.double() @ R).repeat_interleave(2, 1) for x in (k, v))
    scores = (q.double() @ R) @ kk.mT * 0.5 / 8
    scores = scores.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    wanted = scores.softmax(-1) @ vv @ R.T / 8
    found = VllmKvAttention(VllmInt4())(q, k, v, None, 0.5)
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    assert found.dtype == q.dtype
    assert not torch.allclose(found, torch.zeros_like(found), atol=1e-2)


def test_any_model_is_evaluated_on_it(tiny: ModelMaker):
    tokens = torch.randint(0, 300, (1, 16))

    def logits(folder: Path, attention: Any) -> tuple[StreamedModel, Tensor]:
        model = StreamedModel(folder, torch.device("cpu"), torch.float32, "kernel", attention)
        return model, next(iter(model.read(tokens, lambda: None)([(0, 0, 16)])))

    plain, exact = logits(tiny("llama"), None)
    model, found = logits(tiny("llama"), kv_numerics("vllm-int4"))
    assert model.kv_cache == "vLLM's int4_per_token_head"
    assert plain.kv_cache == "16-bit"
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.3


def test_another_cache_is_refused():
    with pytest.raises(UsageError, match="choose auto, int4 or vllm-int4"):
        kv_numerics("int8")
