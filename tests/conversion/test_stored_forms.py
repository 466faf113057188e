"""One model in several stored forms converts to one and the same model, which pq and others read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from transformers import AutoModel, AutoModelForCausalLM

from quantize.conversion.loop import convert
from quantize.evaluation.streamed import StreamedModel
from quantize.files.checkpoint import Checkpoint
from quantize.model.load import load_model
from quantize.verification import verify

Maker = Callable[..., Path]
CPU = torch.device("cpu")
TOKENS = torch.arange(64).reshape(2, 32)


def in_other_form(source: Path, folder: Path) -> Path:
    """The same model: experts stacked, or tensors without the prefix `model.` and without a head."""
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] == "qwen2_moe":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(folder, save_original_format=False)
    else:
        AutoModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, folder)
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    streamed: Any = StreamedModel(folder, CPU, torch.float32, "stock")
    logits = streamed.read(TOKENS, lambda *_: None)
    return torch.cat(list(logits([(window, 0, 32) for window in range(2)])))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen2_moe", {}), ("qwen3", {"tie_word_embeddings": True})],
    ids=["stacked experts", "no prefix"],
)
def test_the_form_of_the_source_changes_no_number(
    tiny: Maker, text_file: Path, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    usual = tiny(kind, **changes)
    other = in_other_form(usual, tmp_path / "source")
    assert set(Checkpoint(other).names()) != set(Checkpoint(usual).names())
    outputs = []
    for source in (usual, other):
        outputs.append(tmp_path / f"from-{source.name}-{len(outputs)}")
        convert(request_for(source, "rtn", outputs[-1], text_file))
    first, second = (Checkpoint(output) for output in outputs)
    prefix = "" if kind == "qwen2_moe" else "model."
    assert {name.removeprefix(prefix) for name in first.names()} == set(second.names())
    for name in first.names():
        assert torch.equal(first.tensor(name), second.tensor(name.removeprefix(prefix))), name

    checks = verify(outputs[1], parent=other).checks
    assert not [check for check in checks if check.ok is False]
    assert [check.ok for check in checks if check.name in ("recomputed", "outputs")] == [True, True]
    stock, found = AutoModelForCausalLM.from_pretrained(
        outputs[1], dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    wanted = stock(TOKENS, use_cache=False).logits.flatten(0, 1)
    whole: Any = load_model(outputs[1], CPU, torch.float32, "stock")
    for logits in (whole(TOKENS, use_cache=False).logits.flatten(0, 1), logits_of(outputs[1])):
        # Stock transformers rounds decompressed experts to bfloat16.
        assert (logits - wanted).norm() < 1e-2 * wanted.norm()
    torch.testing.assert_close(logits_of(other), logits_of(usual), rtol=0, atol=0)
