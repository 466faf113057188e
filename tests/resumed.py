"""Conversions that may be stopped: a model of three blocks and recipes of every kind, shared by two test files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker

from quantize.conversion.loop import Request, convert
from quantize.errors import StoppedError
from quantize.recipe.recipe import parse_recipe

BLOCKS = 3
LADIMO = "{method: ladimo, shared: 128, experts: 2, steps: 5, batch_tokens: 32, mean_experts: [1, null, 0.5]}"
RECIPES = {
    "rtn": "format: compressed-tensors, stages: [{method: rtn}]",
    "gptq": "format: compressed-tensors, stages: [{method: gptq, bits: 3}], head_bits: 8",
    "fireq": "format: pq, stages: [{method: awq}, {method: fireq-attention}, {method: fireq, activations: fp8}]",
    "sbvr": "format: pq, stages: [{method: sbvr, bits: 2, sweeps: 1, lines: 16, layers: ['*.q_proj']}]",
    "ladimo-gptq": f"format: pq, stages: [{LADIMO}, {{method: gptq, group_size: 64}}]",
    "ladimo-searched": "format: pq, stages: [{method: ladimo, teaching: none, activated_reduction: 0.1}]",
    "rotate-rtn": "format: pq, stages: [{method: rotate, down: true}, {method: rtn}]",
    "target": "format: compressed-tensors, target_bpw: 5.5, stages: [{method: gptq, bits: 4}]",
}


def request(recipe: str, model: Path, text: Path, output: Path, **changes: Any) -> Request:
    """A conversion by one of RECIPES, or by the text of another."""
    body = RECIPES.get(recipe, recipe)
    calibration = f"calibration: {{dataset: {text}, nsamples: 6, seqlen: 32}}"
    parsed = parse_recipe(f"{{description: d, {calibration}, {body}}}", "r.yaml")
    return dataclasses.replace(
        Request(model, parsed, output, CPU, torch.float32, batch_tokens=96), **changes
    )


def model_of(tiny: ModelMaker, recipe: str) -> Path:
    """A tied head where the recipe unties it."""
    return tiny("llama", num_hidden_layers=BLOCKS, tie_word_embeddings=recipe == "rotate-rtn")


def whole(asked: Request) -> dict[str, bytes]:
    """Files of a conversion that is not stopped and keeps nothing."""
    output = asked.output.with_name("whole")
    convert(dataclasses.replace(asked, output=output, work=None, resume=None))
    return files_of(output)


def files_of(folder: Path) -> dict[str, bytes]:
    """Bytes of every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped_after(asked: Request, blocks: int) -> None:
    """Run until so many blocks were kept."""
    calls = iter(range(1, blocks + 1))
    with pytest.raises(StoppedError):
        convert(asked, stop=lambda: next(calls) == blocks)


def kept(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str = "rtn", **changes: Any
) -> Request:
    """A conversion that keeps its blocks."""
    changes = {"work": tmp_path / "work", "resume": "auto"} | changes
    return request(recipe, model_of(tiny, recipe), text_file, tmp_path / "out", **changes)
