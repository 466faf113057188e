"""LaDiMo of models that no stock Mixture of Experts holds: their class stays, pq's format holds the experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker, row_of
from damage import checks_of, failed, sign
from natives import difference, edited, loaded, logits, rewritten, tensors_of, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from quantize.conversion.loop import Request, Summary, convert
from quantize.errors import ModelError, StoppedError
from quantize.evaluation.streamed import StreamedModel
from quantize.inspect.inspection import inspect
from quantize.methods.ladimo.trial import dense_ffn
from quantize.model.arch import ExpertSizes, Role
from quantize.model.dense_ffn import DenseParts, empty_experts, place_native_experts
from quantize.model.load import load_model
from quantize.model.moe import MoeFfn, TopK
from quantize.recipe.recipe import parse_recipe
from quantize.verification import verify

QUICK = "mean_experts: [1, null], shared: 128, experts: 2, steps: 5, batch_tokens: 32"
STAGE = f"{{method: ladimo, {QUICK}}}"
SIZES = {"n": 2, "size": 64, "shared": 128}
FFN = "model.layers.0.mlp"
TYPES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},  # gate and up projection are one linear
    "granite": {"residual_multiplier": 0.5},
}


def run(
    model: Path, output: Path, text: Path, stages: str = STAGE, form: str = "pq", **request: Any
) -> Summary:
    calibration = f"calibration: {{dataset: {text}, nsamples: 6, seqlen: 32}}"
    recipe = parse_recipe(
        f"description: d\nformat: {form}\n{calibration}\nstages: [{stages}]\n", "r.yaml"
    )
    return convert(Request(model, recipe, output, CPU, torch.float32, batch_tokens=96, **request))


@pytest.fixture(scope="module")
def made(
    tiny: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Convert (once) a tiny model of this type. Read the folder, never write into it."""
    known: dict[tuple[str, str], Path] = {}

    def make(model_type: str, behind: str = "") -> Path:
        if (model_type, behind) not in known:
            folder = tmp_path_factory.mktemp(model_type) / "out"
            run(parent(tiny, model_type), folder, text_file, STAGE + behind)
            known[model_type, behind] = folder
        return known[model_type, behind]

    return make


def parent(tiny: ModelMaker, model_type: str) -> Path:
    return tiny(model_type, **TYPES[model_type])


def streamed(folder: Path) -> torch.Tensor:
    given = tokens()
    read = StreamedModel(folder, CPU, torch.float32, "kernel").read(given, lambda: None)
    return torch.stack(list(read([(i, 0, given.shape[1]) for i in range(len(given))])))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_class_stays_and_every_loader_computes_the_same(
    model_type: str, made: Callable[..., Path], tiny: ModelMaker
):
    out = made(model_type)
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert "import quantize" in config.pop("transformers_weights")
    assert config == json.loads((parent(tiny, model_type) / "config.json").read_text())
    assert quantization["experts"] == SIZES
    assert list(quantization["routing"]) == [FFN]
    model = loaded(out)
    assert sum(isinstance(module, MoeFfn) for module in model.modules()) == 1
    ours = streamed(out)
    assert difference(logits(model), ours) < 1e-5
    assert difference(logits(load_model(out, CPU, torch.float32)), ours) < 1e-5
    wanted = logits(
        AutoModelForCausalLM.from_pretrained(parent(tiny, model_type), dtype=torch.float32)
    )
    assert 1e-4 < difference(ours, wanted) < 0.8
    result = verify(out, parent(tiny, model_type))
    assert result.ok, result.first_failure
    assert "experts " in checks_of(result)["outputs"].detail


@pytest.mark.parametrize("model_type", TYPES)
def test_all_experts_together_are_the_dense_ffn(
    model_type: str, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    """Nothing is taught and every token visits every expert: the parent's function."""
    stage = "{method: ladimo, mean_experts: 2, shared: 128, experts: 2, teaching: none}"
    run(parent(tiny, model_type), tmp_path / "out", text_file, stage)
    source = parent(tiny, model_type)
    wanted = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert difference(logits(loaded(tmp_path / "out")), wanted) < 2e-3


@pytest.mark.parametrize(
    ("model_type", "behind", "packed"),
    [
        ("qwen3", ", {method: awq}, {method: rtn, group_size: 64}", 4 + 9 + 7),
        ("gemma3_text", ", {method: gptq, group_size: 64}", 4 + 9 + 7),
        # gate and up projection are one in the dense block alone
        ("phi3", ", {method: awq}, {method: rtn, group_size: 64}", 2 + 9 + 4),
    ],
)
def test_experts_are_quantized_by_the_stages_behind(
    model_type: str, behind: str, packed: int, made: Callable[..., Path], tiny: ModelMaker
):
    out = made(model_type, behind)
    assert sum(name.endswith("weight_packed") for name in tensors_of(out)) == packed
    assert difference(logits(loaded(out)), streamed(out)) < 1e-5
    result = verify(out, parent(tiny, model_type))
    assert result.ok, result.first_failure


def test_a_decoder_without_its_head_has_the_same_experts(made: Callable[..., Path]):
    out = made("gemma3_text")
    bare = AutoModel.from_pretrained(out, dtype=torch.float32)
    whole = loaded(out)
    with torch.no_grad():
        wanted = whole.base_model(tokens()).last_hidden_state
        assert torch.equal(bare(tokens()).last_hidden_state, wanted)


def test_what_was_loaded_is_saved_as_it_was(made: Callable[..., Path], tmp_path: Path):
    model = loaded(made("gemma3_text"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_a_run_taken_up_writes_the_same_bytes(
    model_type: str, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    model, behind = parent(tiny, model_type), f"{STAGE}, {{method: gptq, group_size: 64}}"
    run(model, tmp_path / "whole", text_file, behind)
    recipe_of: dict[str, Any] = {"work": tmp_path / "work", "resume": "auto"}
    with pytest.raises(StoppedError):
        stopped(model, tmp_path / "out", text_file, behind, **recipe_of)
    assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", text_file, behind, **recipe_of)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def stopped(model: Path, output: Path, text: Path, stages: str, **request: Any) -> None:
    calibration = f"calibration: {{dataset: {text}, nsamples: 6, seqlen: 32}}"
    recipe = parse_recipe(
        f"description: d\nformat: pq\n{calibration}\nstages: [{stages}]\n", "r.yaml"
    )
    asked = Request(model, recipe, output, CPU, torch.float32, batch_tokens=96, **request)
    convert(asked, stop=lambda: True)


def test_a_reduction_that_takes_most_of_the_ffns_is_told(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Of a model whose head is most of what a token is multiplied with."""
    model, stage = tiny("qwen3", vocab_size=2048), "{{method: ladimo, teaching: none{}}}"

    def said(fields: str) -> list[str]:
        caplog.clear()
        run(model, tmp_path / f"out{fields}", text_file, stage.format(fields))
        return [line for line in caplog.messages if "of this model's FFNs" in line]

    (line,) = said("")
    assert "0.2 takes 67 %" in line
    assert "set it to 0.150, which takes half" in line
    assert said(", activated_reduction: 0.1") == []
    assert said(", mean_experts: 0") == []


def test_layers_are_searched(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    stage = "{method: ladimo, activated_reduction: 0.1, steps: 3, batch_tokens: 32}"
    summary = run(parent(tiny, "gemma3_text"), tmp_path / "out", text_file, stage)
    assert summary.activated_reduction is not None
    assert summary.activated_reduction >= 0.1


@pytest.mark.parametrize(("model_type", "told"), [("gemma3_text", False), ("granite", True)])
def test_only_what_is_not_added_by_a_norm_alone_aims_at_its_layer(
    model_type: str,
    told: bool,
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    run(parent(tiny, model_type), tmp_path / "out", text_file)
    assert any("aim: layer" in line for line in caplog.messages) == told


def test_other_formats_are_refused_by_name(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    stage = STAGE.replace("{method", "{policy: top-k, method")
    for model_type in ("qwen3", "gemma3_text"):
        with pytest.raises(ModelError, match=f"a {model_type} model fits no.*'format: pq'") as err:
            run(parent(tiny, model_type), tmp_path / "o", text_file, stage, "compressed-tensors")
        assert "\n" not in str(err.value)
    assert not (tmp_path / "o").exists()


def test_models_without_a_dense_gated_ffn_are_refused(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    for model, says in (
        (tiny("gpt_neox", rotary_pct=0.5), "no dense gated FFN"),
        (tiny("llama", mlp_bias=True), "has a bias"),
        (tiny("qwen2_moe"), "has experts already"),
    ):
        with pytest.raises(ModelError, match=says):
            run(model, tmp_path / "o", text_file)
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q["experts"].update(n=3), "are not the 256 neurons of its FFN"),
        (lambda q: q["experts"].update(n=0), "experts.n is 0"),
        (lambda q: q["experts"].pop("size"), "experts must have the fields"),
        (lambda q: q.pop("routing"), "experts without routing"),
        (lambda q: q["routing"].update({"model.layers.7.mlp": q["routing"][FFN]}), "is no FFN"),
        (
            lambda q: q["routing"].update({"model.layers.1.self_attn": q["routing"][FFN]}),
            "is no dense gated FFN",
        ),
        (
            lambda q: q["routing"].update({FFN: TopK(3).as_json()}),
            "to 3 of 2 experts",
        ),
        (lambda q: q.pop("experts"), "which routing is for|has no experts in this model"),
    ],
)
def test_sections_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], object],
    says: str,
    made: Callable[..., Path],
    tmp_path: Path,
):
    out = Path(shutil.copytree(made("qwen3"), tmp_path / "out"))
    rewritten(out, change)
    for load in (loaded, lambda folder: StreamedModel(folder, CPU, torch.float32, "kernel")):
        with pytest.raises(ModelError, match=says) as err:
            load(out)
        assert "\n" not in str(err.value)
    sign(out)
    assert not verify(out).ok


def test_a_missing_expert_is_named(made: Callable[..., Path], tmp_path: Path):
    out = Path(shutil.copytree(made("qwen3"), tmp_path / "out"))
    edited(out, lambda tensors: tensors.pop(f"{FFN}.experts.1.down_proj.weight", None))
    for load in (loaded, lambda folder: load_model(folder, CPU, torch.float32)):
        with pytest.raises(ModelError, match=r"experts\.1\.down_proj\.weight is missing"):
            load(out)


def test_other_experts_than_were_taught_are_found(
    made: Callable[..., Path], tiny: ModelMaker, tmp_path: Path
):
    out = Path(shutil.copytree(made("gemma3_text"), tmp_path / "out"))
    name = f"{FFN}.shared_expert.down_proj.weight"
    (shard,) = (path for path in out.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name] *= -9
    save_file(tensors, shard, metadata={"format": "pt"})
    sign(out)
    assert "outputs" in failed(verify(out, parent(tiny, "gemma3_text")))


def test_inspection_shows_the_routing(made: Callable[..., Path]):
    found = inspect(made("gemma3_text"))
    assert found.blocks[0].routing is not None
    assert found.blocks[1].routing is None


class Clamped(nn.Module):
    """A gated FFN of the usual parts that does more than the product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16, bias=False)
        self.up_proj = nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)
        self.act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(h.clamp(-0.1, 0.1))
        return out


class UpFirst(nn.Module):
    """One linear for both, the gate behind."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(8, 32, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)
        self.activation_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation_fn(gate) * up)
        return out


def block_of(ffn: nn.Module, roles: dict[str, Role]) -> Any:
    """What is read of a block with this FFN."""
    module = nn.Module()
    module.mlp = ffn
    arch = replace(row_of("llama"), roles={f"mlp.{name}": role for name, role in roles.items()})
    return SimpleNamespace(
        arch=arch,
        module=module.requires_grad_(False),
        linear=module.get_submodule,
        full_name=lambda name: f"model.layers.3.{name}",
    )


def test_an_ffn_that_does_more_is_refused():
    block = block_of(Clamped(), {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp: Clamped computes something else"):
        dense_ffn(block)


@torch.no_grad()
def test_which_rows_of_a_fused_linear_gate_is_seen():
    ffn = UpFirst()
    found = dense_ffn(block_of(ffn, {"gate_up_proj": "gate_up", "down_proj": "down"}))
    assert torch.equal(found.up, ffn.gate_up_proj.weight[:16])
    assert torch.equal(found.gate, ffn.gate_up_proj.weight[16:])


@torch.no_grad()
def test_experts_take_the_activation_of_the_ffn_that_they_stand_for():
    ffn = Clamped()
    sizes = ExpertSizes(2, 4, 8, 1, False, frozenset())
    made = empty_experts("mlp", ffn, sizes)
    assert made.shared_expert.act is ffn.act_fn
    ffn.act_fn = nn.PReLU()  # has weights, which experts would share
    with pytest.raises(ModelError, match="mlp: Clamped is no dense gated FFN"):
        DenseParts.of("mlp", ffn)
    with pytest.raises(ModelError, match="which is no FFN"):
        place_native_experts(nn.Module(), SIZES, {"mlp": TopK(1)})
