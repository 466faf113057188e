from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import config_of, random_weights, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.errors import DataError, ModelError
from quantize.evaluation import Evaluation, evaluate
from quantize.files.checkpoint import INDEX_NAME
from quantize.model.load import bits_per_weight, load_model

CPU = torch.device("cpu")
Maker = Callable[..., Path]


def windows_of(folder: Path, text: Path, seqlen: int, count: int) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(
        text.read_text(encoding="utf-8"), add_special_tokens=False
    )["input_ids"]
    return torch.tensor(ids[: seqlen * count]).view(count, seqlen)


def plain_figures(
    ours: torch.nn.Module, parent: torch.nn.Module, windows: torch.Tensor
) -> dict[str, float]:
    """Every figure by its definition, one prediction at a time where that matters, in float64."""
    nll, parent_nll, kld, agree = [], [], [], []
    for window in windows:
        with torch.no_grad():
            q, p = (
                model(window[None]).logits[0, :-1].double().log_softmax(-1)
                for model in (ours, parent)
            )
        nll += [-float(q[i, token]) for i, token in enumerate(window[1:])]
        parent_nll += [-float(p[i, token]) for i, token in enumerate(window[1:])]
        kld += (p.exp() * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    n = len(nll)
    return {
        "tokens": n,
        "perplexity": math.exp(sum(nll) / n),
        "baseline_perplexity": math.exp(sum(parent_nll) / n),
        "kld_mean": sum(kld) / n,
        "kld_p99": sorted(kld)[math.ceil(0.99 * n) - 1],
        "top1_agreement": sum(agree) / n,
    }


def test_figures_follow_their_definitions(converted: Maker, tiny: Maker, text_file: Path):
    out, parent = converted("rtn", "qwen2", "bits=3"), tiny("qwen2")
    result = evaluate(out, parent, dataset=str(text_file), seqlen=32, max_windows=7)
    models = [
        load_model(out, CPU, torch.float32),
        AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32),
    ]
    expected = plain_figures(models[0], models[1].eval(), windows_of(parent, text_file, 32, 7))
    assert expected["tokens"] == 7 * 31
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-4), name
    assert 0.001 < result.kld_mean < result.kld_p99
    assert result.top1_agreement < 1
    assert result.bits_per_weight == 3.125
    assert result.protocol == "strided-32"


def test_batching_does_not_change_the_figures(tiny: Maker, converted: Maker, text_file: Path):
    args = (converted("rtn", "mistral"), tiny("mistral"))
    short = evaluate(*args, dataset=str(text_file), seqlen=16, max_windows=20)
    many = evaluate(
        *args,
        dataset=str(text_file),
        seqlen=16,
        max_windows=20,
        progress=lambda what, done, total: None,
    )
    assert short == many
    windows = windows_of(tiny("mistral"), text_file, 16, 20)
    model = load_model(args[0], CPU, torch.float32)
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits for window in windows])
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    assert short.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(
    tiny: Maker, converted: Maker, text_file: Path, model_type: str
):
    for folder in (tiny(model_type), converted("rtn", model_type)):
        result = evaluate(folder, folder, dataset=str(text_file), seqlen=24, max_windows=4)
        assert result.kld_mean == result.kld_p99 == 0
        assert result.top1_agreement == 1
        assert result.perplexity == result.baseline_perplexity


def test_without_a_baseline_there_is_nothing_to_compare(tiny: Maker, text_file: Path):
    result = evaluate(tiny("llama"), None, dataset=str(text_file), seqlen=24, max_windows=2)
    assert (
        result.baseline_perplexity
        is result.kld_mean
        is result.kld_p99
        is result.top1_agreement
        is None
    )
    assert result.bits_per_weight is None
    assert result.tokens == 46


def test_the_keys_are_documented():
    names = {field.name for field in dataclasses.fields(Evaluation)}
    assert names >= {
        "protocol", "tokens", "perplexity", "baseline_perplexity", "kld_mean", "kld_p99", "top1_agreement",
        "bits_per_weight",
    }  # fmt: skip


def test_numerics_differ_only_for_fp8_activations(converted: Maker, text_file: Path):
    def perplexity(folder: Path, numerics: str) -> float:
        choice = "kernel" if numerics == "kernel" else "stock"
        return evaluate(
            folder, None, dataset=str(text_file), seqlen=32, max_windows=3, numerics=choice
        ).perplexity

    plain, fp8 = converted("rtn", "llama"), converted("fireq-paper-linear", "llama")
    assert perplexity(plain, "kernel") == perplexity(plain, "stock")
    assert perplexity(fp8, "kernel") != perplexity(fp8, "stock")


def test_progress_reaches_its_end(tiny: Maker, text_file: Path):
    calls: list[tuple[str, int, int]] = []
    evaluate(
        tiny("llama"),
        None,
        dataset=str(text_file),
        seqlen=24,
        max_windows=2,
        progress=lambda *call: calls.append(call),
    )
    assert calls[0][1] == 0
    assert calls[-1][1] == calls[-1][2]


# Refusals


def test_a_baseline_of_another_vocabulary(tiny: Maker, text_file: Path):
    with pytest.raises(
        DataError, match=r"has 300 tokens and .* 400; --baseline must be the model's parent"
    ):
        evaluate(tiny("llama"), tiny("llama", vocab_size=400), dataset=str(text_file), seqlen=16)


def test_text_that_is_too_short(tiny: Maker, tmp_path: Path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(DataError, match="not one window of 512; lower seqlen"):
        evaluate(tiny("llama"), None, dataset=str(tmp_path / "short.txt"))


def test_a_model_without_a_tokenizer(tiny: Maker, text_file: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(
        DataError, match=r"no usable tokenizer: .*put tokenizer\.json and tokenizer_config\.json"
    ):
        evaluate(folder, None, dataset=str(text_file), seqlen=16)
    for broken in ("", "{}", "[", '{"model": 3}'):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(DataError, match=r"no usable tokenizer"):
            evaluate(folder, None, dataset=str(text_file), seqlen=16)


def test_a_model_that_computes_nan(tmp_path: Path, tiny: Maker, text_file: Path):
    config = config_of("llama")
    weights = random_weights(config)
    weights["model.norm.weight"][3] = float("nan")
    folder = save_model(tmp_path / "model", config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny("llama") / name, folder)
    with pytest.raises(ModelError, match="its logits are not finite"):
        evaluate(folder, None, dataset=str(text_file), seqlen=16, max_windows=1)


@pytest.fixture
def packed(converted: Maker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("rtn", "llama"), tmp_path / "packed"))


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not one that pq reads"),
        ("gptq", "quant_method 'gptq' is not one that pq reads"),
        ({"quant_method": "compressed-tensors"}, "quantization_config is not one that pq reads"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
            "quantization_config is not one",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": []},
            "quantization_config is not one",
        ),
    ],
)
def test_packings_that_are_not_ours(packed: Path, quantization: object, says: str):
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ModelError, match=says):
        load_model(packed, CPU, torch.float32)


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the shard of block 0 and the index with it."""
    shard = folder / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    index = json.loads((folder / INDEX_NAME).read_text())
    where = {name: s for name, s in index["weight_map"].items() if s != shard.name}
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": where | dict.fromkeys(tensors, shard.name)})
    )


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{NAME}.weight_scale"), rf"tensor {NAME}\.weight_scale is missing"),
        (
            lambda t: t.pop("model.layers.0.input_layernorm.weight"),
            r"tensor .*input_layernorm\.weight is missing",
        ),
        (
            lambda t: t.update(
                {f"{NAME}.weight_packed": t[f"{NAME}.weight_packed"][:, :1].clone()}
            ),
            f"{NAME}: weight_p",
        ),
        (
            lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"].double()}),
            f"{NAME}: .*scale torch.float64",
        ),
        (lambda t: t.update({f"{NAME}.weight_shape": torch.tensor([8, 8])}), f"{NAME}: "),
        (lambda t: t.update({f"{NAME}.weight_shape": torch.tensor([8])}), f"{NAME}: "),
        (lambda t: t.update({f"{NAME}.weight_shape": torch.tensor([-8, 1 << 60])}), f"{NAME}: "),
        (
            lambda t: t.update({f"{NAME}.extra": torch.ones(1)}),
            rf"tensor {NAME}\.extra has no place",
        ),
        (
            lambda t: t.update({"model.layers.0.input_layernorm.weight": torch.ones(7)}),
            r"input_layernorm\.weight",
        ),
    ],
)
def test_packed_tensors_that_do_not_fit(packed: Path, change: Callable[..., object], says: str):
    edit_shard(packed, change)
    with pytest.raises(ModelError, match=says) as caught:
        load_model(packed, CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_scales_that_others_store_in_their_own_dtype_are_read(packed: Path):
    """llm-compressor writes them in the dtype that the model was loaded in."""
    before = load_model(packed, CPU, torch.float32).state_dict()
    edit_shard(
        packed,
        lambda t: t.update({n: t[n].float() for n in t if n.endswith(".weight_scale")}),
    )
    for name, tensor in load_model(packed, CPU, torch.float32).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_plain_model_that_lacks_a_tensor_is_not_filled_up(tmp_path: Path):
    config = config_of("llama")
    weights = random_weights(config)
    del weights["model.layers.1.mlp.up_proj.weight"]
    folder = save_model(tmp_path / "model", config, weights)
    with pytest.raises(
        ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"
    ):
        load_model(folder, CPU, torch.float32)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    with pytest.raises(ModelError, match="transformers cannot load this model"):
        load_model(save_model(tmp_path / "model", config, weights), CPU, torch.float32)


def test_bits_per_weight_weighs_by_size(converted: Maker, tiny: Maker):
    assert bits_per_weight(load_model(tiny("llama"), CPU, torch.float32)) is None
    mixed = load_model(converted("rtn", "llama", "bits=8", "group_size=32"), CPU, torch.bfloat16)
    assert bits_per_weight(mixed) == 8.5
    assert mixed.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
