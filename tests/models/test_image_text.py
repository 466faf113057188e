"""Checkpoints that also take images: the text decoder is converted on text, the rest is copied."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import same
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from models import zoo
from quantize.conversion.loop import Request, convert
from quantize.errors import ModelError, StoppedError
from quantize.evaluation.streamed import StreamedModel
from quantize.files.checkpoint import Checkpoint
from quantize.inspect.inspection import inspect
from quantize.model.load import load_model, shape_of
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.verification.run import verify

CPU = torch.device("cpu")
TYPES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3", "llama4")
RTN = "[{method: rtn, bits: 8, group_size: 32}]"
SIDE = ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Type → the folder of a small model of it, made once."""
    made: dict[str, Path] = {}

    def parent(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "model"
            zoo.save(zoo.build(kind, image_text=True), folder)
            (folder / SIDE[0]).write_text('{"size": 56}')
            (folder / SIDE[1]).write_text("{{ messages }}")
            made[kind] = folder
        return made[kind]

    return parent


def recipe_of(folder: Path, stages: str, form: str = "compressed-tensors") -> Recipe:
    path = folder.parent / "recipe.yaml"
    text = "calibration: {dataset: x, nsamples: 8, seqlen: 32}"
    path.write_text(f"description: d\nformat: {form}\n{text}\nstages: {stages}\n")
    return load_recipe(str(path)).with_overrides(dataset=str(folder / "text.txt"))


def request(folder: Path, output: Path, stages: str, **more: Any) -> Request:
    return Request(folder, recipe_of(folder, stages), output, CPU, torch.float32, **more)


def streamed(folder: Path, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of pq's own pass."""
    model = StreamedModel(folder, CPU, torch.float32, "kernel")
    length = ids.shape[1]
    logits = model.read(ids, lambda: None)([(row, 0, length) for row in range(len(ids))])
    return torch.stack(list(logits)).float()


def stock(kind: str, folder: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it, and what it found wrong."""
    model, info = zoo.loader_of(kind, True).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **more
    )
    return model.eval(), {name: keys for name, keys in info.items() if keys}


def divergences(wanted: Tensor, given: Tensor) -> Tensor:
    """KLD of every token, in nats."""
    p, q = wanted.double().log_softmax(-1), given.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def divergence(wanted: Tensor, given: Tensor) -> float:
    return float(divergences(wanted, given).mean())


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def is_tower(name: str) -> bool:
    return any(part in name for part in ("visual", "vision", "projector"))


def require_copied(parent: Path, output: Path) -> None:
    """All that is no text decoder's is there bit for bit, under the names of the parent."""
    before, after = stored(parent), stored(output)
    towers = {name for name in before if is_tower(name)}
    assert len(towers) > 10
    assert towers == {name for name in after if is_tower(name)}
    assert all(torch.equal(before[n], after[n]) for n in towers)
    for name in SIDE:
        assert (output / name).read_bytes() == (parent / name).read_bytes()


@pytest.mark.parametrize("kind", TYPES)
def test_eight_bits(kind: str, parents: Callable[[str], Path], tmp_path: Path):
    parent, output, ids = parents(kind), tmp_path / "out", zoo.tokens(seed=21)
    convert(request(parent, output, RTN))
    whole, _ = stock(kind, parent)
    wanted = zoo.logits(whole, ids)
    torch.testing.assert_close(streamed(parent, ids), wanted, rtol=1e-5, atol=1e-5)
    require_copied(parent, output)
    loaded, wrong = stock(kind, output)
    if kind == "llama4":
        # Its own forward, before which a loader unpacks, fails on text in transformers 5.24.
        with contextlib.suppress(AttributeError):
            loaded(input_ids=ids)
    assert not wrong
    assert type(loaded) is type(whole)
    ours, theirs = streamed(output, ids), zoo.logits(loaded, ids)
    apart = divergences(wanted, ours)
    # A token at the edge of an expert may visit another one.
    assert float(apart.median() if kind == "llama4" else apart.mean()) < 1e-3
    assert divergence(ours, theirs) < 1e-8
    found = verify(output, parent)
    assert found.ok, found.first_failure
    assert {check.name for check in found.checks if check.ok} >= {"untouched", "recomputed"}


def test_images_are_seen_as_the_parent_sees_them(parents: Callable[[str], Path], tmp_path: Path):
    parent, output = parents("qwen3_vl"), tmp_path / "out"
    convert(request(parent, output, f"[{{method: awq}}, {RTN[1:-1]}]"))
    before, after = (stock("qwen3_vl", folder)[0] for folder in (parent, output))
    config = before.config
    vision = config.vision_config
    ids = zoo.tokens(1, 24, seed=22)
    ids[0, 4] = config.vision_start_token_id
    ids[0, 5:9] = config.image_token_id
    ids[0, 9] = config.vision_end_token_id
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2

    def logits(model: Any, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            out: Tensor = model(
                input_ids=ids,
                pixel_values=torch.randn(16, patch, generator=draw),
                image_grid_thw=torch.tensor([[1, 4, 4]]),
                mm_token_type_ids=(ids == config.image_token_id).int(),
            ).logits
        return out

    wanted = logits(before, 1)
    assert divergence(wanted, logits(after, 1)) < 1e-3
    assert divergence(wanted, logits(before, 2)) > 3e-3  # what is in the image matters


def test_smoothed_rounded_and_resumed(parents: Callable[[str], Path], tmp_path: Path):
    parent, ids = parents("gemma3"), zoo.tokens(seed=23)
    stages = "[{method: awq}, {method: gptq, bits: 4, group_size: 32}]"
    output = tmp_path / "out"
    asked = request(parent, output, stages, work=tmp_path / "work", resume="auto")
    with pytest.raises(StoppedError, match="after block 1 of 2"):
        convert(asked, stop=lambda: True)
    convert(asked)
    once = dataclasses.replace(asked, output=tmp_path / "once", work=None, resume=None)
    convert(once)
    files = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (output, once.output)]
    assert files[0] == files[1]
    require_copied(parent, output)
    model, wrong = stock("gemma3", output)
    assert not wrong
    theirs = zoo.logits(model, ids)
    assert divergence(streamed(output, ids), theirs) < 1e-8
    assert divergence(zoo.logits(stock("gemma3", parent)[0], ids), theirs) < 0.05
    found = verify(output, parent)
    assert found.ok, found.first_failure
    # Whole in memory, as tasks run it.
    whole = load_model(output, CPU, torch.float32)
    assert divergence(theirs, zoo.logits(whole, ids)) < 1e-8


def test_several_processes_write_the_same(parents: Callable[[str], Path], tmp_path: Path):
    same(
        request(parents("mistral3"), tmp_path / "out", "[{method: gptq, group_size: 32}]"),
        tmp_path,
        (2,),
    )


def test_a_damaged_tower_is_found(parents: Callable[[str], Path], tmp_path: Path):
    parent, output = parents("mistral3"), tmp_path / "out"
    convert(request(parent, output, RTN))
    other = tmp_path / "other"
    zoo.save(zoo.build("mistral3", seed=5, image_text=True), other)
    found = verify(output, other)
    problems = {check.name: check.detail for check in found.checks if check.ok is False}
    assert "differs from the parent's" in problems["untouched"]


def test_the_stream_is_not_rotated_where_images_enter_it(
    parents: Callable[[str], Path], tmp_path: Path
):
    parent = parents("qwen2_5_vl")
    with pytest.raises(ModelError, match=r"model\.visual may write .* set residual: false"):
        convert(request(parent, tmp_path / "out", f"[{{method: rotate}}, {RTN[1:-1]}]"))
    assert not (tmp_path / "out").exists()


def test_the_config_is_the_text_decoders(parents: Callable[[str], Path], tmp_path: Path):
    """Sizes and ties are those that transformers makes of it, at whichever level they are said."""
    facts = json.loads((parents("qwen2_5_vl") / "config.json").read_text())
    for level in ("whole", "section", "nowhere"):
        config = {key: value for key, value in facts.items() if key != "tie_word_embeddings"}
        config["text_config"] = dict(facts["text_config"])
        config["text_config"].pop("tie_word_embeddings", None)
        if level != "nowhere":
            place = config if level == "whole" else config["text_config"]
            place["tie_word_embeddings"] = True
        folder = tmp_path / level
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(
            (parents("qwen2_5_vl") / "model.safetensors").read_bytes()
        )
        shape = shape_of(Checkpoint(folder))
        text = facts["text_config"]
        assert (shape.hidden, shape.vocab) == (text["hidden_size"], text["vocab_size"])
        model = zoo.loader_of("qwen2_5_vl", True).from_config(AutoConfig.from_pretrained(folder))
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert shape.tied is tied is (level != "nowhere")


def test_linears_of_towers_are_named_to_loaders(parents: Callable[[str], Path], tmp_path: Path):
    parent, output = parents("qwen3_vl"), tmp_path / "out"
    convert(request(parent, output, RTN))
    ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    model, _ = stock("qwen3_vl", parent)
    towers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" in name
    }
    assert towers
    assert towers | {"lm_head"} == set(ignored)
    assert "visual" in str(inspect(output).outside)
