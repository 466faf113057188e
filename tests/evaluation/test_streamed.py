"""A model run block by block gives the logits of the whole model, within bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_side_files
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.errors import ModelError
from quantize.evaluation import evaluate, run
from quantize.evaluation.protocols import Protocol
from quantize.evaluation.records import Records
from quantize.evaluation.streamed import StreamedModel, open_model
from quantize.evaluation.whole import WholeModel
from quantize.model.linear import Numerics
from quantize.model.load import load_model

CPU = torch.device("cpu")
Maker = Callable[..., Path]


def tick() -> None:
    pass


@pytest.mark.parametrize("numerics", ["kernel", "stock"])
@pytest.mark.parametrize("recipe", [None, "rtn", "fireq-paper-linear"])
def test_the_logits_are_those_of_the_whole_model(
    tiny: Maker, converted: Maker, model_type: str, recipe: str | None, numerics: Numerics
):
    folder = converted(recipe, model_type) if recipe else tiny(model_type)
    inputs = torch.randint(256, (5, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = load_model(folder, CPU, torch.float32, numerics)(inputs).logits
    streamed = open_model(folder, CPU, torch.float32, numerics)
    assert isinstance(streamed, StreamedModel)
    logits = streamed.read(inputs, tick)
    spans = [(0, 0, 40), (1, 7, 8), (4, 0, 13), (4, 13, 40)]
    for (window, first, end), found in zip(spans, logits(spans), strict=True):
        assert torch.allclose(found, whole[window, first:end], atol=1e-5), (window, first)
    again = list(logits(spans[:1]))  # a parent's logits are asked for once per model
    assert torch.allclose(again[0], whole[0], atol=1e-5)


def test_tied_heads(tiny: Maker, converted: Maker, text_file: Path):
    parent = tiny("qwen3", tie_word_embeddings=True)
    out = converted("rtn", "qwen3", tie_word_embeddings=True)
    figures = evaluate(out, parent, dataset=str(text_file), seqlen=32, max_windows=4)
    assert 0 < figures.kld_mean < 1


def test_small_budgets_change_nothing(
    tiny: Maker, converted: Maker, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    args = {"dataset": str(text_file), "seqlen": 24, "max_windows": 11}
    out, parent = converted("rtn", "llama"), tiny("llama")
    large = evaluate(out, parent, **args)
    V, largest = 512, 0
    monkeypatch.setattr(run, "LOGIT_BYTES", 5 * 4 * V)
    monkeypatch.setattr(run, "_HIDDEN_BYTES", 3 * 24 * 256 * 4)
    add = Records.add

    def watched(
        self: Records, window: int, first: int, logits: torch.Tensor, *rest: object
    ) -> None:
        nonlocal largest
        largest = max(largest, logits.numel() * 4)
        add(self, window, first, logits, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Records, "add", watched)
    small = evaluate(out, parent, **args)
    assert 0 < largest <= 5 * 4 * V
    for name in ("tokens", "perplexity", "kld_mean", "kld_p99", "top1_agreement", "nll_stderr"):
        assert getattr(small, name) == pytest.approx(getattr(large, name), rel=1e-4), name


def test_several_models_share_one_pass_of_the_parent(
    tiny: Maker, converted: Maker, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    models = [converted("rtn", "llama"), converted("rtn", "llama", "bits=3")]
    passes: list[str] = []
    read = StreamedModel.read

    def counted(self: StreamedModel, *args: object) -> object:
        passes.append(self.source.folder.name)
        return read(self, *args)  # type: ignore[arg-type]

    alone = [
        evaluate(m, tiny("llama"), dataset=str(text_file), seqlen=32, max_windows=4) for m in models
    ]
    monkeypatch.setattr(StreamedModel, "read", counted)
    together = run.measure(
        models, tiny("llama"), Protocol("strided", 32), dataset=str(text_file), max_windows=4
    )
    assert [m.figures for m in together] == alone
    assert len(passes) == 3
    assert alone[1].kld_mean > 2 * alone[0].kld_mean


def test_a_decoder_that_cannot_be_derived_is_loaded_whole(tmp_path: Path, text_file: Path):
    # Layers of RWKV hand a state on; what stands around them does not run without it.
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "rwkv", vocab_size=512, num_hidden_layers=2, context_length=64, **sizes
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_side_files(tmp_path)
    assert isinstance(open_model(tmp_path, CPU, torch.float32, "kernel"), WholeModel)
    figures = evaluate(tmp_path, tmp_path, dataset=str(text_file), seqlen=32, max_windows=3)
    assert figures.kld_mean == 0
    assert figures.tokens == 93
    assert figures.bits_per_weight is None


def edited(source: Path, target: Path, change: Callable[[dict[str, object]], None]) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_layer_without_its_packed_tensors(converted: Maker, text_file: Path, tmp_path: Path):
    def forget(config: dict) -> None:
        config["quantization_config"]["ignore"] = ["lm_head"]

    source = converted("rtn", "llama", "ignore=*.0.mlp.down_proj")
    broken = edited(source, tmp_path / "model", forget)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.weight_packed is missing"):
        evaluate(broken, None, dataset=str(text_file), seqlen=32, max_windows=2)
