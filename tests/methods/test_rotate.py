"""The rotate stage: one function in another basis, for every architecture, tied or not, alone and among others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, config_of, random_weights, save_model, save_side_files
from pydantic import ValidationError
from rows import ARCHITECTURES, block_architecture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantize  # registers the native format  # noqa: F401
from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.measure import moments_of
from quantize.block.teacher import freeze_layer
from quantize.conversion.loop import Request, Summary, convert
from quantize.errors import ModelError, RecipeError
from quantize.evaluation.streamed import open_model
from quantize.files.checkpoint import Checkpoint
from quantize.methods import Stage
from quantize.methods.awq import Awq
from quantize.methods.cas import Cas
from quantize.methods.gptq import Gptq
from quantize.methods.rotate import Rotate
from quantize.methods.rtn import Rtn
from quantize.model.arch import Shape
from quantize.model.hadamard import Rotation, apply_hadamard
from quantize.model.load import load_model
from quantize.recipe.recipe import Calibration, Recipe, parse_recipe

Maker = Callable[..., Path]
BlockMaker = Callable[..., Block]

PARTS: Mapping[str, dict[str, Any]] = {
    "residual": {"values": False},
    "values": {"residual": False},
    "both": {"seed": 3},
    "down": {"residual": False, "values": False, "down": True},
    "all": {"down": True, "seed": 2**62},
}
EVERY_BIAS = {
    "attention_bias": True,
    "mlp_bias": True,
}  # of llama: o_proj and down_proj have one, too


def smooth_only(*stages: Stage) -> Recipe:
    """A recipe without an encode stage, which no file may be: what it changes, smoothing changed."""
    return Recipe.model_construct(
        name="smooth",
        description="d",
        format="pq",
        head_bits=None,
        calibration=Calibration(),
        target_bpw=None,
        stages=stages,
    )


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Make a tiny model stored in float32: what is left of a difference is arithmetic, not storage."""

    def make(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        config = config_of(model_type, **changes) | {"dtype": str(dtype).removeprefix("torch.")}
        weights = {name: t.to(dtype) for name, t in random_weights(config).items()}
        folder = save_model(tmp_path_factory.mktemp(model_type), config, weights)
        save_side_files(folder)
        return folder

    return make


def rotated(model: Path, out: Path, *stages: Stage) -> Summary:
    return convert(Request(model, smooth_only(*stages), out, CPU, torch.float32))


def logits(folder: Path) -> Tensor:
    """As transformers gives them: [2, 24, V] float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        out: Tensor = model(tokens()).logits
    return out


def tokens() -> Tensor:
    return torch.randint(0, 290, (2, 24), generator=torch.Generator().manual_seed(7))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# The function


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_computes_what_it_did(exact: Maker, model_type: str, tied: bool, tmp_path: Path):
    parent = exact(model_type, tie_word_embeddings=tied)
    wanted = logits(parent)
    for name, fields in PARTS.items():
        stage, out = Rotate(**fields), tmp_path / name
        summary = rotated(parent, out, stage)
        assert difference(logits(out), wanted) < 5e-6, name
        streamed = torch.stack(
            list(open_model(out, CPU, torch.float32, "kernel").read(tokens(), lambda: None)(SPANS))
        )
        assert difference(streamed, wanted) < 5e-6, name
        with torch.no_grad():
            assert (
                difference(load_model(out, CPU, torch.float32)(tokens()).logits, wanted) < 5e-6
            ), name
        assert_written(out, parent, stage, summary)


SPANS = [(0, 0, 24), (1, 0, 24)]


def assert_written(out: Path, parent: Path, stage: Rotate, summary: Summary) -> None:
    """Config and the tensors that the stage changes are as it says."""
    source, written = Checkpoint(parent), Checkpoint(out)
    arch, shape = ARCHITECTURES[source.config["model_type"]], Shape.of(source.config)
    head = source.tensor("model.embed_tokens.weight" if shape.tied else "lm_head.weight")
    untied = shape.tied and stage.residual
    assert written.config["tie_word_embeddings"] == (shape.tied and not untied)
    assert ("lm_head.weight" in written) == (untied or not shape.tied)
    assert summary.untied_head_bytes == (head.nbytes if untied else 0)
    assert summary.source_bytes == sum(source.tensor(name).nbytes for name in source.names())
    rows = [block_architecture(arch, source.config, i) for i in range(shape.n_blocks)]
    downs = [
        f"model.layers.{i}.{n}"
        for i, row in enumerate(rows)
        for n, role in row.roles.items()
        if role == "down"
    ]
    assert written.config.get("quantization_config", {}).get("rotated_inputs", []) == (
        downs if stage.down else []
    )
    norms = [name for name in written.names() if "layernorm" in name or name == "model.norm.weight"]
    assert len(norms) == 5
    for name in norms:
        assert bool((written.tensor(name) == 1).all()) == stage.residual, name
    for name in written.names():
        assert written.tensor(name).dtype == torch.float32, name
        if (
            "q_norm" in name
            or "k_norm" in name
            or (not stage.residual and "mlp" not in name and "attn" not in name)
        ):
            assert torch.equal(written.tensor(name), source.tensor(name)), name
    if stage.residual:
        Q = Rotation(stage.seed).apply(torch.eye(shape.hidden, dtype=torch.float64))
        embedding = source.tensor("model.embed_tokens.weight").double()
        assert difference(written.tensor("model.embed_tokens.weight"), embedding @ Q) < 1e-7
        gamma = source.tensor("model.norm.weight").double()
        assert difference(written.tensor("lm_head.weight"), (head.double() * gamma) @ Q) < 1e-7


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("part", PARTS)
def test_biases_and_any_grouping_of_heads(
    exact: Maker, tmp_path: Path, part: str, heads: tuple[int, int]
):
    sizes = {
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "num_hidden_layers": 1,
    }
    parent = exact("llama", **EVERY_BIAS, **sizes)
    assert len(Checkpoint(parent).names("model.layers.0")) == 16  # 7 weights, 7 biases, 2 norms
    rotated(parent, tmp_path / "out", Rotate(**PARTS[part]))
    assert difference(logits(tmp_path / "out"), logits(parent)) < 5e-6


def test_sizes_that_are_no_powers_of_two(exact: Maker, tmp_path: Path):
    sizes = {"hidden_size": 96, "intermediate_size": 240, "head_dim": 24}
    parent = exact("qwen3", **sizes)
    rotated(parent, tmp_path / "out", Rotate(down=True))
    assert difference(logits(tmp_path / "out"), logits(parent)) < 5e-6


def test_without_rotation_at_run_time_stock_transformers_needs_nothing_else(
    exact: Maker, tmp_path: Path
):
    parent, out = exact("qwen2", tie_word_embeddings=True), tmp_path / "out"
    rotated(parent, out, Rotate())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert difference(logits(out), logits(parent)) < 5e-6


@pytest.mark.parametrize("tied", [False, True])
def test_what_storage_in_bfloat16_costs_is_small(
    exact: Maker, tmp_path: Path, model_type: str, tied: bool
):
    parent = exact(model_type, torch.bfloat16, tie_word_embeddings=tied)
    rotated(parent, tmp_path / "out", Rotate(down=True))
    p, q = (logits(folder).log_softmax(dim=-1) for folder in (parent, tmp_path / "out"))
    assert float((p.exp() * (p - q)).sum(dim=-1).mean()) < 2e-3
    stored = Checkpoint(tmp_path / "out")
    assert {stored.tensor(name).dtype for name in stored.names()} == {torch.bfloat16}


def test_a_loaded_model_saves_its_rotation(exact: Maker, tmp_path: Path):
    rotated(exact("llama"), tmp_path / "out", Rotate(down=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "out"))
    configs = [
        json.loads((tmp_path / f / "config.json").read_text())["quantization_config"]
        for f in ("out", "saved")
    ]
    assert configs[0] == configs[1]
    assert len(configs[0]["rotated_inputs"]) == 2


# One block, and other stages beside it


@pytest.mark.parametrize("order", list(itertools.permutations(["rotate", "awq", "cas"])))
def test_any_order_with_other_smooth_stages(
    make_block: BlockMaker, model_type: str, order: tuple[str, ...]
):
    stages: dict[str, Stage] = {
        "rotate": Rotate(**PARTS["all"]),
        "awq": Awq(group_size=64, grid=2),
        "cas": Cas(qkv=0.01),
    }
    plain, block = make_block(model_type), make_block(model_type, with_parent=True)
    with torch.no_grad():
        for name in order:
            before = {n: p.clone() for n, p in block.module.named_parameters()}
            stages[name].apply(block)
            assert any(not torch.equal(p, before[n]) for n, p in block.module.named_parameters()), (
                name
            )
        wanted = [stages["rotate"].to_basis(plain.forward(plain.module, x)) for x in plain.inputs]
        # The stage turned the block's own inputs, so that whoever comes next measures what is true.
        found = [block.forward(block.module, x) for x in block.inputs]
    assert difference(torch.cat(found), torch.cat(wanted)) < 2e-5
    assert block.parent_inputs is not None
    for ours, theirs in zip(block.inputs, block.parent_inputs, strict=True):
        assert torch.equal(ours, theirs)


def test_no_diagonal_moves_into_rotated_inputs(make_block: BlockMaker):
    block = make_block("llama")
    names = [edge.name for edge in block.edges]
    with torch.no_grad():
        Rotate(**PARTS["down"]).apply(block)
    assert [edge.name for edge in block.edges] == [name for name in names if name != "up_down"]


def test_statistics_and_encoding_see_rotated_inputs(make_block: BlockMaker):
    plain, block = make_block("llama"), make_block("llama", with_parent=True)
    down = block.arch.of_role("down")
    with torch.no_grad():
        Rotate(**PARTS["down"]).apply(block)
        H = apply_hadamard(torch.eye(256))
        wanted = H.T @ moments_of(plain, down, False).hessian @ H
        assert difference(moments_of(block, down, False).hessian, wanted) < 1e-5
        before = block.forward(block.module, block.inputs[0])
        Gptq(bits=8, group_size=32).apply(block)
        assert block.rotates_inputs(down)
        assert difference(block.forward(block.module, block.inputs[0]), before) < 0.01
        freeze_layer(block)
        assert block.frozen is not None
        assert torch.equal(
            block.forward(block.frozen, block.inputs[0]),
            block.forward(block.module, block.inputs[0]),
        )


def peakedness(x: Tensor) -> tuple[float, float]:
    """Kurtosis over all entries, and absmax over rms."""
    square = x.double().square()
    return float(square.square().mean() / square.mean() ** 2), float(
        x.abs().max() / square.mean().sqrt()
    )


def test_outlier_channels_of_the_residual_stream_vanish(make_block: BlockMaker):
    block = make_block("llama")
    assert isinstance(block.module.input_layernorm, nn.Module)
    for x in block.inputs:
        x[..., [5, 77]] *= 60
    names = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    seen = []
    for stage in (None, Rotate(down=True)):
        with torch.no_grad():
            if stage is not None:
                stage.apply(block)
            inputs = [torch.cat(parts) for parts in zip(*inputs_of(block, names), strict=True)]
        seen.append([peakedness(x) for x in (torch.cat(block.inputs), *inputs)])
    before, after = seen
    for (kurtosis, peak), (kurtosis_after, peak_after) in zip(before[:3], after[:3], strict=True):
        assert kurtosis > 30
        assert kurtosis_after < 4  # 3 is a normal distribution's
        assert peak > 8
        assert peak_after < 6.5
    assert after[3][0] < before[3][0]


# Refusals


def recipe(text: str) -> Recipe:
    return parse_recipe(f"description: d\n{text}", "r.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "stages: [{method: rotate}, {method: rotate, seed: 1}, {method: rtn}]",
            r"r\.yaml:2: stages\[1\]: a second stage 'rotate'; one does all, remove it",
        ),
        (
            "stages:\n  - method: rotate\n    down: true\n  - method: rtn",
            r"r\.yaml:4: stages\[0\]\.down: needs 'format: pq', no other loader can do this; add it or turn this off",
        ),
        (
            "stages: [{method: rotate, residual: false, values: false}, {method: rtn}]",
            r"residual, values and down are all off; turn one on or remove the stage",
        ),
        ("stages: [{method: rtn}, {method: rotate}]", r"smooth 'rotate' follows encode 'rtn'"),
        ("stages: [{method: rotate, seed: -1}, {method: rtn}]", r"seed: must be an integer >= 0"),
    ],
)
def test_recipes_that_are_refused(text: str, says: str):
    with pytest.raises(RecipeError, match=says) as caught:
        recipe(text)
    assert "\n" not in str(caught.value)


def test_recipes_made_in_code_are_refused_alike():
    fields: dict[str, Any] = {"name": "r", "description": "d"}
    with pytest.raises(ValidationError, match="needs 'format: pq'"):
        Recipe(**fields, stages=(Rotate(down=True), Rtn()))
    with pytest.raises(ValidationError, match="a second stage 'rotate'"):
        Recipe(**fields, stages=(Rotate(), Rotate(), Rtn()))


def test_recipes_that_are_taken():
    assert recipe("format: pq\nstages: [{method: rotate, down: true}, {method: rtn}]").stages[
        0
    ] == Rotate(down=True)
    assert recipe("stages: [{method: cas}, {method: rotate}, {method: awq}, {method: rtn}]")


def test_a_format_that_cannot_hold_it_is_refused_whoever_asks(exact: Maker, tmp_path: Path):
    asked = smooth_only(Rotate(down=True)).model_copy(update={"format": "compressed-tensors"})
    with pytest.raises(RecipeError, match=r"recipe smooth: stages\[0\]\.down: needs 'format: pq'"):
        convert(Request(exact("llama"), asked, tmp_path / "out", CPU, torch.float32))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "stage", "says"),
    [
        (
            {"hidden_size": 268},
            Rotate(values=False),
            r"hidden size 268: .* size 268 .*; set residual: false",
        ),
        ({"head_dim": 18}, Rotate(residual=False), r"head size 18: .*; set values: false"),
        (
            {"intermediate_size": 536},
            Rotate(down=True),
            r"inputs of down_proj 536: .*; set down: false",
        ),
    ],
)
def test_sizes_without_a_matrix_are_refused_before_any_work(
    exact: Maker, tmp_path: Path, sizes: dict[str, int], stage: Rotate, says: str
):
    with pytest.raises(ModelError, match=says) as caught:
        rotated(exact("llama", **sizes), tmp_path / "out", stage)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
