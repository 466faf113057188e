"""Stored tensors that a model has no place for: what the stock loader ignores is ignored with a line,
modules beside the decoder go along unchanged."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from safetensors.torch import load_file, save_file
from small_sources import fp8
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantize.conversion.loop import convert
from quantize.errors import ModelError
from quantize.evaluation.run import evaluate
from quantize.files.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from quantize.model.dequantized import open_source
from quantize.verification import verify

Maker = Callable[..., Path]
Change = Callable[[dict[str, Tensor]], Any]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def changed(folder: Path, copy: Path, change: Change, **fields: Any) -> Path:
    """A copy of a model with other tensors, and other fields in its config.json."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / SINGLE_NAME)
    change(tensors)
    save_file(tensors, copy / SINGLE_NAME, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy


def put(*names: str, like: str = "model.norm.weight") -> Change:
    """Tensors of fresh random values by these names."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: torch.rand_like(tensors[like]) for name in names}

    return change


def layer_beyond(tensors: dict[str, Tensor]) -> None:
    inside = [name for name in tensors if ".layers.1." in name]
    tensors |= {n.replace(".layers.1.", ".layers.2."): tensors[n] + 1 for n in inside}


def mtp_layer_beyond(tensors: dict[str, Tensor]) -> None:
    layer_beyond(tensors)
    put("model.layers.2.enorm.weight", "model.layers.2.hnorm.weight")(tensors)
    tensors["model.layers.2.eh_proj.weight"] = torch.rand(128, 256)


def mtp_modules(tensors: dict[str, Tensor]) -> None:
    put("mtp.norm.weight", "mtp.layers.0.input_layernorm.weight")(tensors)
    tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.rand(256, 128)
    tensors["mtp.steps"] = torch.arange(4)


def stock_logits(folder: Path) -> Tensor:
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    return logits


def stored(folder: Path) -> dict[str, Tensor]:
    return Checkpoint(folder).tensors("")


ROTARY = "model.layers.{}.self_attn.rotary_emb.inv_freq"
IGNORED = {
    "rotary tables": (put(*(ROTARY.format(i) for i in (0, 1))), 2),
    "cache scales": (put("model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"), 2),
    "scale of a linear": (put("model.layers.0.mlp.up_proj.input_scale"), 1),
    "bias": (put("model.layers.1.self_attn.q_proj.bias"), 1),
    "norm within a block": (put("model.layers.1.extra_norm.weight"), 1),
    "other heads": (put("score.weight", "v_head.summary.weight"), 2),
    "a layer more": (layer_beyond, 9),
}  # fmt: skip
CARRIED = {
    "mtp modules": (mtp_modules, {"mtp": 4}, ["mtp.layers.0.mlp.up_proj"]),
    "mtp below the model": (put("model.mtp.norm.weight"), {"model.mtp": 1}, []),
    "mtp as a layer": (
        mtp_layer_beyond,
        {"model.layers.2": 12},
        ["model.layers.2.eh_proj", "model.layers.2.mlp.down_proj"],
    ),
    "a tower": (put("visual.norm.weight", "audio.0.weight"), {"audio": 1, "visual": 1}, []),
}


@pytest.mark.parametrize("what", IGNORED)
def test_what_the_stock_loader_ignores_is_ignored_with_a_line(
    tiny: Maker,
    converted: Maker,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
):
    change, count = IGNORED[what]
    parent = changed(tiny("llama"), tmp_path / "parent", change)
    assert torch.equal(stock_logits(parent), stock_logits(tiny("llama")))
    with caplog.at_level(logging.WARNING):
        summary = convert(request_for(parent, "rtn", tmp_path / "out", text_file))
    given = load_file(parent / SINGLE_NAME)
    extra = sorted(given.keys() - load_file(tiny("llama") / SINGLE_NAME).keys())
    (line,) = summary.notes
    assert f"{count} tensor{'s' if count > 1 else ''} that the model has no place for" in line
    assert extra[0] in line
    told = [r.getMessage() for r in caplog.records if r.name == "quantize.conversion.draft"]
    assert told == [line]
    ours, clean = stored(tmp_path / "out"), stored(converted("rtn", "llama"))
    assert ours.keys() == clean.keys()
    assert all(torch.equal(ours[name], clean[name]) for name in clean)
    facts = json.loads((tmp_path / "out" / "pq.json").read_text())
    assert (facts["ignored"], facts["carried"], summary.carried) == (extra, {}, {})
    result = verify(tmp_path / "out", parent)
    assert result.ok, result.first_failure


@pytest.mark.parametrize("what", CARRIED)
def test_modules_beside_the_decoder_go_along_unchanged(
    tiny: Maker, converted: Maker, text_file: Path, tmp_path: Path, what: str
):
    change, carried, linears = CARRIED[what]
    parent = changed(tiny("llama"), tmp_path / "parent", change)
    summary = convert(request_for(parent, "rtn", tmp_path / "out", text_file))
    assert summary.carried == carried
    assert all(name in summary.notes[0] for name in carried)
    given = load_file(parent / SINGLE_NAME)
    extra = given.keys() - load_file(tiny("llama") / SINGLE_NAME).keys()
    ours, clean = stored(tmp_path / "out"), stored(converted("rtn", "llama"))
    assert ours.keys() == clean.keys() | extra
    assert all(torch.equal(ours[name], clean[name]) for name in clean)
    assert all(torch.equal(ours[name], given[name]) for name in extra)
    facts = json.loads((tmp_path / "out" / "pq.json").read_text())
    assert (facts["ignored"], facts["carried"]) == ([], carried)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(linears) <= set(config["quantization_config"]["ignore"])
    result = verify(tmp_path / "out", parent)
    assert result.ok, result.first_failure
    assert torch.equal(stock_logits(tmp_path / "out"), stock_logits(converted("rtn", "llama")))
    with_them, without = (
        evaluate(folder, base, dataset=str(text_file), seqlen=32, max_windows=4)
        for folder, base in (
            (tmp_path / "out", parent),
            (converted("rtn", "llama"), tiny("llama")),
        )
    )
    assert with_them.perplexity == without.perplexity
    assert with_them.baseline_perplexity == without.baseline_perplexity


@pytest.mark.parametrize("lost", [False, True])
def test_a_carried_tensor_that_changed_or_is_lost_is_found(
    tiny: Maker, text_file: Path, tmp_path: Path, lost: bool
):
    parent = changed(tiny("llama"), tmp_path / "parent", put("mtp.a.weight", "mtp.b.weight"))
    convert(request_for(parent, "rtn", tmp_path / "out", text_file))

    given = load_file(parent / SINGLE_NAME)
    del given["mtp.b.weight"]
    more = {} if lost else {"mtp.b.weight": torch.zeros(128)}
    other = changed(tiny("llama"), tmp_path / "other", lambda t: t.update(given | more))
    checks = {check.name: check for check in verify(tmp_path / "out", other).checks}
    assert checks["untouched"].ok is False
    says = "is not in the parent" if lost else "differs from the parent's"
    assert checks["untouched"].detail == f"mtp.b.weight {says}"


def test_an_output_of_ours_holds_nothing_that_is_ignored(
    tiny: Maker, text_file: Path, tmp_path: Path
):
    convert(request_for(tiny("llama"), "rtn", tmp_path / "out", text_file))
    last = Checkpoint(tmp_path / "out").shards[-1]
    tensors = load_file(tmp_path / "out" / last)
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        tmp_path / "out" / last,
    )
    result = verify(tmp_path / "out")
    checks = {check.name: check for check in result.checks}
    assert checks["layout"].ok is False
    assert "inv_freq is in the shard but the index places it in no file" in checks["layout"].detail


def test_an_index_may_list_what_no_shard_holds(
    tiny: Maker, converted: Maker, text_file: Path, tmp_path: Path
):
    parent = Path(shutil.copytree(tiny("llama", shards=2), tmp_path / "parent"))
    index = json.loads((parent / INDEX_NAME).read_text())
    first = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {ROTARY.format(i): first for i in (0, 1)}
    (parent / INDEX_NAME).write_text(json.dumps(index))
    summary = convert(request_for(parent, "rtn", tmp_path / "out", text_file))
    (line,) = summary.notes
    assert (
        f"its shards disagree, and the shards count, as in transformers ({first}: tensor " in line
    )
    assert "rotary_emb.inv_freq is in the index but not in the shard and 1 more" in line
    ours, clean = stored(tmp_path / "out"), stored(converted("rtn", "llama"))
    assert ours.keys() == clean.keys()


def test_a_head_of_its_own_that_config_ties_is_one(tiny: Maker, text_file: Path, tmp_path: Path):
    """As transformers does: it warns and leaves them untied; config.json of the output says so."""
    parent = changed(tiny("llama"), tmp_path / "parent", lambda t: None, tie_word_embeddings=True)
    assert torch.equal(stock_logits(parent), stock_logits(tiny("llama")))
    summary = convert(request_for(parent, "rtn", tmp_path / "out", text_file))
    assert f"{HEAD} differs from {EMBEDDING}, though config.json ties them" in summary.notes[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    convert(request_for(tiny("llama"), "rtn", tmp_path / "clean", text_file))
    ours, clean = stored(tmp_path / "out"), stored(tmp_path / "clean")
    assert ours.keys() == clean.keys()
    assert all(torch.equal(ours[name], clean[name]) for name in clean)
    result = verify(tmp_path / "out", parent)
    assert result.ok, result.first_failure


def test_a_tied_head_may_stand_for_the_embedding(
    tiny: Maker, converted: Maker, text_file: Path, tmp_path: Path
):
    """transformers swaps the two; the output has the usual name."""
    tied = tiny("qwen3", tie_word_embeddings=True)
    change = lambda t: t.update({HEAD: t.pop(EMBEDDING)})  # noqa: E731
    parent = changed(tied, tmp_path / "parent", change)
    assert torch.equal(stock_logits(parent), stock_logits(tied))
    convert(request_for(parent, "rtn", tmp_path / "out", text_file))
    ours = stored(tmp_path / "out")
    clean = stored(converted("rtn", "qwen3", tie_word_embeddings=True))
    assert ours.keys() == clean.keys()
    assert all(torch.equal(ours[name], clean[name]) for name in clean)
    result = verify(tmp_path / "out", parent)
    assert result.ok, result.first_failure


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_has_no_head_for_tokens(
    tiny: Maker, text_file: Path, tmp_path: Path, tied: bool
):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["score.weight"] = tensors.pop(HEAD)[:1].clone()

    named = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": tied}
    parent = changed(tiny("llama"), tmp_path / "parent", change, **named)
    says = r"names LlamaForSequenceClassification, which has no head .* of LlamaForCausalLM"
    with pytest.raises(ModelError, match=says):
        convert(request_for(parent, "rtn", tmp_path / "out", text_file))


def test_a_rotated_stream_is_refused_beside_modules_that_read_it(
    tiny: Maker, text_file: Path, tmp_path: Path
):
    parent = changed(tiny("llama"), tmp_path / "parent", mtp_modules)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("description: d\nformat: pq\nstages: [{method: rotate}, {method: rtn}]")
    with pytest.raises(ModelError, match=r"rotate: mtp, .* set residual: false"):
        convert(request_for(parent, str(recipe), tmp_path / "out", text_file))


def test_a_small_source_carries_its_mtp_layer_dequantized(text_file: Path, tmp_path: Path):
    parent = fp8(tmp_path / "parent")
    tensors = load_file(parent / SINGLE_NAME)
    last = [name for name in tensors if ".layers.1." in name]
    more = {n.replace(".layers.1.", ".layers.2."): tensors[n].clone() for n in last}
    more["model.layers.2.enorm.weight"] = torch.rand(128)
    save_file(tensors | more, parent / SINGLE_NAME)
    summary = convert(request_for(parent, "rtn", tmp_path / "out", text_file))
    source, output = open_source(parent), Checkpoint(tmp_path / "out")
    names = source.names("model.layers.2.")
    assert summary.carried == {"model.layers.2": len(names)}
    assert "model.layers.2.mlp.up_proj.weight" in names
    for name in names:
        assert torch.equal(output.tensor(name), source.tensor(name))
        assert output.dtypes[name] in ("F32", "BF16")
    result = verify(tmp_path / "out", parent)
    assert result.ok, result.first_failure
