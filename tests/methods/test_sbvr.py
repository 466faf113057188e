"""SBVR from the recipe's fields to checkpoints that are written, loaded, inspected, verified and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantize.block.block import Block
from quantize.block.statistics import Collected
from quantize.errors import ModelError, RecipeError
from quantize.formats.bitvec import BitVec
from quantize.methods.sbvr.stage import Sbvr
from quantize.pictures import Heatmap
from quantize.recipe.recipe import load_recipe, parse_recipe
from quantize.report.svg import svg

Maker = Callable[..., Path]
BlockMaker = Callable[..., Block]
CPU = torch.device("cpu")
CHEAP = ("sbvr.lines=8", "sbvr.sweeps=1")
OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
SOME = {"layers": ("*.o_proj", "*.down_proj"), "lines": 8, "sweeps": 1}
RAGGED = {"intermediate_size": 200, "num_hidden_layers": 1}
UP0, DOWN0 = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def run(stage: Sbvr, block: Block) -> Block:
    with torch.no_grad():
        stage.apply(block)
    return block


def weight_of(block: Block, name: str = DOWN) -> BitVec:
    weight = block.packed[name]
    assert isinstance(weight, BitVec)
    return weight


# Fields


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bits: 1", "bits: must be an integer >= 2 and <= 8 (value 1)"),
        ("bits: 9", "bits: must be an integer >= 2 and <= 8 (value 9)"),
        ("bits: true", "bits: must be an integer"),
        ("group_size: 100", "group_size: must be"),
        ("group_size: 32", "group_size: must be"),
        ("bias: 1", "bias: must be true or false (value 1)"),
        ("lines: 0", "lines: must be an integer >= 1 and <= 65536 (value 0)"),
        ("lines: 65537", "lines: must be an integer >= 1 and <= 65536 (value 65537)"),
        ("codebook: scales", "codebook: must be"),
        ("overhead: 0", "overhead: must be"),
        ("overhead: 17", "overhead: must be"),
        ("fit: hesian", "fit: must be"),
        ("aim: child", "aim: must be"),
        ("damping: 0", "damping: must be"),
        ("sweeps: -1", "sweeps: must be an integer"),
        ("seed: -1", "seed: must be an integer"),
        ("activations: fp8", "unknown field 'activations'"),
        ("line: 8", "unknown field 'line' (value 8); did you mean 'lines'?"),
    ],
)
def test_fields_out_of_range_are_one_line(line: str, says: str):
    with pytest.raises(RecipeError, match=r"^[^\n]+$") as caught:
        parse_recipe(
            f"description: d\nformat: pq\nstages:\n  - method: sbvr\n    {line}\n", "a.yaml"
        )
    assert says in str(caught.value)
    assert str(caught.value).startswith("a.yaml:5: stages[0].")


def test_other_formats_hold_no_bit_vectors(tiny: Maker, text_file: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"^a\.yaml:3: [^\n]+needs 'format: pq'[^\n]+$"):
        parse_recipe("description: d\nstages:\n  - method: sbvr\n", "a.yaml")


def test_what_is_measured_follows_the_fields():
    asked = [Sbvr(), Sbvr(aim="layer"), Sbvr(fit="data-free"), Sbvr(fit="data-free", aim="layer")]
    assert [(s.needs_inputs, s.needs_parent) for s in asked] == [
        (True, True),
        (True, False),
        *[(False, False)] * 2,
    ]


@pytest.mark.parametrize("name", ["sbvr", "sbvr-3bit", "sbvr-2bit", "fireq-sbvr"])
def test_shipped_recipes(name: str):
    recipe = load_recipe(name)
    stage = recipe.stages[-1]
    assert isinstance(stage, Sbvr)
    assert recipe.format == "pq"
    assert stage.bits == {"sbvr-3bit": 3, "sbvr-2bit": 2}.get(name, 4)


# One block


@pytest.mark.parametrize(
    ("bits", "bias", "aim"), [(2, True, "parent"), (3, False, "layer"), (4, True, "layer")]
)
def test_inputs_never_make_it_worse(
    make_block: BlockMaker, model_type: str, bits: int, bias: bool, aim: str
):
    block = make_block(model_type, with_parent=aim == "parent")
    run(Sbvr(**SOME | {"layers": ("*.down_proj",), "bits": bits, "bias": bias, "aim": aim}), block)
    assert set(block.report) == {name for name, role in block.arch.roles.items() if role == "down"}
    for facts in block.report.values():
        assert 0 < facts["loss_share"] < 1
        assert facts["output_error"] < facts["weight_error"]  # the weights pay for it


@pytest.mark.parametrize("fit", ["data-free", "hessian"])
@pytest.mark.parametrize(("lines", "codebook"), [(8, "lines"), (24, "shapes")])
def test_facts_are_those_of_the_packed_weight(
    make_block: BlockMaker, fit: str, lines: int, codebook: str
):
    block, plain = make_block("qwen3", with_parent=True), make_block("qwen3")
    run(Sbvr(**SOME | {"lines": lines, "codebook": codebook, "fit": fit, "overhead": None}), block)
    assert set(block.packed) == set(block.report) == {OUT, DOWN}
    for name, facts in block.report.items():
        weight = weight_of(block, name)
        counts = torch.bincount(weight.index.flatten()).tolist()
        assert facts["cache_lines"] == len(weight.lines) * len(weight.scales) <= lines
        assert facts["cache_scales"] == len(weight.scales)
        assert (facts["cache_scales"] == 1) is (codebook == "lines")
        assert facts["cache_used"] == sum(c > 0 for c in counts) <= facts["cache_lines"]
        entropy = -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)
        assert facts["cache_effective"] == pytest.approx(math.exp(entropy))
        assert ("loss_share" in facts) is ("output_error" in facts) is (fit == "hessian")
        original = plain.linear(name).weight.detach().double()
        lost = (weight.unpack().double() - original).square().sum() / original.square().sum()
        assert facts["weight_error"] == pytest.approx(float(lost), rel=1e-4)


def test_the_data_free_fit_needs_no_inputs(make_block: BlockMaker):
    with_inputs, without = make_block("llama"), make_block("llama")
    without.inputs = []
    for block in (with_inputs, without):
        run(Sbvr(**SOME | {"fit": "data-free"}), block)
    for name in (OUT, DOWN):
        ours, theirs = weight_of(with_inputs, name).tensors(), weight_of(without, name).tensors()
        assert all(torch.equal(tensor, theirs[suffix]) for suffix, tensor in ours.items())


def test_inputs_that_cannot_be_used(make_block: BlockMaker, monkeypatch: pytest.MonkeyPatch):
    block, plain = make_block("llama"), make_block("llama")
    monkeypatch.setattr("quantize.methods.encode.damp", lambda *_: None)
    run(Sbvr(**SOME | {"aim": "layer"}), block)
    run(Sbvr(**SOME | {"fit": "data-free"}), plain)
    for name in (OUT, DOWN):
        facts = block.report[name]
        assert (
            facts["fallback"]
            == "Hessian is not finite or stays singular: fitted to the weights alone"
        )
        assert "loss_share" not in facts
        assert torch.equal(weight_of(block, name).unpack(), weight_of(plain, name).unpack())


@pytest.mark.parametrize("overhead", [0.07, 0.125, None])
def test_the_overhead_is_kept(make_block: BlockMaker, overhead: float | None):
    block = make_block("llama")
    run(
        Sbvr(
            layers=("*.down_proj",), lines=64, codebook="lines", overhead=overhead, fit="data-free"
        ),
        block,
    )
    weight = weight_of(block)
    if overhead is None:
        assert len(weight.lines) == 64
        assert weight.bits_per_weight > 4.125
    else:
        assert weight.bits_per_weight <= 4 + overhead
        assert (
            weight.bits_per_weight > 4 + overhead - 80 / weight.codes.numel()
        )  # not one line more fits


@pytest.mark.parametrize("fields", [{"overhead": 0.01}, {"group_size": 64}])
def test_an_overhead_below_one_line_is_refused_before_any_work(fields: dict[str, Any]):
    stage, shapes = (
        Sbvr(**{"ignore": ("*.k_proj",)} | fields),
        {"a.q_proj": (64, 512), "a.k_proj": (1, 1)},
    )
    with pytest.raises(ModelError, match=r"^a\.q_proj: max_overhead [^\n]+ raise overhead [^\n]+$"):
        stage.check(shapes)
    stage.model_copy(update={"overhead": None}).check(shapes)


def test_the_seed_fixes_every_byte(make_block: BlockMaker):
    def stored(seed: int) -> list[Tensor]:
        block = run(Sbvr(**SOME | {"aim": "layer", "seed": seed}), make_block("llama"))
        return [t for name in (OUT, DOWN) for t in weight_of(block, name).tensors().values()]

    first, again, other = stored(3), stored(3), stored(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )


def test_the_histogram_carries_the_points(make_block: BlockMaker):
    block = run(Sbvr(**SOME | {"fit": "data-free"}), make_block("llama"))
    collected = Collected()
    collected.add(block, {}, {})
    for name in (OUT, DOWN):
        found = collected.as_json()["histograms"][f"{block.arch.roles[name]}/4"]
        assert found["points"] == pytest.approx(weight_of(block, name).points().tolist(), rel=1e-5)
        assert sum(found["counts"]) == weight_of(block, name).codes.numel()
        assert found["edges"][0] < found["points"][0] < found["points"][-1] < found["edges"][-1]


# Pictures


def test_pictures_are_drawn_from_facts():
    facts = {
        "cache_lines": 8,
        "cache_used": 6,
        "cache_effective": 4.0,
        "cache_scales": 1,
        "loss_share": 0.5,
    }
    drawn = Sbvr().pictures({f"model.layers.{i}.{n}": facts for i in range(2) for n in (OUT, DOWN)})
    titles = [
        "Codebook occupancy",
        "Lines in the codebook",
        "Scales of a codebook",
        "Output error against the data-free fit",
    ]
    assert [picture.title for picture in drawn] == titles
    for picture, value in zip(drawn, (0.5, 8, 1, 0.5), strict=True):
        assert isinstance(picture, Heatmap)
        assert picture.values == [[value, value]] * 2
        assert svg(picture, "a-")


def test_pictures_bear_facts_of_any_kind():
    sound = {
        "cache_lines": 8,
        "cache_used": 6,
        "cache_effective": 4.0,
        "cache_scales": 1,
        "loss_share": 0.5,
    }
    odd = ["x", None, True, [1], math.nan, math.inf, -1.0, 0, 10**400]
    changed = [sound | {name: value} for name in sound for value in odd]
    changed += [{k: v for k, v in sound.items() if k != name} for name in sound]
    drawn = Sbvr().pictures({f"model.layers.{i}.{DOWN}": facts for i, facts in enumerate(changed)})
    assert len(drawn) == 4
    assert all(svg(picture, "a-") for picture in drawn)
    assert (
        Sbvr().pictures({})
        == Sbvr().pictures({f"model.layers.0.{DOWN}": {"weight_error": 0.1}})
        == ()
    )
