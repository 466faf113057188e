"""The registry of output formats, and that one more format is one more file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker
from dense_format import Dense
from npz_format import WEIGHTS, Npz, read_weights
from resumed import files_of, model_of, request, stopped_after
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantize.conversion.loop import convert
from quantize.errors import RecipeError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.gguf.blocks import BlockScheme
from quantize.formats.output import Finished, OutputFormat
from quantize.formats.packed_int import IntScheme
from quantize.formats.registry import DEFAULT, FORMATS, format_in, schemes_in
from quantize.model.linear import PackedLinear
from quantize.model.load import load_model, require_readable
from quantize.recipe.recipe import parse_recipe, recipe_schema

GPTQ = "stages: [{method: gptq, bits: 3, group_size: 64}]"
KV = "stages: [{method: fireq-attention, group_size: 64}, {method: rtn, bits: 4, group_size: 64}]"


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> OutputFormat:
    form = Dense()
    monkeypatch.setitem(FORMATS, form.name, form)
    return form


@pytest.fixture
def npz(monkeypatch: pytest.MonkeyPatch) -> OutputFormat:
    form = Npz()
    monkeypatch.setitem(FORMATS, form.name, form)
    return form


def values_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in float32, packed linears as stock loaders make them."""
    model = load_model(folder, CPU, torch.float32, "stock")
    out = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            out[f"{name}.weight"] = module.packed.unpack()
    return out


def made(tiny: ModelMaker, text: Path, output: Path, body: str, **changes: Any) -> Any:
    return request(body, model_of(tiny, "rtn"), text, output, **changes)


# A third format


@pytest.mark.parametrize("stages", [GPTQ, KV])
def test_a_format_of_one_file_loads_everywhere(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, dense: OutputFormat, stages: str
):
    convert(made(tiny, text_file, tmp_path / "dense", f"format: dense, {stages}"))
    convert(made(tiny, text_file, tmp_path / "packed", f"format: compressed-tensors, {stages}"))
    wanted = values_of(tmp_path / "packed")
    found = Checkpoint(tmp_path / "dense").tensors("")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name
    parent = Checkpoint(model_of(tiny, "rtn"))
    assert set(found) == set(parent.names())
    changed = [name for name in found if not torch.equal(found[name], parent.tensor(name))]
    assert len(changed) >= 3 * 7
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ours = load_model(tmp_path / "dense", CPU, torch.float32)
    tokens = torch.arange(24)[None]
    assert torch.equal(stock(tokens).logits, ours(tokens).logits)


def test_a_format_may_bring_its_own_encoding(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, npz: OutputFormat
):
    body = f"head_bits: 4, {GPTQ}"
    convert(made(tiny, text_file, tmp_path / "npz", f"format: npz, {body}"))
    convert(made(tiny, text_file, tmp_path / "packed", f"format: compressed-tensors, {body}"))
    names = {path.name for path in (tmp_path / "npz").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert (
        names == {WEIGHTS, "config.json", "pq.json", "pq-statistics.json", "README.md"} | tokenizer
    )
    section = json.loads((tmp_path / "npz" / "config.json").read_text())["quantization_config"]
    assert format_in(section) is npz
    schemes = schemes_in(section, list(section["linears"]))
    assert len(schemes) == 3 * 7 + 1
    assert schemes["lm_head"] == IntScheme(4, 128, False)
    wanted, found = values_of(tmp_path / "packed"), read_weights(tmp_path / "npz", schemes)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert set(found) == {name for name in wanted if not name.endswith(".bias")}
    hashes = json.loads((tmp_path / "npz" / "pq.json").read_text())["files"]
    assert set(hashes) == names - {"pq.json"}


def test_a_stopped_conversion_goes_on_in_such_a_format(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, npz: OutputFormat
):
    body = f"format: npz, {GPTQ}"
    asked = made(tiny, text_file, tmp_path / "out", body, work=tmp_path / "work", resume="auto")
    stopped_after(asked, 2)
    kept = {path.name for path in (tmp_path / "work" / "partial").iterdir()}
    assert kept == {"part-0.npz", "part-1.npz", "part-2.npz"}
    convert(asked)
    convert(made(tiny, text_file, tmp_path / "once", body))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")


def test_what_such_a_format_cannot_hold_is_said_with_its_line(npz: OutputFormat):
    text = "description: d\nformat: npz\nstages:\n- {method: rtn, bits: 5}\n"
    where = r"^r\.yaml:4: stages\[0\]\."
    with pytest.raises(RecipeError, match=rf"{where}bits: has no place in 'format: npz'"):
        parse_recipe(text, "r.yaml")
    with pytest.raises(RecipeError, match=rf"{where}method: needs 'format: pq', no other loader"):
        parse_recipe(text.replace("rtn, bits: 5", "sbvr"), "r.yaml")
    names = "'compressed-tensors' or 'pq' or 'gguf' or 'npz'"
    with pytest.raises(RecipeError, match=rf"must be {names} \(value 'exl3'\)"):
        parse_recipe(text.replace("npz", "exl3"), "r.yaml")


def test_what_such_a_format_loses_is_told(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, npz: OutputFormat
):
    summary = convert(made(tiny, text_file, tmp_path / "npz", f"format: npz, {KV}"))
    assert summary.lost == ["NumPy has no INT4 cache"]


def test_the_editor_is_told_of_every_format(npz: OutputFormat):
    field = recipe_schema()["properties"]["format"]
    assert field["enum"] == ["compressed-tensors", "pq", "gguf", "npz"]
    assert field["default"] == DEFAULT == "compressed-tensors"
    assert "`npz` loads in NumPy" in field["description"]


# The registry


def test_every_format_has_a_name_and_says_what_it_is_for():
    for name, form in FORMATS.items():
        assert name == form.name
        assert form.about


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_recognizes_what_it_says_itself(name: str):
    schemes: dict[str, Any] = {"a": IntScheme(4, 64, False), "b": IntScheme(8, 64, True)}
    if name == "gguf":  # which holds blocks alone
        schemes = {"a": BlockScheme("q4_0"), "b": BlockScheme("q8_0")}
    section = json.loads(json.dumps(FORMATS[name].config_section(Finished(schemes, ["lm_head"]))))
    assert format_in(section) is FORMATS[name]
    FORMATS[name].require_understood(section)
    assert FORMATS[name].reads_others(section)
    assert schemes_in(section, ["a", "b", "lm_head"]) == schemes
    # Of a file in a format of its own it says in any case what it is.
    if name != "gguf":
        assert FORMATS[name].config_section(Finished({}, ["a", "lm_head"])) is None


@pytest.mark.parametrize(
    "section", [None, "pq", ["pq"], {}, {"quant_method": "gptq"}, {"quant_method": ["pq"]}]
)
def test_what_none_of_them_wrote_belongs_to_none(section: Any):
    assert format_in(section) is None


def test_unknown_sections_are_refused(tiny: ModelMaker, tmp_path: Path):
    assert schemes_in({}, ["a"]) == {}
    with pytest.raises(ValueError, match="quant_method 'gptq' is unknown"):
        schemes_in({"quant_method": "gptq"}, ["a"])
    with pytest.raises(KeyError):
        schemes_in({"config_groups": {}}, ["a"])
    source = Checkpoint(tiny("llama"))
    require_readable(source)


def test_recipes_learn_what_formats_hold_without_torch():
    code = "import sys, quantize.formats.registry as r\n"
    code += "print(list(r.FORMATS), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['compressed-tensors', 'pq', 'gguf'] False"
