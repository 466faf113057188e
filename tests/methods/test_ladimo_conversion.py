"""Conversions by LaDiMo: what is written loads by its own config, verifies, and can be taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker
from damage import checks_of, failed, sign
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantize.conversion.source as source_module
from quantize.conversion.loop import Request, Summary, convert
from quantize.errors import ModelError, UsageError
from quantize.evaluation import evaluate
from quantize.evaluation.streamed import StreamedModel
from quantize.methods.ladimo.stage import Ladimo
from quantize.model.load import load_model
from quantize.model.moe import MoeFfn
from quantize.recipe.recipe import parse_recipe
from quantize.verification import verify

Call = Callable[..., tuple[int, str, str]]
EXPERT = "model.layers.0.mlp.shared_expert.down_proj"
QUICK = "mean_experts: [1, null], shared: 128, experts: 2, steps: 5, batch_tokens: 32"


def run(
    model: Path,
    stages: str,
    output: Path,
    text: Path,
    form: str = "compressed-tensors",
    **request: Any,
) -> Summary:
    calibration = f"calibration: {{dataset: {text}, nsamples: 6, seqlen: 32}}"
    recipe = parse_recipe(
        f"description: d\nformat: {form}\n{calibration}\nstages: [{stages}]\n", "r.yaml"
    )
    return convert(Request(model, recipe, output, CPU, torch.float32, batch_tokens=96, **request))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_restructure_loads_by_its_own_config(
    model_type: str, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    """The law of restructure."""
    summary = run(
        tiny(model_type), f"{{method: ladimo, policy: top-k, {QUICK}}}", tmp_path / "out", text_file
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "qwen2_moe"
    assert config["mlp_only_layers"] == [1]
    assert "quantization_config" not in config
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model(tokens).logits
    ours = StreamedModel(tmp_path / "out", CPU, torch.float32, "kernel").read(tokens, lambda: None)
    assert torch.allclose(torch.stack(list(ours([(0, 0, 20), (1, 0, 20)]))), theirs, atol=1e-4)
    parent = AutoModelForCausalLM.from_pretrained(tiny(model_type), dtype=torch.float32)
    with torch.no_grad():
        wanted = parent(tokens).logits
    assert 0 < float((theirs - wanted).norm() / wanted.norm()) < 0.8
    (row,) = summary.restructured
    assert {
        "ffn_error",
        "pruned_error",
        "untrained_error",
        "random_error",
        "seconds",
        "peak_bytes",
    } <= set(row)


def test_biases_of_the_container_are_zero_and_other_tensors_the_parents(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    run(tiny("llama"), f"{{method: ladimo, policy: top-k, {QUICK}}}", tmp_path / "out", text_file)
    made = {
        k: v
        for path in (tmp_path / "out").glob("*.safetensors")
        for k, v in load_file(path).items()
    }
    parent = load_file(tiny("llama") / "model.safetensors")
    for name, tensor in parent.items():
        if name.startswith("model.layers.0.mlp."):
            assert name not in made
        else:
            assert torch.equal(made[name], tensor), name
    biases = [name for name in made if name.endswith(".bias")]
    assert len(biases) == 6
    assert not any(made[name].any() for name in biases)


def test_layers_are_searched_and_the_plan_is_kept(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    summary = run(
        tiny("llama"),
        "{method: ladimo, activated_reduction: 0.1, steps: 3, batch_tokens: 32}",
        tmp_path / "out",
        text_file,
        "pq",
    )
    assert summary.activated_reduction is not None
    assert summary.activated_reduction >= 0.1
    facts = json.loads((tmp_path / "out/pq.json").read_text())
    plan = facts["layers"]["ladimo"]
    assert len(plan["kl_alone"]) == 2
    resolved = parse_recipe(facts["recipe"]["resolved"], "r.yaml").stages[0]
    assert isinstance(resolved, Ladimo)
    assert resolved.mean_experts is not None
    assert resolved.experts == plan["experts"]


def test_a_window_that_overflows_leaves_the_search(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = source_module.sample

    def search(name: str, change: Callable[[list[Tensor]], None]) -> dict[str, Any]:
        def sample(*arguments: Any) -> list[Tensor]:
            hidden = real(*arguments)
            change(hidden)
            return hidden

        monkeypatch.setattr(source_module, "sample", sample)
        stage = "{method: ladimo, teaching: none, activated_reduction: 0.1}"
        run(tiny("llama"), stage, tmp_path / name, text_file, "pq")
        found: dict[str, Any] = json.loads((tmp_path / name / "pq.json").read_text())["layers"][
            "ladimo"
        ]
        return found

    def spoil(hidden: list[Tensor]) -> None:
        hidden[0][1, 3, 5] = torch.inf

    def leave_out(hidden: list[Tensor]) -> None:
        hidden[0] = hidden[0][[0, *range(2, len(hidden[0]))]]

    spoiled, without = search("spoiled", spoil), search("without", leave_out)
    for key in ("kl_alone", "mean_experts"):
        assert spoiled[key] == pytest.approx(without[key], rel=1e-4), key
    assert spoiled["kl_untrained"] == pytest.approx(without["kl_untrained"], rel=1e-4)
    assert 0 < spoiled["kl_untrained"] < 1


def test_experts_are_quantized_by_the_stages_behind(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    stages = f"{{method: ladimo, policy: top-k, {QUICK}}}, {{method: gptq, group_size: 64}}"
    summary = run(tiny("llama"), stages, tmp_path / "out", text_file, "pq")
    assert summary.quantized_linears == 4 + 9 + 7
    model = StreamedModel(tmp_path / "out", CPU, torch.float32, "kernel")
    tokens = torch.randint(300, (1, 12), generator=torch.Generator().manual_seed(0))
    (logits,) = model.read(tokens, lambda: None)([(0, 0, 12)])
    assert torch.isfinite(logits).all()


def test_a_stopped_run_takes_up_what_was_taught(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    stages, work = f"{{method: ladimo, policy: top-k, {QUICK}}}", tmp_path / "work"
    run(tiny("llama"), stages, tmp_path / "a", text_file, work=work)
    (kept,) = work.iterdir()
    changed = kept.stat().st_mtime_ns
    run(tiny("llama"), stages, tmp_path / "b", text_file, work=work)
    assert kept.stat().st_mtime_ns == changed
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("stage", "error", "says"),
    [
        (
            "{method: ladimo, policy: top-k, shared: 100, experts: 2}",
            ModelError,
            "do not divide an FFN of 256 neurons",
        ),
        (
            "{method: ladimo, policy: top-k, mean_experts: [1]}",
            ModelError,
            "mean_experts has 1 entries for 2 blocks",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(
    stage: str, error: type[Exception], says: str, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    with pytest.raises(error, match=says):
        run(tiny("llama"), stage, tmp_path / "out", text_file)
    assert not (tmp_path / "out").exists()


def test_a_target_of_bits_does_not_go_with_it(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="a recipe that restructures has none"):
        run(
            tiny("llama"),
            "{method: ladimo, policy: top-k}, {method: rtn}",
            tmp_path / "o",
            text_file,
            target_bpw=5.0,
        )


def test_a_number_for_all_blocks_and_the_nearest_that_top_k_can_hold(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    sizes = "shared: 128, experts: 2, teaching: none"
    run(
        tiny("llama"),
        f"{{method: ladimo, mean_experts: 0.5, {sizes}}}",
        tmp_path / "a",
        text_file,
        "pq",
    )
    found = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]["routing"]
    assert len(found) == 2
    layers = json.loads((tmp_path / "a/pq.json").read_text())["layers"]
    for index in range(2):
        assert 0 < layers[f"model.layers.{index}.mlp"]["mean_experts"] < 1
    run(
        tiny("llama"),
        f"{{method: ladimo, policy: top-k, mean_experts: [1.7, 1.5], {sizes}}}",
        tmp_path / "b",
        text_file,
    )
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["num_experts_per_tok"] == 2
    layers = json.loads((tmp_path / "b/pq.json").read_text())["layers"]
    # What a fixed number costs is told.
    facts = layers["model.layers.0.mlp"]
    assert set(facts["policy_errors"]) == {"top-k", "threshold"}
    assert set(facts["split_errors"]) == {
        "clustered",
        "contiguous",
        "random",
        "contiguous, none shared",
    }


@pytest.mark.parametrize(
    "behind",
    ["", ", {method: gptq, group_size: 64}", ", {method: rotate}, {method: rtn, group_size: 64}"],
)
def test_experts_are_verified_against_the_dense_parent(
    behind: str, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    stages = f"{{method: ladimo, {QUICK.replace('[1,', '[0.5,')}}}{behind}"
    run(tiny("llama"), stages, tmp_path / "out", text_file, "pq")
    result = verify(tmp_path / "out", tiny("llama"))
    assert result.ok, result.first_failure
    assert "experts " in checks_of(result)["outputs"].detail
    other = verify(tmp_path / "out", tiny("llama", hidden_size=64, head_dim=16))
    assert "another architecture or size" in checks_of(other)["untouched"].detail


def test_other_experts_and_biases_than_were_taught_are_found(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    run(tiny("llama"), f"{{method: ladimo, {QUICK}}}", tmp_path / "out", text_file, "pq")
    shard = next(
        p for p in (tmp_path / "out").glob("*.safetensors") if f"{EXPERT}.weight" in load_file(p)
    )
    tensors = load_file(shard)
    save_file(
        tensors | {f"{EXPERT}.weight": -9 * tensors[f"{EXPERT}.weight"]},
        shard,
        metadata={"format": "pt"},
    )
    sign(tmp_path / "out")
    assert failed(verify(tmp_path / "out", tiny("llama"))) == ["outputs"]
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {bias: tensors[bias] + 1}, shard, metadata={"format": "pt"})
    sign(tmp_path / "out")
    result = verify(tmp_path / "out", tiny("llama"))
    assert "untouched" in failed(result)
    assert f"{bias} is not in the parent" in checks_of(result)["untouched"].detail


@torch.no_grad()
def test_evaluation_counts_visits_and_parameters(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    stages = f"{{method: ladimo, {QUICK.replace('[1,', '[0.5,')}}}, {{method: rtn, group_size: 64}}"
    run(tiny("llama"), stages, tmp_path / "out", text_file, "pq")
    found = evaluate(
        tmp_path / "out", tiny("llama"), dataset=str(text_file), seqlen=32, max_windows=4
    )
    model = load_model(tmp_path / "out", CPU, torch.float32)
    (ffn,) = (module for module in model.modules() if isinstance(module, MoeFfn))
    scores: list[Tensor] = []
    ffn.gate.register_forward_hook(lambda gate, args, out: scores.append(out))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(
        text_file.read_text(), add_special_tokens=False
    )["input_ids"]
    model(torch.tensor(ids[: 4 * 32]).view(4, 32))
    mean = float(ffn.policy.select(scores[0]).sum(dim=1).float().mean())
    assert 0 < mean < 2
    assert found.experts_visited == {"0": pytest.approx(mean)}
    parent = sum(
        t.numel()
        for n, t in load_file(tiny("llama") / "model.safetensors").items()
        if "embed" not in n
    )
    assert found.baseline_activated_parameters == parent
    assert found.activated_parameters is not None
    # Two experts of 64 neurons, of which a token visits `mean`; router, gate and three biases are new.
    hidden = ffn.gate.in_features
    attention = model.get_submodule("model.layers.0.self_attn")
    biases = 2 * sum(
        tensor.numel() for name, tensor in attention.state_dict().items() if name.endswith("bias")
    )
    assert found.activated_parameters == pytest.approx(
        parent - 3 * hidden * 64 * (2 - mean) + 3 * hidden + biases
    )


def test_the_command_shows_what_it_beats_and_leaves_no_work(
    pq: Call, tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    (tmp_path / "r.yaml").write_text(
        f"description: d\nformat: pq\nstages: [{{method: ladimo, {QUICK}}}]\n"
    )
    sizes = ["--dataset", text_file, "--nsamples", 6, "--seqlen", 32, "--device", "cpu"]
    paths = ["-m", tiny("llama"), "-r", tmp_path / "r.yaml", "-o", tmp_path / "out"]
    code, _, err = pq("convert", *paths, *sizes)
    assert code == 0
    assert "fewer activated parameters" in err
    assert all(column in err for column in ("pruned", "untrained", "random"))
    assert not (tmp_path / "out.work").exists()
    code, out, _ = pq(
        "eval",
        tmp_path / "out",
        "--baseline",
        tiny("llama"),
        "--dataset",
        text_file,
        "--seqlen",
        32,
    )
    assert code == 0
    assert "routed experts a token" in out
    page = json.loads((tmp_path / "out.report.json").read_text())
    assert "Activated" in {headline["label"] for headline in page["headlines"]}


def test_a_stopped_command_keeps_what_was_taught(
    pq: Call, tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "r.yaml").write_text(
        f"description: d\nformat: pq\nstages: [{{method: ladimo, {QUICK}}}]\n"
    )
    sizes = ["--dataset", text_file, "--nsamples", 6, "--seqlen", 32, "--device", "cpu"]
    paths = ["-m", tiny("llama"), "-r", tmp_path / "r.yaml", "-o", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr("quantize.files.writer.CheckpointWriter.commit", interrupt)
        assert pq("convert", *paths, *sizes)[0] == 130
    assert not (tmp_path / "out").exists()
    (kept,) = (
        path for path in (tmp_path / "out.work").glob("*.safetensors") if len(path.stem) == 64
    )
    stamp = kept.stat().st_mtime_ns
    assert (
        pq("convert", *paths, *sizes, "--work", tmp_path / "out.work", "--resume", "never")[0] == 0
    )
    assert list((tmp_path / "out.work").iterdir()) == [kept]
    assert kept.stat().st_mtime_ns == stamp  # taken up, and a folder that was named stays


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt
