from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gates import GOOD, Maker, stub_runs, write_gate

from quantize.errors import DataError, ModelError, QualityError, RecipeError, UsageError
from quantize.files.resources import data_dir
from quantize.gate.run import run_gate

BASELINES = data_dir("eval") / "baselines.yaml"


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Nothing is converted or measured; returns the list of what was asked for: stubbed(kld_mean=0.03)."""
    return stub_runs(monkeypatch)


@pytest.fixture
def gate_file(tmp_path: Path, tiny: Maker) -> Callable[..., Path]:
    """Write a gate file on a tiny model: gate_file("fireq: {...}", "tasks: [...]")."""
    return functools.partial(write_gate, tmp_path / "gate.yaml", tiny("llama"))


def test_a_run_converts_evaluates_and_checks(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], tiny: Maker
):
    asked = stubbed()
    path = gate_file(
        GOOD + "\nrtn: {kld_mean: {value: 0.01, tolerance: 5%}}", "evaluation: {seqlen: 64}"
    )
    result = run_gate(path)
    assert [(v.recipe, v.metric, v.status) for v in result.verdicts] == [
        ("fireq", "kld_mean", "pass"),
        ("fireq", "perplexity", "pass"),
        ("rtn", "kld_mean", "FAIL"),
    ]
    (request, (model, baseline, settings)), rest = asked[:2], asked[2:]
    assert (request.recipe.name, request.model, model, baseline) == (
        "fireq",
        tiny("llama"),
        request.output,
        baseline,
    )
    assert settings["seqlen"] == 64
    assert rest[0].recipe.name == "rtn"
    assert not request.output.exists()
    assert not result.ok
    with pytest.raises(
        QualityError, match=r"gate\.yaml: 1 of 3 checks failed: rtn\.kld_mean must be <= 0\.0105"
    ) as err:
        result.raise_if_failed()
    assert err.value.exit_code == 9
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert run_gate(path, only=["fireq"]).ok
    run_gate(path, only=["fireq"]).raise_if_failed()


def test_nan_fails_and_the_result_is_json(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]]
):
    stubbed(kld_mean=math.nan, perplexity=math.inf)
    result = run_gate(gate_file(GOOD))
    assert [(v.status, v.detail) for v in result.verdicts] == [
        ("FAIL", "is nan"),
        ("FAIL", "is inf"),
    ]
    assert (
        json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))["figures"]["fireq"][
            "kld_mean"
        ]
        is None
    )


def test_a_figure_that_is_missing_fails(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]]
):
    stubbed(bits_per_weight=None, baseline_perplexity=None)
    entries = "fireq: {bits_per_weight: {value: 4, tolerance: 9}, perplexity: {recovery: 0.1}}"
    details = [v.detail for v in run_gate(gate_file(entries)).verdicts if not v.ok]
    assert details == ["strided-256 does not give it", "the parent's figure was not measured"]


def test_a_model_that_cannot_be_used_fails_its_checks(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]]
):
    stubbed(ModelError("out: its logits are not finite"))
    verdicts = run_gate(gate_file(GOOD)).verdicts
    assert {(v.status, v.detail) for v in verdicts} == {("FAIL", "out: its logits are not finite")}
    stubbed(DataError("no such text"))
    with pytest.raises(DataError):  # the set-up's fault, not the recipe's
        run_gate(gate_file(GOOD))


def test_a_given_model_is_found_by_its_recipe(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], converted: Maker, tiny: Maker
):
    asked = stubbed()
    path = gate_file(GOOD + "\ngptq: {kld_mean: {value: 0.02, tolerance: 0}}")
    model, parent = converted("gptq", "llama"), tiny("llama")
    result = run_gate(path, model, parent)
    assert [(v.recipe, v.status) for v in result.verdicts] == [("gptq", "pass")]
    assert [call[:2] for call in asked] == [(model, parent)]  # nothing is converted
    assert run_gate(path, model, parent, only=["fireq"]).verdicts[0].recipe == "fireq"


def test_arguments_that_make_no_sense(
    gate_file: Callable[..., Path],
    stubbed: Callable[..., list[Any]],
    converted: Maker,
    tiny: Maker,
    tmp_path: Path,
):
    asked = stubbed()
    path, parent, model = (
        gate_file(GOOD + "\nrtn: {perplexity: {recovery: 0.1}}"),
        tiny("llama"),
        converted("gptq", "llama"),
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": model}, "give it with --baseline"),
        ({"baseline": parent}, "needs a model"),
        ({"only": ["firq"]}, "no entry 'firq'; did you mean 'fireq'?"),
        ({"model": model, "baseline": parent}, "no entry for .*recipe 'gptq'"),
        ({"model": parent, "baseline": parent}, r"has no pq\.json"),
        ({"model": model, "baseline": parent, "only": ["fireq", "rtn"]}, "could be fireq, rtn"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            run_gate(path, **arguments)
    with pytest.raises(ModelError):
        run_gate(path, tmp_path / "no", parent, only=["rtn"])
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(UsageError, match="names no model"):
        run_gate(path)
    path.write_text("model: nowhere\n" + path.read_text())
    with pytest.raises(RecipeError, match=r"gate\.yaml:1: model: no such folder"):
        run_gate(path)
    assert not asked


def test_tasks_are_compared_with_the_parents(
    gate_file: Callable[..., Path],
    stubbed: Callable[..., list[Any]],
    tiny: Maker,
    monkeypatch: pytest.MonkeyPatch,
):
    stubbed()
    calls: list[tuple[Path, Any]] = []

    def run_tasks(folder: Path, tasks: Any, **options: Any) -> Any:
        calls.append((folder, options))
        acc = 0.5 if folder == tiny("llama") else 0.45
        scores = {
            "acc": {"value": acc, "stderr": 0.1, "higher_is_better": True},
            "perplexity": {"value": 1 / acc, "stderr": None, "higher_is_better": False},
        }
        return types.SimpleNamespace(tasks={"arc": scores})

    harness = types.ModuleType("harness")
    harness.run_tasks = run_tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quantize.evaluation.harness", harness)
    monkeypatch.setattr("quantize.evaluation.harness", harness, raising=False)
    entries = """fireq:
  arc/acc: {recovery: 0.89, value: 0.5, tolerance: 0.01}
  arc/perplexity: {recovery: 0.91}
  arc/accc: {recovery: 0.1}
  other/acc: {value: 0.5, tolerance: 1}
rtn: {arc/acc: {recovery: 0.91}}"""
    top = ("tasks: ['multiple_choice:arc.jsonl']", "task_limit: 7", "evaluation: {bos: never}")
    result = run_gate(gate_file(entries, *top))
    assert [(v.metric, v.kind, v.status) for v in result.verdicts] == [
        ("arc/acc", "value", "FAIL"),
        ("arc/acc", "recovery", "pass"),
        ("arc/perplexity", "recovery", "FAIL"),
        ("arc/accc", "recovery", "FAIL"),
        ("other/acc", "value", "FAIL"),
        ("arc/acc", "recovery", "FAIL"),
    ]
    assert "did you mean 'arc/acc'?" in result.verdicts[3].detail
    assert [folder == tiny("llama") for folder, _ in calls] == [
        True,
        False,
        False,
    ]  # the parent once
    for _, options in calls:
        assert (options["limit"], options["numerics"], options["bos"]) == (7, "kernel", "never")
    assert result.tasks["fireq"]["arc"]["acc"]["baseline"] == 0.5


def test_a_broken_recipe_fails_the_shipped_gate(tmp_path: Path):
    text = BASELINES.read_text(encoding="utf-8").replace(
        "  fireq-linear:\n", "  fireq-linear:\n    set: [bits=2, activations=none]\n"
    )
    text = text.replace("nsamples: 32", "nsamples: 8")
    path = tmp_path / "broken.yaml"
    path.write_text(
        text.replace("model: reference-model", f"model: {data_dir('eval') / 'reference-model'}")
    )
    result = run_gate(path, only=["fireq-linear", "fireq-paper-linear"])
    status = {(v.recipe, v.metric): v.status for v in result.verdicts}
    assert {status["fireq-linear", m] for m in ("kld_mean", "perplexity", "top1_agreement")} == {
        "FAIL"
    }
    assert status["fireq-linear", "bits_per_weight"] == "better"
    assert {s for (recipe, _), s in status.items() if recipe == "fireq-paper-linear"} == {"pass"}


def test_a_real_run_on_a_tiny_model(gate_file: Callable[..., Path], text_file: Path):
    path = gate_file(
        "rtn: {kld_mean: {value: 0, tolerance: 5}, bits_per_weight: {value: 4.125, tolerance: 0}}\n"
        "worse: {recipe: rtn, set: [bits=2], kld_mean: {value: 0, tolerance: 0}, perplexity: {recovery: 0.001}}",
        f"evaluation: {{dataset: {json.dumps(str(text_file))}, seqlen: 32, max_windows: 4}}",
    )
    seen: list[str] = []
    result = run_gate(path, progress=lambda what, done, total: seen.append(what))
    assert [v.status for v in result.verdicts] == ["pass", "pass", "FAIL", "pass"]
    assert result.figures["worse"]["kld_mean"] > result.figures["rtn"]["kld_mean"] > 0
    assert {"rtn: quantizing", "worse: evaluating"} <= set(seen)


def test_a_real_task(gate_file: Callable[..., Path], tmp_path: Path, text_file: Path):
    pytest.importorskip("lm_eval")
    rows = [
        {"id": str(i), "query": f"{i} and", "choices": ["one", "two"], "gold": i % 2}
        for i in range(4)
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = f"evaluation: {{dataset: {json.dumps(str(text_file))}, seqlen: 32, max_windows: 1}}"
    tasks = "tasks: ['multiple_choice:quiz.jsonl']"
    result = run_gate(
        gate_file("rtn: {quiz/acc: {value: 0.5, tolerance: 0.5}}", settings, tasks, "task_limit: 3")
    )
    assert [v.status for v in result.verdicts] == ["pass"]
    assert result.tasks["rtn"]["quiz"]["acc"]["baseline"] is not None
