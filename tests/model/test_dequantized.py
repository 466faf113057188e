"""Small sources as 16-bit checkpoints, against what stock transformers dequantizes; hostile ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker, config_of, random_weights, save_model
from safetensors.torch import load_file, save_file
from small_sources import float_quantized, fp8, gpt_oss
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quantize.errors import ModelError
from quantize.files.checkpoint import SINGLE_NAME, Checkpoint
from quantize.files.finite import require_finite_floats
from quantize.model import dequantized
from quantize.model.dequantized import open_source, require_source
from quantize.model.load import load_model, require_readable

DOWN = "model.layers.1.mlp.down_proj.weight"
MAKERS: dict[str, Callable[[Path], Path]] = {
    "blocks": fp8,
    "blocks with bfloat16 scales": lambda folder: fp8(folder, dtype=torch.bfloat16),
    "blocks, tied": lambda folder: fp8(folder, tie_word_embeddings=True),
    "tensor of compressed-tensors": lambda folder: float_quantized(folder, "tensor"),
    "channel": lambda folder: float_quantized(folder, "channel"),
    "block": lambda folder: float_quantized(folder, "block"),
    "naive": lambda folder: float_quantized(folder, "channel", "naive-quantized"),
    "mxfp4": gpt_oss,
}


def stock(folder: Path) -> dict[str, Tensor]:
    """What transformers makes of a small checkpoint on a CPU."""
    options = {}
    if "compressed" in (folder / "config.json").read_text():
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    out: dict[str, Tensor] = model.state_dict()
    return out


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore:You passed")
def test_every_tensor_is_what_transformers_dequantizes(kind: str, tmp_path: Path):
    source = open_source(MAKERS[kind](tmp_path / "model"))
    theirs = stock(source.folder)
    if "lm_head.weight" not in source:
        theirs.pop("lm_head.weight")
    assert set(source.names()) == set(theirs)
    require_readable(source)
    for name, tensor in source.tensors("").items():
        assert tensor.dtype == torch.bfloat16
        assert source.shapes[name] == tuple(tensor.shape)
        assert source.dtypes[name] == "BF16"
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("block", "form"), [(None, "FP8 with one scale a tensor"), (96, "FP8 in blocks of 96x96")]
)
def test_fp8_that_transformers_cannot_dequantize(block: int | None, form: str, tmp_path: Path):
    """Static scales of activations, and blocks of which the last is cut off."""
    source = open_source(fp8(tmp_path / "model", block=block))
    raw = load_file(source.folder / SINGLE_NAME)
    scale = raw[f"{DOWN}_scale_inv"].double().reshape(-1, 1 if block is None else 6)
    N, K = raw[DOWN].shape
    spread = (
        scale
        if block is None
        else scale.repeat_interleave(96, 0)[:N].repeat_interleave(96, 1)[:, :K]
    )
    exact = raw[DOWN].double() * spread
    assert torch.equal(source.tensor(DOWN), exact.to(torch.bfloat16))
    found = source.dequantized
    assert found
    assert (found.format, found.tensors, found.dropped) == (form, 14, 0 if block else 14)
    assert found.stored_bytes == (source.folder / SINGLE_NAME).stat().st_size
    assert not source.names("model.layers.0.self_attn.q_proj.weight_")


@pytest.mark.parametrize("kind", ["blocks", "channel", "mxfp4"])
def test_a_few_rows(kind: str, tmp_path: Path):
    source = open_source(MAKERS[kind](tmp_path / "model"))
    for name in source.names("model.layers.1."):
        whole, size = source.tensor(name), source.shapes[name][0]
        for first, end in ((0, 1), (size // 2, size), (size - 1, size)):
            assert torch.equal(source.rows(name, first, end), whole[first:end])
        assert torch.equal(source.slice(name, size // 3), whole[size // 3])
        for first, end in ((0, size + 1), (-1, 1), (1, 1)):
            with pytest.raises(ModelError, match=f"has no entries {first} to {end}"):
                source.rows(name, first, end)


def test_rows_of_a_plain_checkpoint(tiny: ModelMaker):
    source = Checkpoint(tiny("llama"))
    assert torch.equal(source.rows(DOWN, 3, 9), source.tensor(DOWN)[3:9])
    assert torch.equal(source.slice(DOWN, 5), source.tensor(DOWN)[5])
    with pytest.raises(ModelError, match=r"is \[128, 256\] and has no entries 100 to 129"):
        source.rows(DOWN, 100, 129)
    with pytest.raises(ModelError, match="tensor nothing is missing from the checkpoint"):
        source.slice("nothing", 0)
    assert source.dequantized is None
    assert open_source(source.folder).dequantized is None


def test_one_strip_after_the_other_is_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = fp8(tmp_path / "model")
    whole = open_source(folder).tensor(DOWN)
    monkeypatch.setattr(dequantized, "_STRIP", 33 * 512)
    source = open_source(folder)
    asked: list[tuple[int, int]] = []
    small = dict(source._small)  # type: ignore[attr-defined]
    values = type(small[DOWN]).values

    def noted(self: Any, first: int, end: int, stored: Any) -> Tensor:
        asked.append((first, end))
        return values(self, first, end, stored)

    monkeypatch.setattr(type(small[DOWN]), "values", noted)
    assert torch.equal(source.tensor(DOWN), whole)
    assert asked == [(first, min(first + 33, 256)) for first in range(0, 256, 33)]


def test_hidden_tensors_are_not_there(tmp_path: Path):
    source = open_source(fp8(tmp_path / "model"))
    for name in (f"{DOWN}_scale_inv", "nothing"):
        assert name not in source
        for read in (source.tensor, lambda n: source.rows(n, 0, 1)):
            with pytest.raises(ModelError, match=f"tensor {name} is missing"):
                read(name)
    assert "quantization_config" not in source.config
    assert source.hashes() == Checkpoint(source.folder).hashes()
    assert source.side_files() == Checkpoint(source.folder).side_files()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_that_config_json_says(dtype: str, key: str, tmp_path: Path):
    folder = fp8(tmp_path / "model")
    edit(folder, lambda c: (c.pop("dtype"), c.update({key: dtype})))
    source = open_source(folder)
    assert source.dequantized
    assert source.dequantized.dtype == dtype
    assert source.tensor(DOWN).dtype == getattr(torch, dtype)
    require_readable(source)
    edit(folder, lambda c: c.update({key: "float8_e4m3fn"}))
    assert open_source(folder).tensor(DOWN).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["blocks", "mxfp4"])
def test_a_whole_model(kind: str, tmp_path: Path):
    """Also one that pq does not stream: transformers places what pq dequantized."""
    folder = MAKERS[kind](tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    tokens = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        ours = load_model(folder, CPU, torch.float32)(tokens).logits
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


# Hostile ones


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{DOWN}_scale_inv"), f"fp8 source: {DOWN} is FP8 but its scale is missing"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(2, 5)}), rf"{DOWN}_scale_inv is \[2, 5\]"),
        (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), "is the scale of no FP8 tensor"),
        (lambda t: t.update({DOWN: t[DOWN].view(torch.int8)}), "is the scale of no FP8 tensor"),
        (lambda t: t.update(x=torch.ones(3, dtype=torch.int32)), "x is I32, which fp8 has no use for"),
    ],
)  # fmt: skip
def test_headers_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], object], says: str, tmp_path: Path
):
    folder = fp8(tmp_path / "model")
    edit_weights(folder, change)
    with pytest.raises(ModelError, match=says):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[f"{DOWN}_scale_inv"].fill_(0), f"{DOWN}: {DOWN}_scale_inv is zero where"),
        (lambda t: t[f"{DOWN}_scale_inv"][1, 2:3].fill_(torch.nan), "negative or no number"),
        (lambda t: t[f"{DOWN}_scale_inv"][1, 2:3].neg_(), "negative or no number"),
        (lambda t: t[f"{DOWN}_scale_inv"].fill_(3e38), f"{DOWN}: codes times scales are more than"),
        (lambda t: t[DOWN].view(torch.uint8)[9, 9:10].fill_(255), f"{DOWN}: holds FP8 codes that"),
    ],
)  # fmt: skip
def test_values_that_no_quantizer_writes(
    change: Callable[[dict[str, Tensor]], object], says: str, tmp_path: Path
):
    folder = fp8(tmp_path / "model")
    edit_weights(folder, change)
    source = open_source(folder)  # headers are right
    with pytest.raises(ModelError, match=says):
        source.tensor(DOWN)
    with pytest.raises(ModelError, match=says):
        source.require_finite()


def test_zero_points_of_fp8_must_be_zero(tmp_path: Path):
    folder = float_quantized(tmp_path / "model", "channel")
    zero = f"{DOWN}_zero_point"
    before = open_source(folder).tensor(DOWN)
    edit_weights(folder, lambda t: t.update({zero: torch.zeros(256, 1).to(torch.float8_e4m3fn)}))
    assert torch.equal(open_source(folder).tensor(DOWN), before)
    edit_weights(folder, lambda t: t[zero].view(torch.uint8)[3:4].fill_(0x38))
    with pytest.raises(ModelError, match=f"{zero} is not zero, but FP8 is symmetric"):
        open_source(folder).tensor(DOWN)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strategy": "token"}, "strategy 'token' of FP8 weights with None is not known"),
        ({"strategy": "block", "block_structure": "128x128"}, "with '128x128' is not known"),
        ({"strategy": "group", "group_size": 0}, r"with \[1, 0\] is not known"),
        ({"symmetric": False}, "zero points"),
        ({"strategy": "tensor"}, r"weight_scale is \[\d+, 1\], .* implies \[1, 1\]"),
    ],
)
def test_groups_of_compressed_tensors_that_are_not_known(
    change: dict[str, Any], says: str, tmp_path: Path
):
    folder = float_quantized(tmp_path / "model", "channel")
    edit(
        folder,
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(change),
    )
    with pytest.raises(ModelError, match=says):
        open_source(folder)


def test_groups_along_the_inputs(tmp_path: Path):
    source = open_source(float_quantized(tmp_path / "model", "group"))
    raw = load_file(source.folder / SINGLE_NAME)
    exact = raw[DOWN].double() * raw[f"{DOWN}_scale"].double().repeat_interleave(64, 1)
    assert torch.equal(source.tensor(DOWN), exact.to(torch.bfloat16))


def test_fp8_without_a_word_in_config_json_stays_refused(tmp_path: Path):
    folder = fp8(tmp_path / "model")
    edit(folder, lambda c: c.pop("quantization_config"))
    source = open_source(folder)
    assert source.dequantized is None
    with pytest.raises(
        ModelError, match=r"is F8_E4M3, but config\.json has no quantization_config"
    ):
        require_readable(source)
    with pytest.raises(ModelError, match=r"F8_E4M3, .* give the model's own config\.json"):
        require_source(source)
    with pytest.raises(ModelError, match="float8_e4m3fn is not a plain float"):
        require_finite_floats({DOWN: source.tensor(DOWN)}, "")


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"is quantized already \(gptq 4-bit\); give its parent"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"\(bitsandbytes 8-bit\)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"\(compressed-tensors pack-quantized\)"),
        ("awq", r"\(awq\)"),
    ],
)  # fmt: skip
def test_other_quantized_models_are_named(section: Any, says: str, tmp_path: Path):
    config = config_of("llama")
    folder = save_model(tmp_path / "model", config, random_weights(config))
    edit(folder, lambda c: c.update(quantization_config=section))
    with pytest.raises(ModelError, match=says) as caught:
        require_source(open_source(folder))
    assert "of quantized models pq reads fp8, compressed-tensors float-quantized, mxfp4" in str(
        caught.value
    )


def test_a_folder_with_a_gguf_file_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ModelError, match=r"model-Q4_K_M.gguf: GGUF files are quantized already .* in safetensors"
    ):
        open_source(tmp_path)


def test_transforms_at_run_time_are_not_read(tmp_path: Path):
    """Rotated weights are another model without the rotation of what they are multiplied with."""
    folder = float_quantized(tmp_path / "model", "channel")
    edit(folder, lambda c: c["quantization_config"].update(transform_config={"config_groups": {}}))
    assert open_source(folder).dequantized
    rotated = {"config_groups": {"R4": {"type": "hadamard", "apply": []}}}
    edit(folder, lambda c: c["quantization_config"].update(transform_config=rotated))
    with pytest.raises(ModelError, match="transform_config changes activations at run time; give"):
        open_source(folder)
