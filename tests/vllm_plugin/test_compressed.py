"""compressed-tensors checkpoints with INT4 weights and FP8 activations run where vLLM has no kernel for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import ROLES, as_compressed_tensors, write
from engine import ask
from test_linears import prompts

from quantize.formats.packed_int import IntScheme

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")


def test_w4a8_fp8_is_what_the_native_format_computes(tmp_path: Path):
    schemes = {
        f"model.layers.{i}.{place}": IntScheme(4, 128, True)
        for i in range(3)
        for place in ROLES.values()
    }
    request = {"dtype": "float32", "runs": [{"prompts": prompts(50, 2)}]}
    native = write(tmp_path / "native", schemes)
    (wanted,) = ask(tmp_path, by="transformers", model=native, **request)
    stock = as_compressed_tensors(write(tmp_path / "stock", schemes))
    (found,) = ask(tmp_path, model=stock, **request)
    for have, want in zip(found, wanted, strict=True):
        have, want = torch.tensor(have["logprobs"]), torch.tensor(want["logprobs"])
        # A last bit can move an input to its neighbour in E4M3.
        assert (have - want).abs().median() < 1e-3
        torch.testing.assert_close(have, want, rtol=0, atol=5e-2)
