"""lm_head at fewer bits: `head_bits` of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import request_for
from transformers import AutoModelForCausalLM

import quantize  # registers the native format  # noqa: F401
from quantize.conversion.loop import Request, convert
from quantize.errors import ModelError
from quantize.evaluation import evaluate
from quantize.files.checkpoint import Checkpoint
from quantize.inspect.inspection import inspect
from quantize.model.load import load_model
from quantize.verification import verify

CPU = torch.device("cpu")
Maker = Callable[..., Path]


def request(
    model: Path, output: Path, text: Path, bits: int, recipe: str = "rtn", **changes: object
) -> Request:
    made = request_for(model, recipe, output, text)
    return replace(made, recipe=made.recipe.model_copy(update={"head_bits": bits, **changes}))


@pytest.mark.parametrize("kind", ["compressed-tensors", "pq"])
def test_the_head_is_packed_and_loads(tiny: Maker, text_file: Path, tmp_path: Path, kind: str):
    model, out = tiny("llama"), tmp_path / "out"
    summary = convert(request(model, out, text_file, 8, format=kind))
    assert summary.quantized_linears == 15
    source = Checkpoint(out)
    assert "lm_head.weight_packed" in source
    assert "lm_head.weight" not in source
    assert source.config["quantization_config"]["ignore"] == []
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_model(out, CPU, torch.float32)(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    args = {"dataset": str(text_file), "seqlen": 32, "max_windows": 4}
    figures = evaluate(out, model, **args)
    assert figures.bits_per_weight == pytest.approx(summary.bits_per_weight)
    result = verify(out, model)
    assert result.ok, result.first_failure
    assert inspect(out).totals.quantized_bits_per_weight == pytest.approx(summary.bits_per_weight)


def test_more_bits_are_better(tiny: Maker, text_file: Path, tmp_path: Path):
    args = {"dataset": str(text_file), "seqlen": 32, "max_windows": 4}
    klds = []
    for bits in (2, 4, 8):
        convert(request(tiny("llama"), tmp_path / str(bits), text_file, bits))
        klds.append(evaluate(tmp_path / str(bits), tiny("llama"), **args).kld_mean)
    assert klds[0] > klds[1] > klds[2]


def test_heads_that_cannot_be_encoded(tiny: Maker, text_file: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="shares its weights"):
        convert(request(tiny("llama", tie_word_embeddings=True), tmp_path / "out", text_file, 8))
    assert not (tmp_path / "out").exists()
