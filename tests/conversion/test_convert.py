"""What a conversion writes: whole pipelines over tiny models of every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import config_of, random_weights, request_for, save_model
from rows import ARCHITECTURES
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantize.block.block import Block
from quantize.calibration.tokens import calibration_tokens
from quantize.conversion.loop import convert
from quantize.evaluation import evaluate
from quantize.files.checkpoint import INDEX_NAME, Checkpoint
from quantize.files.hashing import sha256_file
from quantize.formats.packed_int import PackedInt
from quantize.model.linear import PackedLinear
from quantize.model.load import load_model
from quantize.model.tokenizer import load_tokenizer
from quantize.recipe.recipe import parse_recipe

CPU = torch.device("cpu")
RECIPES = ("rtn", "gptq", "awq", "fireq-paper-linear")
Maker = Callable[..., Path]
BlockMaker = Callable[..., Block]


def tokens(length: int = 24) -> Tensor:
    return torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(7))


def stock_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(tokens()).logits


def our_logits(folder: Path, numerics: str = "stock", dtype: torch.dtype = torch.float32) -> Tensor:
    model = load_model(folder, CPU, dtype, "stock" if numerics == "stock" else "kernel")
    with torch.no_grad():
        return model(tokens()).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_stock_transformers_computes_what_we_compute(
    converted: Maker, tiny: Maker, recipe: str, model_type: str
):
    out = converted(recipe, model_type)
    ours = our_logits(out)
    limit = 1e-5
    if ARCHITECTURES[
        model_type
    ].experts:  # there they are run in bfloat16, and what enters them is not rounded to FP8
        limit = 0.1 if recipe == "fireq-paper-linear" else 0.01
    assert difference(ours, stock_logits(out)) < limit
    assert 1e-3 < difference(ours, our_logits(tiny(model_type))) < 0.6


@pytest.mark.parametrize(
    "changes", [("bits=3",), ("bits=2",), ("bits=8", "group_size=32"), ("bits=5", "group_size=64")]
)
def test_other_bit_widths_load_in_stock_transformers(converted: Maker, changes: tuple[str, ...]):
    out = converted("gptq", "qwen2", *changes)
    assert difference(our_logits(out), stock_logits(out)) < 1e-5


def test_fp8_activations_are_declared_and_run(converted: Maker):
    out = converted("rtn", "llama", "activations=fp8")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["type"] == "float"
    model = load_model(out, CPU, torch.float32)
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 14
    assert all(m.fp8_activations for m in linears)
    assert difference(our_logits(out), stock_logits(out)) < 1e-5
    assert 1e-4 < difference(our_logits(out, "kernel"), our_logits(out, "stock")) < 0.2


@pytest.mark.parametrize("recipe", ["rtn", "fireq-paper-linear"])
def test_stock_transformers_computes_the_same_in_bfloat16(converted: Maker, recipe: str):
    out = converted(recipe, "llama")
    ours, theirs = our_logits(out, dtype=torch.bfloat16), stock_logits(out, torch.bfloat16)
    assert difference(ours.float(), theirs.float()) < 1e-3


def test_layers_that_are_left_out_stay_as_they_were(tiny: Maker, text_file: Path, tmp_path: Path):
    out, recipe = tmp_path / "out", tmp_path / "part.yaml"
    recipe.write_text(
        "description: d\nstages: [{method: rtn, ignore: ['*.v_proj', '*.layers.1.mlp.*']}]"
    )
    convert(request_for(tiny("qwen2"), str(recipe), out, text_file))
    source, written = Checkpoint(tiny("qwen2")), Checkpoint(out)
    for name in source.names():
        quantized = (
            name.endswith("proj.weight") and "v_proj" not in name and "layers.1.mlp" not in name
        )
        assert (name in written) != quantized
        if not quantized:
            assert written.tensor(name).dtype == source.tensor(name).dtype == torch.bfloat16
            assert torch.equal(written.tensor(name), source.tensor(name)), name
    assert difference(our_logits(out), stock_logits(out)) < 1e-5


def test_side_files_are_copied_byte_for_byte(converted: Maker, tiny: Maker, model_type: str):
    source, out = tiny(model_type), converted("rtn", model_type)
    names = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    made = {p.name for p in out.iterdir()} - set(names)
    shards = {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    ours = {"config.json", "pq.json", "pq-statistics.json", "README.md", INDEX_NAME}
    assert made == {*ours, *shards}


def test_config_keeps_every_field_of_the_source(converted: Maker, tiny: Maker, model_type: str):
    before = json.loads((tiny(model_type) / "config.json").read_text())
    after = json.loads((converted("rtn", model_type) / "config.json").read_text())
    routers = ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]
    ignored = ["lm_head", *(routers if ARCHITECTURES[model_type].experts else [])]
    assert after.pop("quantization_config")["ignore"] == ignored
    assert after == before


@pytest.mark.parametrize("recipe", ["rtn", "awq"])
def test_a_tied_head_stays_tied(converted: Maker, tiny: Maker, recipe: str):
    out = converted(recipe, "qwen3", tie_word_embeddings=True)
    assert not Checkpoint(out).names("lm_head")
    model = load_model(out, CPU, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(our_logits(out), stock_logits(out)) < 1e-5


def test_a_tied_head_that_was_stored_twice_is_stored_once(tmp_path: Path, text_file: Path):
    config = config_of("llama", tie_word_embeddings=True)
    weights = random_weights(config)
    model = save_model(
        tmp_path / "model",
        config,
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    )
    convert(request_for(model, "rtn", tmp_path / "out", text_file))
    assert not Checkpoint(tmp_path / "out").names("lm_head")


@pytest.mark.parametrize("recipe", ["gptq", "fireq-paper-linear"])
def test_a_second_run_gives_the_same_bytes(
    converted: Maker, tiny: Maker, text_file: Path, tmp_path: Path, recipe: str
):
    convert(request_for(tiny("llama"), recipe, tmp_path / "again", text_file))
    assert files_of(tmp_path / "again") == files_of(converted(recipe, "llama"))


def test_a_sharded_source_gives_the_same_weights(converted: Maker):
    whole, parts = (
        files_of(converted("gptq", "qwen2")),
        files_of(converted("gptq", "qwen2", shards=2)),
    )
    one, two = (json.loads(files.pop("pq.json")) for files in (whole, parts))
    assert whole == parts
    for key in ("source", "sha256"):
        assert one.pop(key) != two.pop(key)
    assert one == two


def parents_states(model: Path, windows: Tensor) -> list[list[Tensor]]:
    """Hidden states that enter each block of the full transformers model, batch by batch."""
    parent = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: list[list[Tensor]] = [[] for _ in parent.model.layers]
    for layer, states in zip(parent.model.layers, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0]))
    with torch.no_grad():
        for batch in windows.split(3):
            parent(batch)
    return seen


@pytest.mark.parametrize("method", ["gptq", "fireq"])
def test_each_block_is_calibrated_on_what_reaches_it(
    make_block: BlockMaker, tiny: Maker, text_file: Path, tmp_path: Path, method: str
):
    (tmp_path / "r.yaml").write_text(f"description: d\nstages: [{{method: {method}}}]")
    request = request_for(tiny("mistral"), str(tmp_path / "r.yaml"), tmp_path / "out", text_file)
    convert(request)
    written, stage = Checkpoint(tmp_path / "out"), request.recipe.stages[0]
    windows = calibration_tokens(
        load_tokenizer(tiny("mistral")), dataset=str(text_file), nsamples=6, seqlen=32, seed=0
    )
    parents = parents_states(tiny("mistral"), windows.tokens)
    inputs = parents[0]
    for index in range(2):
        block = make_block("mistral", index=index)
        block.inputs, block.parent_inputs = (
            inputs,
            parents[index] if stage.needs_parent else None,
        )
        with torch.no_grad():
            stage.apply(block)
            inputs = [block.forward(block.module, x) for x in inputs]
        for name, packed in block.packed.items():
            found = written.tensors(f"model.layers.{index}.{name}.")
            codes = PackedInt.from_tensors(found, packed.bits, packed.group_size).codes
            assert float((codes == packed.codes).float().mean()) > 0.999, name


def test_calibration_matters_where_it_should(
    converted: Maker, tiny: Maker, text_file: Path, tmp_path: Path
):
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 400)
    for recipe, same in (("rtn", True), ("gptq", False)):
        convert(request_for(tiny("llama"), recipe, tmp_path / recipe, other))
        name = "model-00002-of-00004.safetensors"
        equal = (tmp_path / recipe / name).read_bytes() == (
            converted(recipe, "llama") / name
        ).read_bytes()
        assert equal == same


def test_provenance(converted: Maker, tiny: Maker, text_file: Path):
    out, source = converted("gptq", "llama", "bits=3"), tiny("llama")
    record = json.loads((out / "pq.json").read_text())
    assert (
        parse_recipe(record["recipe"]["resolved"], "gptq.yaml").stages[0].model_dump()["bits"] == 3
    )
    assert record["recipe"]["name"] == "gptq"
    assert record["source"] == {
        n: sha256_file(source / n) for n in ("config.json", "model.safetensors")
    }
    assert record["calibration"]["text_sha256"] == sha256_file(text_file)
    assert (record["calibration"]["nsamples"], record["calibration"]["seqlen"]) == (6, 32)
    assert len(record["calibration"]["sha256"]) == 64
    assert set(record["versions"]) == {
        "python",
        "torch",
        "transformers",
        "compressed-tensors",
        "safetensors",
    }
    assert record["bits_per_weight"] == 3.125
    assert len(record["layers"]) == 14
    assert 0 < record["layers"]["model.layers.1.mlp.down_proj"]["output_error"] < 1
    listed = {p.name for p in out.iterdir()} - {"pq.json"}
    assert record["files"] == {name: sha256_file(out / name) for name in sorted(listed)}
    assert str(source) not in (out / "pq.json").read_text()
    assert json.loads((converted("rtn", "llama") / "pq.json").read_text())["calibration"] is None


def test_summary_and_progress(tiny: Maker, text_file: Path, tmp_path: Path):
    calls: list[tuple[str, int, int]] = []
    request = request_for(tiny("llama"), "gptq", tmp_path / "out", text_file)
    summary = convert(request, lambda what, done, total: calls.append((what, done, total)))
    assert (summary.blocks, summary.quantized_linears, summary.bits_per_weight) == (2, 14, 4.125)
    assert summary.fallbacks == []
    assert summary.mean_output_error is not None
    source = Checkpoint(tiny("llama"))
    assert summary.source_bytes == sum(source.tensor(name).nbytes for name in source.names())
    shards = Checkpoint(tmp_path / "out")
    assert summary.output_bytes == sum(shards.tensor(name).nbytes for name in shards.names())
    assert [done for what, done, _ in calls if what == "quantizing"] == [0, 1]
    assert {total for _, _, total in calls} == {2}


def test_two_encode_stages_share_the_layers(tiny: Maker, text_file: Path, tmp_path: Path):
    out, recipe = tmp_path / "out", tmp_path / "mixed.yaml"
    first = "{method: rtn, bits: 8, group_size: 32, layers: ['*.down_proj']}"
    recipe.write_text(
        f"description: d\nstages: [{first}, {{method: gptq, bits: 3, ignore: ['*.down_proj']}}]"
    )
    convert(request_for(tiny("llama"), str(recipe), out, text_file))
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [2, 12]
    assert difference(our_logits(out), stock_logits(out)) < 1e-5


@pytest.mark.parametrize(
    "recipe",
    ["awq", "gptq", "fireq", "fireq-paper", pytest.param("sbvr", marks=pytest.mark.slow)],
)
def test_computing_in_bfloat16_loses_little(
    recipe: str, tiny: Maker, converted: Maker, text_file: Path, tmp_path: Path
):
    """The default on a GPU."""
    request = request_for(tiny("llama"), recipe, tmp_path / "out", text_file)
    convert(replace(request, dtype=torch.bfloat16))
    outputs = {torch.bfloat16: request.output, torch.float32: converted(recipe, "llama")}
    errors = {}
    for dtype, output in outputs.items():
        found = evaluate(output, tiny("llama"), dataset=str(text_file), seqlen=32, max_windows=8)
        assert found.kld_mean is not None
        errors[dtype] = found.kld_mean
    assert errors[torch.bfloat16] < 1.5 * errors[torch.float32] + 1e-3
