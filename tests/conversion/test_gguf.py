"""`format: gguf` from end to end: transformers' own reader of GGUF files computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import CPU, ModelMaker, config_of, random_weights, save_model, save_side_files
from gguf.quants import dequantize
from resumed import files_of, request, stopped_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.conversion.loop import convert
from quantize.errors import ModelError, RecipeError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.registry import open_checkpoint
from quantize.inspect.inspection import inspect
from quantize.model.linear import PackedLinear
from quantize.model.load import load_model
from quantize.recipe.recipe import parse_recipe
from quantize.verification.run import verify

RTN = "format: gguf, stages: [{method: rtn, group_size: 64}]"
PATTERN: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "sliding_window": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
SQUARE = {"num_attention_heads": 2}  # transformers takes heads of a GGUF file to be so
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SQUARE,
    "mistral": {"sliding_window": None},
    "qwen2": SQUARE | {"tie_word_embeddings": True},
    "qwen3": SQUARE | {"head_dim": 128},  # its default, which transformers assumes
    "gemma3_text": PATTERN,
}
TOKENS = torch.arange(2, 258).view(4, 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """As conftest's, of sizes that are lists and mappings as well."""
    made: dict[str, Path] = {}

    def make(kind: str, **sizes: Any) -> Path:
        key = json.dumps([kind, sizes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = config_of(kind, **sizes)
            save_model(folder, config, random_weights(config, seed=len(made)))
            save_side_files(folder)
            made[key] = folder
        return made[key]

    return make


def converted(
    tiny: ModelMaker, text: Path, output: Path, body: str, kind: str = "llama", **sizes: Any
) -> tuple[Path, Any]:
    """The parent and the summary of a conversion."""
    parent = tiny(kind, **(FAMILIES[kind] | sizes))
    return parent, convert(request(body, parent, text, output))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_computes_the_same_in_stock_transformers(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, kind: str
):
    out = tmp_path / "out"
    parent, _ = converted(tiny, text_file, out, RTN, kind)
    ours = load_model(out, CPU, torch.float32)
    assert sum(isinstance(m, PackedLinear) for m in ours.modules()) % 7 == 0
    kwargs = {"gguf_file": "model.gguf", "dtype": torch.float32}
    if kind != "mistral":  # which transformers takes for a kind of its own by the model's name
        alone = tmp_path / "alone"  # nothing but the file
        alone.mkdir()
        shutil.copy(out / "model.gguf", alone)
        stock = AutoModelForCausalLM.from_pretrained(alone, **kwargs)
        assert torch.allclose(stock(TOKENS).logits, ours(TOKENS).logits, atol=2e-4)
    # The same codes in the other format, read by another reader of ours.
    packed = tmp_path / "packed"
    convert(request(RTN.replace("gguf", "compressed-tensors"), parent, text_file, packed))
    wanted = load_model(packed, CPU, torch.float32)(TOKENS).logits
    assert torch.allclose(ours(TOKENS).logits, wanted, atol=1e-3, rtol=1e-3)
    checked = verify(out, parent)
    assert checked.ok, checked.first_failure
    assert {check.name for check in checked.checks if check.ok} >= {"untouched", "recomputed"}


def test_integers_stand_in_the_file_bit_for_bit(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    """Read by the package gguf, rows put back in order by a formula of this test."""
    parent, summary = converted(tiny, text_file, tmp_path / "out", RTN)
    convert(
        request(RTN.replace("gguf", "compressed-tensors"), parent, text_file, tmp_path / "packed")
    )
    wanted = load_model(tmp_path / "packed", CPU, torch.float32)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    held = {t.name: t for t in reader.tensors}
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "ffn_down": "mlp.down_proj",
    }
    for theirs, name in names.items():
        tensor = held[f"blk.1.{theirs}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        value = wanted.get_submodule(f"model.layers.1.{name}").packed.unpack()
        if theirs != "ffn_down":
            pairs = torch.arange(64).view(2, 32).T.reshape(-1)  # 0, 32, 1, 33, …
            value = value.view(-1, 64, value.shape[1])[:, pairs].reshape(value.shape)
        assert torch.equal(found, value), theirs
    assert not [line for line in summary.lost if "float16" in line]
    assert summary.bits_per_weight == 4.5
    assert held["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert held["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_embedding_and_head_in_eight_bits(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, kind: str
):
    body = f"head_bits: 8, embedding_bits: 8, {RTN}"
    parent, _ = converted(tiny, text_file, tmp_path / "out", body, kind)
    tied = kind == "qwen2"
    kinds = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
    }
    assert kinds["token_embd.weight"] == "Q8_0"
    assert ("output.weight" in kinds) != tied
    assert kinds.get("output.weight", "Q8_0") == "Q8_0"
    model = load_model(tmp_path / "out", CPU, torch.float32)
    theirs = load_model(parent, CPU, torch.float32)
    ours, given = (m.get_input_embeddings().weight for m in (model, theirs))
    assert 0 < (ours - given).norm() < 0.01 * given.norm()
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    assert torch.allclose(stock(TOKENS).logits, model(TOKENS).logits, atol=2e-4)
    checked = verify(tmp_path / "out", parent)
    assert checked.ok, checked.first_failure


def test_blocks_of_their_own_are_fitted(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    errors = {}
    for kind, bits in (("q4_0", 4.5), ("q4_1", 5.0), ("q8_0", 8.5)):
        body = f"format: gguf, stages: [{{method: awq}}, {{method: gguf, type: {kind}}}]"
        out = tmp_path / kind
        parent, summary = converted(tiny, text_file, out, body)
        assert summary.bits_per_weight == bits
        errors[kind] = summary.mean_output_error
        checked = verify(out, parent)
        assert checked.ok, checked.first_failure
        totals = inspect(out).totals
        assert totals.quantized_bits_per_weight == bits
        assert inspect(out).formats == (f"gguf {kind}",)
    assert errors["q8_0"] < errors["q4_1"] < errors["q4_0"]


def test_the_tokenizer_goes_along(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    converted(tiny, text_file, tmp_path / "out", RTN)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")

    def value(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = value("ggml.tokens")
    assert tokens[: len(tokenizer)] == [
        tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))
    ]
    assert tokens[len(tokenizer) :] == [f"[PAD{i}]" for i in range(len(tokenizer), 300)]
    assert (value("ggml.model"), value("ggml.pre")) == ("gpt2", "gpt-2")
    assert value("ggml.token_type")[:3] == [3, 3, 1]
    assert (value("ggml.bos_token_id"), value("ggml.eos_token_id")) == (0, 1)
    assert value("ggml.add_bos_token") is False
    assert "messages" in value("chat_template")
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "The lazy dog, isn't 3.14 naïve?\n\n  A model"
    assert again(text).input_ids == tokenizer(text).input_ids


def test_llama3_frequencies(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    """What the file divides frequencies by is what transformers does to them."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    parent = tiny("llama", rope_parameters=rope)
    convert(request(RTN, parent, text_file, tmp_path / "out"))
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    found = torch.tensor(held["rope_freqs.weight"].data.copy())
    scaled = load_model(parent, CPU, torch.float32).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / found, scaled, rtol=1e-5)
    assert found.max() == 4.0
    assert found.min() == 1.0
    assert len(found.unique()) > 3
    assert verify(tmp_path / "out", parent).ok


def test_a_stopped_conversion_goes_on(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    parent = tiny("llama", num_hidden_layers=3)
    asked = request(RTN, parent, text_file, tmp_path / "out", work=tmp_path / "w", resume="auto")
    stopped_after(asked, 2)
    kept = {path.name for path in (tmp_path / "w" / "partial").iterdir()}
    assert kept == {f"part-0000{i}.safetensors" for i in (1, 2, 3)}
    convert(asked)
    convert(request(RTN, parent, text_file, tmp_path / "once"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.gguf" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    hashes = json.loads((tmp_path / "out" / "pq.json").read_text())["files"]
    assert set(hashes) == names - {"pq.json"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("stages: [{method: fireq}]", "activations: llama.cpp has no FP8 activations"),
        ("stages: [{method: rtn, group_size: 48}]", "group_size: blocks have 32 inputs"),
        ("stages: [{method: sbvr}]", "method: llama.cpp cannot do this; set format to pq"),
        ("stages: [{method: fireq-attention}, {method: rtn}]", "llama.cpp has no INT4 cache"),
        ("stages: [{method: rotate, down: true}, {method: rtn}]", "down: llama.cpp cannot do this"),
    ],
)
def test_recipes_that_blocks_do_not_hold(body: str, message: str):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"{{description: d, format: gguf, {body}}}", "r.yaml")


def test_blocks_need_the_format():
    with pytest.raises(RecipeError, match=r"method: needs 'format: gguf', whose blocks these are"):
        parse_recipe("{description: d, stages: [{method: gguf}]}", "r.yaml")
    with pytest.raises(RecipeError, match=r"embedding_bits: needs 'format: gguf'"):
        parse_recipe("{description: d, embedding_bits: 8, stages: [{method: rtn}]}", "r.yaml")


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("helium", {}, "models of type 'helium' are not written for llama.cpp"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"intermediate_size": 272}, "272 inputs are no multiple of the block 32"),
        ("gemma3_text", PATTERN | {"query_pre_attn_scalar": 100}, "divides by the root of 256"),
        ("gemma3_text", PATTERN | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (
            "gemma3_text",
            PATTERN | {"layer_types": ["sliding_attention"] * 6},
            "full attention in every 6th layer",
        ),
        ("qwen2", {"num_attention_heads": 4}, "its 4 heads are not as wide together"),
        ("qwen3", {"attention_bias": True}, "_proj.bias has no place in llama.cpp's qwen3"),
    ],
)
def test_models_that_llama_cpp_does_not_run(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, kind: str, sizes: Any, message: str
):
    with pytest.raises(ModelError, match=message):
        convert(request(RTN, tiny(kind, **sizes), text_file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_shorter_context_is_told(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    summary = convert(request(RTN, tiny("mistral"), text_file, tmp_path / "out"))
    assert "cut to the window of 8 tokens" in summary.lost[0]
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 8


def test_damage_is_seen(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    converted(tiny, text_file, tmp_path / "out", RTN)
    path = tmp_path / "out" / "model.gguf"
    whole = path.read_bytes()
    for data, message in (
        (b"GGML" + whole[4:], "does not begin with GGUF"),
        (whole[:-5000], "beyond the end"),
        (whole[:4] + b"\x09" + whole[5:], "version 9"),
        (whole[:200], "GGUF file that pq can read"),
        (whole.replace(b"blk.1.attn_q", b"blk.1.attn_x"), "has no place in the model"),
        (whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00mamba"),
         "none that pq writes"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(ModelError, match=message):
            open_checkpoint(tmp_path / "out")
        assert not verify(tmp_path / "out").ok
    path.unlink()
    with pytest.raises(ModelError, match="is missing"):
        open_checkpoint(tmp_path / "out")
    with pytest.raises(ModelError):
        Checkpoint(tmp_path / "out")  # the reader of safetensors says so as well
