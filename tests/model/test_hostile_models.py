"""`pq convert` of models that were made to break it: one line, its code, nothing left, the source as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, config_of, random_weights, save_model
from hostile import Call, edit_config, edit_header, header, refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.errors import ModelError
from quantize.files.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from quantize.model.load import load_model

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture
def model(tiny: ModelMaker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture
def refuse(pq: Call, model: Path, tmp_path: Path) -> Callable[..., None]:
    (tmp_path / "here").mkdir()
    return lambda says, *more, code=4, recipe="rtn": refused(
        pq, code, says, model, tmp_path / "here" / "out", "--recipe", recipe, *more
    )


def edit_weights(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(model / SINGLE_NAME)
    change(tensors)
    save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})


# Headers


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (header(b'{"a":' * 200_000), "recursion limit exceeded"),
        (header({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}), "overflow"),
        (header({"a": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 0]}}), "overflow"),
        (header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "not a readable"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, bytes(8)), "not a readable"),
        (header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "not a readable"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)), "not a readable"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)), "invalid offset"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)), "not a readable"),
        (
            header({n: {"dtype": "F32", "shape": [2], "data_offsets": [o, o + 8]} for n, o in (("a", 0), ("b", 4))},
                   bytes(12)),
            "invalid offset",
        ),
        (header({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(99_999)}), "no tensor"),
    ],
    ids=["deep", "product", "sum", "huge", "negative", "dtype", "short", "hole", "backwards", "overlap", "many"],
)  # fmt: skip
def test_header_bombs(refuse: Callable[..., None], model: Path, raw: bytes, says: str):
    (model / SINGLE_NAME).write_bytes(raw)
    refuse(says)


def test_a_tensor_that_a_header_has_twice(refuse: Callable[..., None], model: Path):
    def doubled(text: bytes) -> bytes:
        entry = json.dumps(json.loads(text)[NORM]).encode()
        return text.rstrip()[:-1] + b',"' + NORM.encode() + b'":' + entry + b"}"

    edit_header(model / SINGLE_NAME, doubled)
    refuse(f"key '{NORM}' stands twice")


@pytest.mark.parametrize("at", [100, 0.2, 0.5, 0.999])
def test_flipped_bits_of_weights_that_can_be_seen(
    refuse: Callable[..., None], model: Path, at: float
):
    """The sign and the mantissa of a weight change unseen; an exponent of ones does not."""
    raw = bytearray((model / SINGLE_NAME).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    place = start + 2 * int((len(raw) - start) // 2 * (at if at < 1 else 0))
    raw[place : place + 2] = b"\x81\x7f"  # bfloat16, little endian: NaN
    (model / SINGLE_NAME).write_bytes(raw)
    refuse("holds NaN or Inf")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.o_proj.weight", NORM],
)
def test_norms_and_blocks_that_are_not_finite(
    refuse: Callable[..., None], model: Path, name: str, value: float
):
    edit_weights(model, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    refuse(f"{name}: holds NaN or Inf")


# JSON


@pytest.mark.parametrize(
    ("addition", "says"),
    [
        (', "hidden_size": 64}', "key 'hidden_size' stands twice"),
        (
            ', "rope_parameters": {"rope_type": "yarn", "factor": NaN}, "x": [1e400]}',
            "stands twice",
        ),
        (', "x": {"y": [0, NaN]}}', "x.y.1 is not a finite number"),
        (', "x": 1e400}', "x is not a finite number"),
        (', "x": "\\ud800"}', "surrogates not allowed"),
        (', "x": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_config_json_that_readers_read_differently(
    refuse: Callable[..., None], model: Path, addition: str, says: str
):
    path = model / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + addition)
    refuse(says)


def test_an_index_that_places_a_tensor_twice(pq: Call, tiny: ModelMaker, tmp_path: Path):
    model = Path(shutil.copytree(tiny("llama", shards=2), tmp_path / "model"))
    text = (model / INDEX_NAME).read_text()
    (model / INDEX_NAME).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "../evil",')
    )
    (tmp_path / "here").mkdir()
    refused(
        pq, 4, f"key '{NORM}' stands twice", model, tmp_path / "here" / "out", "--recipe", "rtn"
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"head_dim": 3}, "q_proj.weight is [256, 128], config.json implies [12, 128]"),
        (
            {"num_attention_heads": 3},
            "num_attention_heads 3 is no multiple of num_key_value_heads 2",
        ),
        ({"num_key_value_heads": 4}, "k_proj.weight is [128, 128], config.json implies [256, 128]"),
        ({"hidden_size": 2**31}, "embed_tokens.weight is [300, 128]"),
        ({"intermediate_size": 2**60}, "transformers cannot build this model"),
        ({"intermediate_size": -5}, "transformers cannot build this model"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive integer"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"hidden_act": "__class__"}, "transformers cannot build this model"),
    ],
)
def test_config_json_and_tensors_that_disagree(
    refuse: Callable[..., None], model: Path, fields: dict[str, Any], says: str
):
    edit_config(model, **fields)
    refuse(says)


def test_a_head_that_equals_the_embedding_may_be_tied(pq: Call, model: Path, tmp_path: Path):
    edit_config(model, tie_word_embeddings=True)
    edit_weights(model, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))
    code, _, err = pq(
        "convert", "-m", model, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu"
    )
    assert code == 0, err
    assert HEAD not in Checkpoint(tmp_path / "out")


# Models that are quantized already


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors pack-quantized",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq 4-bit"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"quant_method": "pq", "version": 1}, "pq"),
        ("fp8", "fp8"),
    ],
)
def test_models_that_others_quantized(
    refuse: Callable[..., None], model: Path, quantization: object, named: str
):
    edit_config(model, quantization_config=quantization)
    refuse(f"is quantized already ({named}); give its parent (of quantized models pq reads fp8, ")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_models_that_only_say_they_are_small(refuse: Callable[..., None], model: Path, method: str):
    edit_config(model, quantization_config={"quant_method": method})
    refuse(f"{method} source: config.json says {method} but no tensor is stored so")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_packed_weights_without_a_word_in_config_json(
    pq: Call, refuse: Callable[..., None], model: Path, text_file: Path, dtype: torch.dtype
):
    edit_weights(
        model,
        lambda t: t.update({n: w.to(dtype) for n, w in t.items() if n.endswith("_proj.weight")}),
    )
    eight = dtype == torch.float8_e4m3fn  # whose scales a config.json could tell of
    refuse(
        "but config.json has no quantization_config that says what it means"
        if eight
        else "the source seems to be quantized already, give the original model"
    )
    code, _, err = pq("eval", model, "--dataset", text_file, "--seqlen", 32, "--device", "cpu")
    assert code == 4
    assert (
        "config.json has no quantization_config that says what it means; give the original model"
        in err
    )


def test_tensors_of_other_packings_are_no_weights(refuse: Callable[..., None], model: Path):
    name = "model.layers.0.mlp.up_proj"

    def packed(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.qweight"] = torch.zeros(16, 256, dtype=torch.int32)
        del tensors[f"{name}.weight"]

    edit_weights(model, packed)
    refuse(f"tensor {name}.weight is missing from the checkpoint")


# Links and pipes


@pytest.mark.parametrize("name", ["config.json", SINGLE_NAME, "tokenizer.json", "LICENSE"])
def test_links_out_of_the_folder(
    refuse: Callable[..., None], model: Path, tmp_path: Path, name: str
):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(model / name, tmp_path / "elsewhere" / name)
    (model / name).symlink_to(tmp_path / "elsewhere" / name)
    refuse(
        f"{model / name}: links to {tmp_path / 'elsewhere' / name}, outside the model folder; copy the file there"
    )


def test_links_within_the_folder_and_unread_ones_are_fine(pq: Call, model: Path, tmp_path: Path):
    (model / "store").mkdir()
    for name in ("LICENSE", "tokenizer.json", "config.json"):
        shutil.move(model / name, model / "store" / name)
        (model / name).symlink_to(Path("store") / name)
    (model / ".hidden").symlink_to("/etc/hostname")
    (model / "gone").symlink_to("/nowhere/at/all")
    (model / "folder").symlink_to("/etc")
    code, _, err = pq(
        "convert", "-m", model, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu"
    )
    assert code == 0, err
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert not {".hidden", "gone", "folder", "store"} & {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_links_to_themselves(refuse: Callable[..., None], model: Path, name: str):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(name)
    (model / SINGLE_NAME).unlink()
    refuse("is a link to itself" if name == "config.json" else "holds neither")


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, SINGLE_NAME, "pq.json"])
def test_pipes_are_not_waited_for(pq: Call, refuse: Callable[..., None], model: Path, name: str):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    if name == INDEX_NAME:
        (model / SINGLE_NAME).unlink()
    if name != "pq.json":  # a conversion does not look at what its source was made by
        refuse("is no plain file" if name == "config.json" else "holds neither")
    for command in ("verify", "inspect", "report"):
        code, _, err = pq(command, model)
        assert (code, command) in [(4, command), (7, command), (0, "inspect")], err


def test_source_files_that_may_not_be_read(model: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.open

    def closed(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == SINGLE_NAME:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ModelError, match=r"cannot be read .*Permission denied"):
        Checkpoint(model)


# Tokenizers


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"null", b"\xff\x00", b'{"model": {"type": "BPE", "vocab": 3}}', None],
    ids=["empty", "list", "object", "null", "binary", "model", "truncated"],
)  # fmt: skip
def test_tokenizers_that_are_damaged(
    refuse: Callable[..., None], model: Path, text_file: Path, raw: bytes | None
):
    whole = (model / "tokenizer.json").read_bytes()
    (model / "tokenizer.json").write_bytes(whole[: len(whole) // 2] if raw is None else raw)
    refuse("no usable tokenizer", "--dataset", text_file, code=5, recipe="gptq")


# Both ways of loading


def test_load_model_refuses_what_convert_refuses(model: Path):
    edit_weights(model, lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}))
    with pytest.raises(
        ModelError, match=f"{NORM} is F8_E4M3, but config.json has no quantization_config"
    ):
        load_model(model, torch.device("cpu"), torch.float32)


def test_a_tied_head_of_its_own_is_told_by_eval(
    pq: Call, tmp_path: Path, text_file: Path, tiny: ModelMaker
):
    config = config_of("llama")
    model = save_model(
        tmp_path / "model", config | {"tie_word_embeddings": True}, random_weights(config)
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny("llama") / name, model)
    told = ["--dataset", text_file, "--seqlen", 32, "--device", "cpu", "--json"]
    code, out, err = pq("eval", model, *told)
    assert code == 0, err
    assert "lm_head.weight differs from model.embed_tokens.weight, though config.json ties" in err
    clean = pq("eval", tiny("llama"), *told)[1]
    assert json.loads(out)["perplexity"] == json.loads(clean)["perplexity"]
