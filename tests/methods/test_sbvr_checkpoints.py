"""Checkpoints of bit vectors: every loader computes the same, and damage is found and named."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from damage import checks_of, edit_json, failed, sign
from kv_models import cache_of
from natives import difference, loaded, logits, tensors_of, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantize.block.block import Block
from quantize.conversion.loop import convert
from quantize.errors import ModelError
from quantize.evaluation import evaluate
from quantize.files.checkpoint import INDEX_NAME
from quantize.formats.bitvec import BitVecScheme
from quantize.inspect.inspection import inspect
from quantize.model.load import load_model
from quantize.serving.bitvec_linear import BitVecLinear
from quantize.serving.int_linear import IntLinear
from quantize.serving.kv_cache import cache_bytes
from quantize.verification import verify

Maker = Callable[..., Path]
BlockMaker = Callable[..., Block]
CPU = torch.device("cpu")
CHEAP = ("sbvr.lines=8", "sbvr.sweeps=1")
OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
SOME = {"layers": ("*.o_proj", "*.down_proj"), "lines": 8, "sweeps": 1}
RAGGED = {"intermediate_size": 200, "num_hidden_layers": 1}
UP0, DOWN0 = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


# Conversions

STAGES = {
    "uint16": "{method: sbvr, lines: 300, codebook: shapes, overhead: null, sweeps: 0, layers: ['*.up_proj']}",
    "mixed": "{method: sbvr, lines: 8, sweeps: 1, layers: ['*.mlp.*']}, {method: gptq, layers: ['*.self_attn.*']}",
    "ragged": "{method: sbvr, lines: 8, sweeps: 1}",
    "rotated": "{method: rotate, down: true}, {method: sbvr, lines: 8, sweeps: 1}",
}


@pytest.fixture(scope="module")
def made(tiny: Maker, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Convert (once) a tiny model by one of STAGES. Read the folder, never write into it."""

    @functools.cache
    def make(name: str, model_type: str, **model: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "r.yaml").write_text(f"description: d\nformat: pq\nstages: [{STAGES[name]}]\n")
        convert(
            request_for(
                tiny(model_type, **model), str(folder / "r.yaml"), folder / "out", text_file
            )
        )
        return folder / "out"

    return make


@pytest.fixture
def ragged(made: Maker, tmp_path: Path) -> Path:
    """A copy of a conversion whose down_proj has 200 inputs: no multiple of a group or a word."""
    return shutil.copytree(made("ragged", "llama", **RAGGED), tmp_path / "ragged")


def assert_loaders_agree(folder: Path) -> None:
    exact = logits(load_model(folder, CPU, torch.float32))
    assert difference(logits(loaded(folder)), exact) < 1e-5
    kept, decoded = (
        difference(logits(load(folder)), exact) for load in (in_bfloat16, decoded_in_bfloat16)
    )
    assert kept < 1.25 * decoded < 0.05  # sums in float32 round no more than decoded weights do


def convert_line(model: Path, out: Path, text: Path, recipe: str) -> list[object]:
    changes = [part for change in CHEAP for part in ("--set", change)]
    line = ["convert", "--model", model, "--output", out, "--device", "cpu", "--recipe", recipe]
    return [*line, "--dataset", text, "--nsamples", 6, "--seqlen", 32, *changes]


def in_bfloat16(folder: Path) -> Any:
    return loaded(folder, torch.bfloat16)


def decoded_in_bfloat16(folder: Path) -> Any:
    return load_model(folder, CPU, torch.bfloat16)


CASES = [
    ("llama", (), {}),
    ("mistral", ("sbvr.bias=false",), {}),
    (
        "qwen2",
        ("sbvr.bits=2", "sbvr.group_size=64", "sbvr.overhead=0.5"),
        {"tie_word_embeddings": True},
    ),
    ("qwen3", ("sbvr.bits=3", "sbvr.codebook=shapes"), {}),
    ("helium", ("sbvr.bits=5", "sbvr.bias=false"), {}),
]


@pytest.mark.parametrize(("model_type", "changes", "model"), CASES, ids=[case[0] for case in CASES])
def test_every_loader_computes_the_same(
    converted: Maker, tiny: Maker, model_type: str, changes: tuple[str, ...], model: dict[str, Any]
):
    model = model | {"num_hidden_layers": 1}
    folder = converted("sbvr", model_type, *CHEAP, *changes, **model)
    assert_loaders_agree(folder)
    assert (
        1e-3 < difference(logits(loaded(folder)), logits(loaded(tiny(model_type, **model)))) < 0.7
    )
    assert verify(folder, tiny(model_type, **model)).ok


def test_the_command_line(
    pq: Callable[..., tuple[int, str, str]], tiny: Maker, text_file: Path, tmp_path: Path
):
    model, out, again = tiny("llama", num_hidden_layers=1), tmp_path / "out", tmp_path / "again"
    for folder in (out, again):
        code, text, err = pq(*convert_line(model, folder, text_file, "sbvr"), "--json")
        assert code == 0, err
        assert json.loads(text)["quantized_linears"] == 7
    for path in out.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    code, text, _ = pq("verify", out, "--parent", model)
    assert (code, "FAILED" in text) == (0, False)
    code, text, _ = pq("inspect", out)
    assert (code, "bitvec" in text) == (0, True)


def test_rows_that_end_within_a_group(made: Maker, tiny: Maker):
    folder = made("ragged", "llama", **RAGGED)
    assert_loaders_agree(folder)
    assert verify(folder, tiny("llama", **RAGGED)).ok


def test_the_shipped_recipe_on_rows_that_end_within_a_group(
    tiny: Maker, text_file: Path, tmp_path: Path
):
    convert(request_for(tiny("llama", **RAGGED), "sbvr", tmp_path / "out", text_file, *CHEAP))
    assert verify(tmp_path / "out", tiny("llama", **RAGGED)).ok


def test_with_the_int4_cache(
    pq: Callable[..., tuple[int, str, str]], tiny: Maker, text_file: Path, tmp_path: Path
):
    out, parent = tmp_path / "out", tiny("qwen2", num_hidden_layers=1)
    code, _, err = pq(*convert_line(parent, out, text_file, "fireq-sbvr"))
    assert code == 0, err
    assert_loaders_agree(out)
    assert verify(out, parent).ok
    model = loaded(out, torch.bfloat16)
    made = model.generate(
        tokens(),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert made.sequences.shape == (2, 27)
    assert (
        cache_bytes(cache_of(made)) < 2 * 2 * 2 * 26 * 64 * 2
    )  # keys and values of one block, in 16 bits


def test_a_wide_index(made: Maker):
    folder = made("uint16", "llama", num_hidden_layers=1)
    assert tensors_of(folder)[f"{UP0}.weight_index"].dtype == torch.uint16
    assert_loaders_agree(folder)
    assert verify(folder).ok
    model = loaded(folder)
    assert model.model.layers[0].mlp.up_proj.weight_index.dtype == torch.uint16


def test_rotated_inputs(made: Maker, tiny: Maker):
    folder = made("rotated", "qwen2", num_hidden_layers=1)
    assert json.loads((folder / "config.json").read_text())["quantization_config"][
        "rotated_inputs"
    ] == [DOWN0]
    assert_loaders_agree(folder)
    assert verify(folder, tiny("qwen2", num_hidden_layers=1)).ok


def test_bit_vectors_beside_integers(made: Maker, tiny: Maker, text_file: Path):
    folder, parent = made("mixed", "qwen3", num_hidden_layers=1), tiny("qwen3", num_hidden_layers=1)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    assert {g["format"] for g in groups} == {"bitvec", "pack-quantized"}
    model = loaded(folder)
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, BitVecLinear)
    assert isinstance(layer.self_attn.q_proj, IntLinear)
    assert_loaders_agree(folder)
    assert verify(folder, parent).ok
    figures = evaluate(folder, parent, dataset=str(text_file), seqlen=32, max_windows=2)
    assert 0 < figures.kld_mean < 0.5


def test_generation(ragged: Path):
    out = loaded(ragged, torch.bfloat16).generate(
        tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert out.shape == (2, 28)


@pytest.mark.parametrize("wide", [False, True])
def test_saving_and_casting_keep_every_bit(ragged: Path, made: Maker, tmp_path: Path, wide: bool):
    folder = made("uint16", "llama", num_hidden_layers=1) if wide else ragged
    model = loaded(folder).to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight_lines.dtype, layer.weight_scales.dtype) == (torch.float16, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(loaded(folder)))


# What is said of them


def test_inspect_counts_every_bit(converted: Maker):
    folder = converted("sbvr", "mistral", *CHEAP, "sbvr.bias=false", num_hidden_layers=1)
    tensors = tensors_of(folder)
    linears = inspect(folder).blocks[0].linears
    assert len(linears) == 7
    for linear in linears:
        own = {
            n.rpartition(".")[2]: t
            for n, t in tensors.items()
            if n.startswith(f"model.layers.0.{linear.name}.")
        }
        N, K = own.pop("weight_shape").tolist()
        assert (linear.format, linear.bits, linear.group_size, linear.shape) == (
            "pq bitvec",
            4,
            128,
            (N, K),
        )
        assert linear.bits_per_weight == 8 * sum(t.nbytes for t in own.values()) / (N * K)
        scheme = BitVecScheme(
            4, 128, False, *own["weight_lines"].shape[:1], *own["weight_scales"].shape
        )
        assert linear.bits_per_weight == scheme.stored_bits(N, K)


def test_inspect_knows_rows_that_end_within_a_word(made: Maker):
    found = inspect(made("ragged", "llama", **RAGGED))
    (down,) = (linear for linear in found.blocks[0].linears if linear.name == DOWN)
    assert down.shape == (128, 200)
    assert down.bits_per_weight == (128 * 28 * 32 + 128 * 2 * 8 + 8 * 5 * 16 + 32) / (128 * 200)


def damaged(folder: Path, name: str, change: Callable[[Tensor], Tensor] | None) -> Path:
    """Change (or, with None, drop) a tensor, and make index and hashes agree with it."""
    index = json.loads((folder / INDEX_NAME).read_text())
    shard = index["weight_map"][name]
    tensors = load_file(folder / shard)
    old = tensors.pop(name)
    if change is None:
        del index["weight_map"][name]
    else:
        tensors[name] = change(old)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index["metadata"]["total_size"] = sum(t.nbytes for t in tensors_of(folder).values())
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    sign(folder)
    return folder


def with_entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return change


def with_padding_bits(planes: Tensor) -> Tensor:
    planes[3, -1] |= 1 << 20  # 200 inputs fill 8 bits of their last words
    return planes


@pytest.mark.parametrize(
    ("suffix", "change", "check", "says"),
    [
        (
            "weight_planes",
            with_padding_bits,
            "packing",
            f"{DOWN0}.weight_planes holds bits beside its codes",
        ),
        (
            "weight_index",
            with_entry(200),
            "packing",
            f"{DOWN0}: index 200 is outside a codebook of",
        ),
        ("weight_lines", with_entry(math.nan), "values", f"{DOWN0}.weight_lines holds NaN or Inf"),
        (
            "weight_scales",
            lambda t: t * math.inf,
            "values",
            f"{DOWN0}.weight_scales holds NaN or Inf",
        ),
        ("weight_scales", None, "layout", f"tensor {DOWN0}.weight_scales is missing"),
        ("weight_index", None, "layout", f"tensor {DOWN0}.weight_index is missing"),
        (
            "weight_planes",
            lambda t: t[:, 4:].contiguous(),
            "layout",
            f"{DOWN0}.weight_planes is I32",
        ),
        ("weight_lines", lambda t: t.float(), "layout", f"{DOWN0}.weight_lines is F32"),
        ("weight_shape", lambda t: t.flip(0), "layout", f"{DOWN0}.weight_shape says"),
    ],
)
def test_verify_finds_damage(
    ragged: Path, suffix: str, change: Callable[[Tensor], Tensor] | None, check: str, says: str
):
    result = verify(damaged(ragged, f"{DOWN0}.{suffix}", change))
    assert check in failed(result)
    assert failed(result)[0] == check
    assert says in str(result.first_failure)


def test_a_flipped_byte_is_found(ragged: Path):
    shard = json.loads((ragged / INDEX_NAME).read_text())["weight_map"][f"{DOWN0}.weight_planes"]
    content = bytearray((ragged / shard).read_bytes())
    content[-1000] ^= 4
    (ragged / shard).write_bytes(content)
    result = verify(ragged)
    assert failed(result) == ["files"]
    assert shard in checks_of(result)["files"].detail


def test_other_codes_are_found_against_the_parent(ragged: Path, tiny: Maker):
    damaged(ragged, f"{DOWN0}.weight_planes", lambda planes: planes.roll(1, dims=0))
    assert verify(ragged).ok  # well formed
    assert "outputs" in failed(verify(ragged, tiny("llama", **RAGGED)))


EDITS = [
    ("num_bits", 3),
    ("num_bits", 1),
    ("group_size", 64),
    ("group_size", 100),
    ("bias", False),
    ("lines", 9999),
]
EDITS += [("scales", 7), ("lines", True), ("type", "int"), ("symmetric", True)]


def edit_group(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"][key] = value

    return change


@pytest.mark.parametrize(("key", "value"), EDITS)
def test_an_edited_config_is_refused_by_all(ragged: Path, key: str, value: Any):
    edit_json(ragged, "config.json", edit_group(key, value))
    assert failed(verify(ragged)) == ["layout"]
    for load in (loaded, lambda folder: load_model(folder, CPU, torch.float32)):
        with pytest.raises(ModelError, match=r"^[^\n]+$") as caught:
            load(ragged)
        assert str(ragged) in str(caught.value) or "quantization_config" in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "change", "says"),
    [
        ("weight_scales", None, f"{DOWN0}.weight_scales is missing"),
        ("weight_planes", None, f"{DOWN0}.weight_planes is missing"),
        ("weight_lines", lambda t: t.float(), f"{DOWN0}.weight_lines is F32"),
        ("weight_index", lambda t: t.to(torch.int32), f"{DOWN0}.weight_index is I32"),
        ("weight_shape", lambda t: t.flip(0), f"{DOWN0}.weight_shape says"),
    ],
)
def test_loading_refuses_what_does_not_fit(
    ragged: Path, suffix: str, change: Callable[[Tensor], Tensor] | None, says: str
):
    damaged(ragged, f"{DOWN0}.{suffix}", change)
    with pytest.raises(ModelError, match=r"^[^\n]+$") as caught:
        loaded(ragged)
    assert says in str(caught.value)
    with pytest.raises(ModelError, match=r"^[^\n]+$") as caught:
        load_model(ragged, CPU, torch.float32)
    assert suffix in str(caught.value) or "weight_planes" in str(caught.value)


@pytest.mark.parametrize("load", [loaded, lambda f: load_model(f, CPU, torch.float32)])
def test_an_index_outside_the_cache_is_refused(ragged: Path, load: Callable[[Path], Any]):
    damaged(ragged, f"{DOWN0}.weight_index", with_entry(200))
    with pytest.raises(ModelError, match=rf"{DOWN0}[^\n]+(outside a|of a) codebook"):
        load(ragged)
