"""The real engine sends tokens to as many experts as policies say, and multiplies with packed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import EXPERTS, bitvec, write_moe
from engine import ask
from test_linears import prompts

from quantize.formats.packed_int import IntScheme
from quantize.formats.routing import Threshold, TopK
from quantize.formats.scheme import AnyScheme

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")

W4A16 = IntScheme(4, 64, False)


def test_adaptive_routing_and_packed_experts(tmp_path: Path):
    """Experts that are stacked, of one scheme and of three, and one that no token visits."""
    schemes: dict[str, AnyScheme] = {}
    for e in range(EXPERTS):
        for role, scheme in (("gate", W4A16), ("up", W4A16), ("down", bitvec(4, 64))):
            schemes[f"model.layers.1.mlp.experts.{e}.{role}_proj"] = scheme
        schemes[f"model.layers.2.mlp.experts.{e}.up_proj"] = bitvec(3, 64)
    schemes |= {f"model.layers.2.mlp.shared_expert.{r}_proj": W4A16 for r in ("gate", "up")}
    routing = {
        "model.layers.0.mlp": Threshold(0.25),
        "model.layers.1.mlp": TopK(3, renormalize=True),
        "model.layers.2.mlp": Threshold(-0.1),
    }
    model = write_moe(tmp_path / "model", schemes, routing)
    request = {
        "model": model,
        "dtype": "float32",
        "runs": [{"prompts": prompts(60, 9), "max_tokens": 6}],
    }
    (wanted,) = ask(tmp_path, by="transformers", **request)
    (found,) = ask(tmp_path, **request)
    for have, want in zip(found, wanted, strict=True):
        assert have["tokens"] == want["tokens"]
        have, want = torch.tensor(have["logprobs"]), torch.tensor(want["logprobs"])
        torch.testing.assert_close(have, want, rtol=0, atol=1e-4)
