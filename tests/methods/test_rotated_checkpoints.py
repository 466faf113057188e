"""Rotated and quantized checkpoints: written, loaded by everyone who may, measured, inspected and verified."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from damage import checks_of, edit_json, failed, sign
from natives import difference, loaded, logits, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import quantize  # registers the native format  # noqa: F401
from quantize.conversion.loop import convert
from quantize.errors import ModelError
from quantize.evaluation import evaluate
from quantize.evaluation.streamed import open_model
from quantize.files.checkpoint import INDEX_NAME, Checkpoint
from quantize.formats.native import native_config, require_understood, rotated_inputs_of
from quantize.inspect.inspection import inspect
from quantize.model.hadamard import rotates_inputs
from quantize.model.load import load_model
from quantize.serving.register import PqConfig
from quantize.verification import verify

Maker = Callable[..., Path]
CPU = torch.device("cpu")
SPANS = [(0, 0, 24), (1, 0, 24)]

STAGES = {
    "plain": ("compressed-tensors", "{method: rotate}", "{method: rtn, bits: 4, group_size: 64}"),
    "rtn": (
        "pq",
        "{method: rotate, down: true, seed: 5}",
        "{method: rtn, bits: 4, group_size: 64}",
    ),
    "gptq": (
        "compressed-tensors",
        "{method: rotate, seed: 1}",
        "{method: gptq, bits: 4, group_size: 64}",
    ),
    "fireq": (
        "pq",
        "{method: awq, grid: 4}, {method: rotate, down: true}",
        "{method: fireq, activations: fp8}",
    ),
    "kv": (
        "pq",
        "{method: rotate, down: true}",
        "{method: fireq-attention, group_size: 64}, {method: rtn}",
    ),
    "some": ("pq", "{method: rotate, down: true}", "{method: rtn, ignore: ['*.down_proj']}"),
    "values": ("compressed-tensors", "{method: rotate, residual: false}", "{method: rtn}"),
}


def recipe_file(folder: Path, name: str, more: str = "") -> Path:
    kind, first, last = STAGES[name]
    path = folder / f"{name}.yaml"
    path.write_text(f"description: d\nformat: {kind}\n{more}stages: [{first}, {last}]\n")
    return path


@pytest.fixture(scope="session")
def made(tiny: Maker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Convert (once) a tiny model by one of STAGES. Read the folder, never write into it."""

    @functools.cache
    def run(name: str, model_type: str = "llama", **model: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        convert(
            request_for(
                tiny(model_type, **model), str(recipe_file(folder, name)), folder / "out", text_file
            )
        )
        return folder / "out"

    return run


@pytest.fixture
def damaged(made: Maker, tmp_path: Path) -> Maker:
    return lambda name, *args, **model: shutil.copytree(
        made(name, *args, **model), tmp_path / "copy"
    )


def streamed(folder: Path, numerics: str = "kernel") -> Tensor:
    model = open_model(folder, CPU, torch.float32, numerics)  # type: ignore[arg-type]
    return torch.stack(list(model.read(tokens(), lambda: None)(SPANS)))


CASES = [
    ("plain", "llama", False),
    ("plain", "qwen2", True),
    ("gptq", "mistral", True),
    ("rtn", "qwen3", True),
    ("rtn", "helium", False),
    ("fireq", "llama", True),
    ("kv", "qwen3", False),
    ("some", "llama", False),
    ("values", "qwen3", True),
]


@pytest.mark.parametrize(("name", "model_type", "tied"), CASES)
def test_every_loader_computes_the_same_and_stays_near_the_parent(
    tiny: Maker, made: Maker, name: str, model_type: str, tied: bool
):
    parent, out = (
        tiny(model_type, tie_word_embeddings=tied),
        made(name, model_type, tie_word_embeddings=tied),
    )
    theirs = logits(loaded(out))
    numerics = "kernel" if STAGES[name][0] == "pq" else "stock"
    assert difference(streamed(out, numerics), theirs) < 2e-5
    with torch.no_grad():
        assert (
            difference(load_model(out, CPU, torch.float32, numerics)(tokens()).logits, theirs)
            < 2e-5
        )
    assert 1e-3 < difference(theirs, logits(loaded(parent))) < 0.4


@pytest.mark.parametrize(("name", "model_type", "tied"), CASES)
def test_verify_passes_with_the_parent_and_without(
    tiny: Maker, made: Maker, name: str, model_type: str, tied: bool
):
    parent, out = (
        tiny(model_type, tie_word_embeddings=tied),
        made(name, model_type, tie_word_embeddings=tied),
    )
    assert verify(out).ok
    result = verify(out, parent)
    assert result.ok, result.first_failure
    again = checks_of(result)["recomputed"]
    if name in (
        "gptq",
        "fireq",
        "kv",
    ):  # these read text: only what is outside the blocks is computed again
        assert (
            again.detail
            == "model.embed_tokens, lm_head converted again from the parent: equal bit for bit"
        )
    elif name == "values":
        assert again.detail == "block 0, block 1 converted again from the parent: equal bit for bit"
    else:
        assert again.detail.startswith("model.embed_tokens, lm_head, block 0, block 1 ")


def test_rotating_needs_no_text(tiny: Maker, tmp_path: Path):
    asked = request_for(
        tiny("llama"), str(recipe_file(tmp_path, "rtn")), tmp_path / "out", tmp_path / "none.txt"
    )
    convert(asked)
    assert verify(tmp_path / "out", tiny("llama")).ok


def test_a_rotated_model_is_measured_against_its_tied_parent(
    tiny: Maker, made: Maker, text_file: Path
):
    args: dict[str, Any] = {"dataset": str(text_file), "seqlen": 32, "max_windows": 6}
    parent = tiny("qwen3", tie_word_embeddings=True)
    figures = evaluate(made("rtn", "qwen3", tie_word_embeddings=True), parent, **args)
    assert 0 < figures.kld_mean < 0.5


# What verify finds


def edit_shards(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors of all shards and make pq.json agree."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
    sign(folder)


def scaled(name: str, by: float = 1.01) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name] = (tensors[name].float() * by).to(tensors[name].dtype)

    return change


@pytest.mark.parametrize(("recipe", "tied"), [("plain", False), ("gptq", True)])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_damage_outside_the_blocks_is_found(
    tiny: Maker, damaged: Maker, recipe: str, name: str, tied: bool
):
    folder, parent = (
        damaged(recipe, tie_word_embeddings=tied),
        tiny("llama", tie_word_embeddings=tied),
    )
    edit_shards(folder, scaled(name))
    result = verify(folder, parent)
    assert failed(result) == ["recomputed"]
    assert f"differs in {name}" in checks_of(result)["recomputed"].detail


def test_damage_in_a_block_is_found(tiny: Maker, damaged: Maker):
    folder = damaged("plain")
    edit_shards(folder, scaled("model.layers.1.post_attention_layernorm.weight"))
    assert failed(verify(folder, tiny("llama"))) == ["recomputed"]


def test_what_no_rotation_touches_must_still_be_the_parents(tiny: Maker, damaged: Maker):
    folder = damaged("values", "qwen3")
    edit_shards(folder, scaled("model.embed_tokens.weight"))
    assert "untouched" in failed(verify(folder, tiny("qwen3")))


def test_another_seed_is_another_model(tiny: Maker, damaged: Maker, made: Maker):
    folder = damaged("gptq")  # seed 1
    shutil.copy(
        made("plain") / "model-00002-of-00004.safetensors", folder
    )  # block 0 with seed 0, of the same layout
    sign(folder)
    assert verify(folder).ok
    assert failed(verify(folder, tiny("llama"))) == ["outputs"]


@pytest.mark.parametrize("recipe", ["rtn", "fireq", "some"])
def test_a_lost_rotation_is_found(tiny: Maker, damaged: Maker, recipe: str):
    folder = damaged(recipe)
    edit_json(
        folder, "config.json", lambda config: config["quantization_config"].pop("rotated_inputs")
    )
    result = verify(folder, tiny("llama"))
    assert failed(result) == ["outputs"]


def test_a_head_that_config_ties_again_is_found(tiny: Maker, damaged: Maker):
    folder = damaged("plain", "qwen2", tie_word_embeddings=True)
    edit_json(folder, "config.json", lambda config: config.update(tie_word_embeddings=True))
    result = verify(folder, tiny("qwen2", tie_word_embeddings=True))
    assert failed(result) == ["untouched"]
    assert "tie_word_embeddings" in str(result.first_failure)


# config.json


def config(**changes: Any) -> dict[str, Any]:
    return native_config({}, ["a", "b"], None, ["a"]) | changes


def test_rotated_inputs_in_the_config():
    require_understood(config())
    assert rotated_inputs_of(config(), ["a", "b"]) == ("a",)
    assert PqConfig(**config()).to_dict() == config()
    assert "rotated_inputs" not in native_config({}, [], None)
    assert (
        rotated_inputs_of(native_config({}, [], None))
        == rotated_inputs_of(config(rotated_inputs=[]))
        == ()
    )


@pytest.mark.parametrize("value", [None, "a", {"a": 1}, [1], ["a", None], True])
def test_rotated_inputs_of_other_types_are_refused(value: Any):
    with pytest.raises(ValueError, match="rotated_inputs must be a list of names of linears"):
        require_understood(config(rotated_inputs=value))


def test_doubled_rotated_inputs_are_refused():
    with pytest.raises(ValueError, match="rotated_inputs names a linear twice"):
        require_understood(config(rotated_inputs=["a", "a"]))


@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.down_proj", "model.layers.0.mlp.act_fn", "lm_head", "zzz"]
)
def test_unknown_rotated_inputs_are_refused_by_every_loader(damaged: Maker, name: str):
    folder = damaged("rtn")
    edit_json(
        folder, "config.json", lambda c: c["quantization_config"]["rotated_inputs"].append(name)
    )
    says = f"rotated_inputs names {name}, which is no linear of the model"
    for load in (loaded, lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(ModelError, match=says) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
    assert failed(verify(folder)) == ["layout"]
    assert says in str(verify(folder).first_failure)


def test_sizes_that_cannot_be_rotated_are_refused_by_every_loader(
    tiny: Maker, text_file: Path, tmp_path: Path
):
    out = tmp_path / "out"
    recipe = recipe_file(tmp_path, "some")
    recipe.write_text(recipe.read_text().replace("down: true", "residual: false"))
    asked = request_for(tiny("llama", intermediate_size=268), str(recipe), out, text_file)
    convert(asked)
    name = "model.layers.0.mlp.down_proj"
    edit_json(out, "config.json", lambda c: c["quantization_config"].update(rotated_inputs=[name]))
    for load in (loaded, lambda f: load_model(f, CPU, torch.float32), streamed):
        with pytest.raises(ModelError, match=f"{name}: no Hadamard matrix of size 268 is known"):
            load(out)


# Everything around


def test_the_command_line(
    pq: Callable[..., tuple[int, str, str]], tiny: Maker, text_file: Path, tmp_path: Path
):
    out, parent = tmp_path / "out", tiny("qwen2", tie_word_embeddings=True)
    options = ("--dataset", text_file, "--nsamples", 4, "--seqlen", 32, "--dtype", "float32")
    code, _, err = pq(
        "convert", "-m", parent, "-r", recipe_file(tmp_path, "gptq"), "-o", out, *options
    )
    assert code == 0, err
    size = 300 * 128 * 2
    assert (
        f"the head no longer shares the embedding's weight: {size / 1e6:.1f} MB more"
        in " ".join(err.split())
    )
    assert (
        f"lm_head no longer shares the embedding: {size} bytes more"
        in (tmp_path / "out.log").read_text()
    )
    code, _, err = pq("verify", out, "--parent", parent)
    assert code == 0, err
    assert pq("eval", out, "--baseline", parent, "--dataset", text_file, "--seqlen", 32)[0] == 0
    assert "rotate" in (tmp_path / "out.report.html").read_text()
    code, printed, _ = pq("inspect", out)
    assert code == 0
    assert "lm_head.weight: 300 x 128, BF16" in printed
    assert "method: rotate" in json.loads((out / "pq.json").read_text())["recipe"]["resolved"]


def test_set_cannot_ask_for_what_the_format_does_not_hold(
    pq: Callable[..., tuple[int, str, str]], tiny: Maker, tmp_path: Path
):
    args = ("-r", recipe_file(tmp_path, "plain"), "-o", tmp_path / "out", "--set", "down=true")
    code, _, err = pq("convert", "-m", tiny("llama"), *args)
    assert code == 3
    assert "stages[0].down: needs 'format: pq'" in " ".join(err.split())


def test_inspection_of_an_untied_head(tiny: Maker, made: Maker):
    parent = inspect(tiny("qwen3", tie_word_embeddings=True))
    found = inspect(made("rtn", "qwen3", tie_word_embeddings=True))
    assert {o.name for o in found.outside} - {o.name for o in parent.outside} == {"lm_head.weight"}
    assert found.sizes["tie_word_embeddings"] == 0
    assert found.totals.parameters == (parent.totals.parameters or 0) + 300 * 128


def test_an_untied_head_can_be_packed(tiny: Maker, text_file: Path, tmp_path: Path):
    parent, out = tiny("llama", tie_word_embeddings=True), tmp_path / "out"
    summary = convert(
        request_for(parent, str(recipe_file(tmp_path, "plain", "head_bits: 8\n")), out, text_file)
    )
    assert "lm_head.weight_packed" in Checkpoint(out)
    assert "lm_head.weight" not in Checkpoint(out)
    packed = [t for n in Checkpoint(out).names("lm_head.") for t in (Checkpoint(out).tensor(n),)]
    assert summary.untied_head_bytes == sum(t.nbytes for t in packed)
    assert difference(logits(loaded(out)), logits(loaded(parent))) < 0.4
    assert verify(out, parent).ok


@pytest.mark.parametrize("name", ["rtn", "plain"])
def test_a_target_of_bits(tiny: Maker, text_file: Path, tmp_path: Path, name: str):
    parent, out = tiny("qwen3", tie_word_embeddings=True), tmp_path / "out"
    asked = request_for(parent, str(recipe_file(tmp_path, name)), out, text_file)
    convert(replace(asked, target_bpw=5.5))
    facts = json.loads((out / "pq.json").read_text())
    errors = [
        error
        for linear in facts["allocation"]["linears"].values()
        for error in linear["errors"].items()
    ]
    # Measured in a wrong basis, a rounded linear would be no nearer with 8 bits than with 4.
    assert all(error < (0.1 if bits == "4" else 1e-3) for bits, error in errors)
    assert facts["bits_per_weight"] <= 5.5
    assert verify(out, parent).ok


def test_statistics_compare_the_parent_with_the_rotated_model(made: Maker, converted: Maker):
    plain, turned = (
        json.loads((folder / "pq-statistics.json").read_text())["blocks"]
        for folder in (converted("gptq", "llama", "group_size=64"), made("gptq"))
    )
    for ours, theirs in zip(turned, plain, strict=True):
        for name, facts in ours["weights"].items():
            assert facts["before"] == theirs["weights"][name]["before"]
            assert facts["after"] != facts["before"]
        for name, facts in ours["inputs"].items():
            # In the parent's basis, up to the storage of the rotated embedding and what was quantized before.
            wanted = theirs["inputs"][name]["before"]
            assert facts["before"]["absmax"] == pytest.approx(wanted["absmax"], rel=0.2)
            assert facts["before"]["median"] == pytest.approx(wanted["median"], rel=0.1)
            if ours["index"] == 0:
                assert (
                    len({c for c, _ in facts["before"]["top"]} & {c for c, _ in wanted["top"]}) >= 6
                )  # of 8


def test_attention_and_rotation_survive_a_copy(made: Maker, tmp_path: Path):
    model = loaded(made("kv", "qwen3"))
    assert sum(rotates_inputs(module) for module in model.modules()) == 2
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(model))
    generated = model.generate(
        tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert generated.shape == (2, 28)


def test_the_decoder_alone_rotates_too(made: Maker):
    with torch.no_grad():
        # In bfloat16, which transformers 5.17 loads a packed decoder alone in, whatever it is asked for.
        inner = AutoModel.from_pretrained(made("rtn"), dtype=torch.bfloat16)(
            tokens()
        ).last_hidden_state
        whole = AutoModelForCausalLM.from_pretrained(made("rtn"), dtype=torch.bfloat16)
        wanted = whole.model(tokens()).last_hidden_state
    assert torch.equal(inner, wanted)


def test_equal_inputs_give_equal_bytes(tiny: Maker, made: Maker, text_file: Path, tmp_path: Path):
    convert(
        request_for(tiny("llama"), str(recipe_file(tmp_path, "fireq")), tmp_path / "out", text_file)
    )
    for path in [*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / INDEX_NAME]:
        assert path.read_bytes() == (made("fireq") / path.name).read_bytes(), path.name
