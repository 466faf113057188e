"""What a conversion refuses, and that nothing remains of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, config_of, random_weights, request_for, save_model
from torch import Tensor

from quantize.conversion.loop import Request, convert
from quantize.errors import DataError, ModelError, OutputError, PqError
from quantize.recipe.recipe import load_recipe
from quantize.verification import verify

Maker = Callable[..., Path]


def refused(
    folder: Path, text: Path, where: Path, says: str, *changes: str, recipe: str = "rtn"
) -> None:
    before = sorted(where.iterdir())
    with pytest.raises(PqError, match=says) as caught:
        convert(request_for(folder, recipe, where / "out", text, *changes))
    assert "\n" not in str(caught.value)
    assert sorted(where.iterdir()) == before


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """Save a llama after a change to its weights or its config; the work goes on in tmp_path / "work"."""
    (tmp_path / "work").mkdir()

    def make(change: Callable[[dict[str, Tensor]], Any] = lambda w: None, **fields: Any) -> Path:
        config = config_of("llama")
        weights = random_weights(config)
        change(weights)
        return save_model(tmp_path / "model", config | fields, weights)

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_weights_that_are_not_finite(
    broken: Maker, text_file: Path, tmp_path: Path, name: str, value: float
):
    model = broken(lambda w: w[name].view(-1)[5:6].fill_(value))
    refused(model, text_file, tmp_path / "work", f"{name}: holds NaN or Inf")


NAME = "model.layers.1.self_attn.k_proj.weight"


def put(name: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: tensor(weights.get(name, torch.ones(1)))})


@pytest.mark.parametrize(
    ("change", "fields", "says"),
    [
        (put(NAME, lambda t: t.to(torch.int8)), {}, f"{NAME}: dtype int8 .* quantized already"),
        (put(NAME, lambda t: t.to(torch.float8_e4m3fn)), {}, "F8_E4M3, .* no quantization_config"),
        (put(NAME, lambda t: t[:64].clone()), {}, rf"{NAME} is \[64, 128\], .* implies \[128, 128\]"),
        (lambda w: w.pop(NAME), {}, f"tensor {NAME} is missing"),
        (lambda w: w.pop("model.norm.weight"), {}, "tensor model.norm.weight is missing"),
        (lambda w: w.pop("model.embed_tokens.weight"), {}, "tensor model.embed_tokens.weight is missing"),
        (lambda w: w.pop("lm_head.weight"), {}, "tensor lm_head.weight is missing"),
        (lambda w: None, {"num_hidden_layers": 3}, r"says 3 layers but there is no tensor model\.layers\.2\.\*"),
        (lambda w: None, {"num_hidden_layers": 10**6}, r"no tensor model\.layers\.999999\.\*"),
        (lambda w: None, {"vocab_size": 256}, r"embed_tokens.weight is \[300, 128\]"),
        (lambda w: None, {"vocab_size": 512}, r"embed_tokens.weight is \[300, 128\]"),
        (lambda w: None, {"model_type": "gpt9"}, "model_type 'gpt9' is not supported"),
        (lambda w: None, {"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(
    broken: Maker,
    text_file: Path,
    tmp_path: Path,
    change: Callable[..., Any],
    fields: dict[str, Any],
    says: str,
):
    refused(broken(change, **fields), text_file, tmp_path / "work", says)


def test_our_own_output_is_refused_as_input(converted: Maker, text_file: Path, tmp_path: Path):
    refused(
        converted("rtn", "llama"), text_file, tmp_path, "is quantized already .* give its parent"
    )


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (
            "group_size: 96, strict: true",
            r"q_proj: 128 inputs are no multiple of the group 96; set group_size to 64 or strict to false, or",
        ),
        (
            "layers: ['*.qproj']",
            r"pattern '\*\.qproj' matches no linear .*model\.layers\.0\.self_attn\.q_proj",
        ),
        ("layers: ['lm_head']", r"pattern 'lm_head' matches no linear .* head_bits"),
    ],
)
def test_recipes_that_do_not_fit(
    tiny: Maker, text_file: Path, tmp_path: Path, stage: str, says: str
):
    (tmp_path / "r.yaml").write_text(f"description: d\nstages: [{{method: rtn, {stage}}}]")
    refused(tiny("llama"), text_file, tmp_path, says, recipe=str(tmp_path / "r.yaml"))


def test_fp8_kernels_need_whole_tiles(tiny: Maker, text_file: Path, tmp_path: Path):
    model = tiny("llama", head_dim=32)
    refused(
        model,
        text_file,
        tmp_path,
        r"k_proj: 64 outputs are no multiple of 128, which",
        "activations=fp8",
        "strict=true",
    )
    (tmp_path / "r.yaml").write_text(
        "description: d\nstages: [{method: rtn, activations: fp8, strict: true, ignore: ['*.k_proj', '*.v_proj']}]"
    )
    convert(request_for(model, str(tmp_path / "r.yaml"), tmp_path / "out", text_file))
    assert (tmp_path / "out" / "config.json").exists()


def test_tokenizers_that_are_absent_or_foreign(
    tiny: Maker, broken: Maker, text_file: Path, tmp_path: Path
):
    refused(
        broken(),
        text_file,
        tmp_path / "work",
        "no usable tokenizer: .*put tokenizer.json",
        recipe="gptq",
    )
    refused(
        tiny("llama", vocab_size=128),
        text_file,
        tmp_path / "work",
        "outside the model's vocabulary",
        recipe="gptq",
    )


def test_an_output_in_use_is_refused_first(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    request = Request(
        tmp_path / "no model at all", load_recipe("rtn"), tmp_path / "out", CPU, torch.float32
    )
    with pytest.raises(PqError, match="exists and is not an empty folder"):
        convert(request)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(
    tiny: Maker, text_file: Path, tmp_path: Path, error: type[BaseException]
):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "quantizing" and done == 1:
            raise error

    with pytest.raises(error):
        convert(request_for(tiny("llama"), "gptq", tmp_path / "out", text_file), interrupt)
    assert not list(tmp_path.iterdir())


def test_errors_have_the_documented_classes(tiny: Maker, tmp_path: Path):
    request = request_for(tiny("llama"), "gptq", tmp_path / "out", tmp_path / "none.txt")
    with pytest.raises(DataError):
        convert(request)
    with pytest.raises(ModelError):
        convert(request_for(tmp_path / "none", "rtn", tmp_path / "out", tmp_path / "none.txt"))
    shutil.copytree(tiny("llama"), tmp_path / "out")
    with pytest.raises(OutputError):
        convert(request)


def test_paths_of_any_letters_work(tiny: Maker, text_file: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "modèle 模型 'x'"))
    output = tmp_path / "sortie\u202e [é]" / "a b"
    convert(request_for(model, "gptq", output, text_file))
    assert verify(output, model).ok
