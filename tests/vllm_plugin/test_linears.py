"""The real engine multiplies with every kind of packed linear as transformers does on the same checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import mixed_schemes, write
from engine import ask

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")

DOWN = "mlp.down_proj"


def prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(2, 1500) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_linears_of_all_kinds_at_once(way: str, tmp_path: Path):
    """Float32, where nothing but the order of sums may differ: rows by lookup (one token) and by decoding."""
    rotated = [f"model.layers.{i}.{DOWN}" for i in (0, 2)]
    rotated.append("model.layers.2.self_attn.k_proj")  # stays 16-bit, and rotates by itself
    schemes = mixed_schemes()
    model = write(tmp_path / "model", schemes, rotated=rotated[:2])
    request = {
        "model": model,
        "dtype": "float32",
        "runs": [{"prompts": prompts(60, 3), "max_tokens": 6}],
    }
    (wanted,) = ask(tmp_path, by="transformers", **request)
    (found,) = ask(tmp_path, engine={"enforce_eager": way == "eager"}, **request)
    for have, want in zip(found, wanted, strict=True):
        assert have["tokens"] == want["tokens"]
        have, want = torch.tensor(have["logprobs"]), torch.tensor(want["logprobs"])
        torch.testing.assert_close(have, want, rtol=0, atol=2e-3)
        assert (have - want).abs().mean() < 1e-4
