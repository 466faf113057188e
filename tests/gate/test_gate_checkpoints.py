"""Entries of a gate file that are checkpoints, by whatever tool."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gates import Maker, stub_runs, write_gate

from quantize.errors import ModelError, QualityError, RecipeError, UsageError
from quantize.gate.checks import Check, Measurement, judge
from quantize.gate.file import load_gate
from quantize.gate.run import run_gate
from quantize.gate.update import update_baselines

CHECKS = "kld_mean: {value: 0.02, stderr: 0.001, tolerance: 3 se}"


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Nothing is converted or measured; returns the list of what was asked for."""
    return stub_runs(monkeypatch)


@pytest.fixture
def gate_file(tmp_path: Path, tiny: Maker) -> Callable[..., Path]:
    """A file with the recipe rtn and checkpoints beside it: gate_file("theirs: {...}")."""

    def write(checkpoints: str, *top: str) -> Path:
        lines = "checkpoints:\n" + "\n".join("  " + line for line in checkpoints.splitlines())
        return write_gate(
            tmp_path / "gate.yaml",
            tiny("llama"),
            "rtn: {kld_mean: {value: 1, tolerance: 0}}",
            *top,
            lines,
        )

    return write


@pytest.fixture
def theirs(converted: Maker, tmp_path: Path) -> Path:
    """A checkpoint in compressed-tensors that says nothing of pq."""
    folder = shutil.copytree(converted("rtn", "llama"), tmp_path / "theirs")
    (folder / "pq.json").unlink()
    return folder


def test_checkpoints_are_measured_as_they_are(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], theirs: Path, tiny: Maker
):
    asked = stubbed(kld_mean=0.0225, kld_stderr=0.0011)
    path = gate_file(f"theirs: {{{CHECKS}}}\nnamed:\n  folder: {theirs}\n  {CHECKS}")
    result = run_gate(path, only=["theirs", "named"])
    assert [(v.recipe, v.status, v.tolerance, v.stderr) for v in result.verdicts] == [
        ("theirs", "pass", "3 se", 0.0011),
        ("named", "pass", "3 se", 0.0011),
    ]
    assert [(model, baseline) for model, baseline, _ in asked] == [(theirs, tiny("llama"))] * 2
    assert len(run_gate(path).verdicts) == 3


def test_a_foreign_checkpoint_is_found_by_folder_or_name(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], theirs: Path, tiny: Maker
):
    stubbed()
    path = gate_file(f"theirs: {{{CHECKS}}}\nother: {{folder: elsewhere/w4, {CHECKS}}}")
    parent = tiny("llama")
    assert run_gate(path, theirs, parent).verdicts[0].recipe == "theirs"
    moved = shutil.copytree(theirs, theirs.parent / "ci" / "w4")
    assert run_gate(path, moved, parent).verdicts[0].recipe == "other"
    third = shutil.copytree(theirs, theirs.parent / "third")
    with pytest.raises(
        UsageError, match=r"no pq\.json .* with --only \(entries: theirs, other, rtn"
    ):
        run_gate(path, third, parent)
    assert run_gate(path, third, parent, only=["other"]).verdicts[0].recipe == "other"


def test_a_folder_that_is_not_there_is_no_failed_check(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], theirs: Path
):
    asked = stubbed()
    with pytest.raises(
        RecipeError, match=r"gate\.yaml:3: checkpoints\.gone: no such folder: .*gone"
    ):
        run_gate(gate_file(f"gone: {{{CHECKS}}}"))
    with pytest.raises(RecipeError, match=r"\.gone\.folder: no such folder"):
        run_gate(gate_file(f"gone: {{folder: a/b/c, {CHECKS}}}"))
    assert not asked
    next(theirs.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError):
        run_gate(gate_file(f"theirs: {{{CHECKS}}}"))


def test_hub_ids_are_asked_of_the_hub(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], theirs: Path
):
    asked = stubbed()
    path = gate_file(f"'org/w4@main': {{{CHECKS}}}")
    wanted: list[str] = []

    def locate(name: str) -> Path:
        wanted.append(name)
        return theirs

    run_gate(path, only=["org/w4@main"], locate=locate)
    assert wanted == ["org/w4@main"]
    assert asked[0][0] == theirs
    with pytest.raises(RecipeError, match="no such folder"):
        run_gate(path)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("x: {set: [bits=2], " + CHECKS + "}", r"checkpoints\.x\.set: unknown metric"),
        ("x: {folder: 3, " + CHECKS + "}", r"checkpoints\.x\.folder: must be a text"),
        ("rtn: {" + CHECKS + "}", r"checkpoints\.rtn: is a recipe's name as well"),
        (
            "x: {kld_mean: {value: 1, tolerance: 3 se}}",
            r"kld_mean\.tolerance: .*'stderr' is missing",
        ),
        ("x: {kld_mean: {value: 1, stderr: -1, tolerance: 1}}", r"stderr: must be a number >= 0"),
        ("x: {kld_mean: {value: 1, stderr: 1, tolerance: 3 sd}}", r"tolerance: .*such as 3 se"),
    ],
)
def test_mistakes_are_lines(gate_file: Callable[..., Path], entry: str, line: str):
    with pytest.raises(RecipeError, match=line):
        load_gate(gate_file(entry))


def test_settings_take_what_pq_eval_takes(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], theirs: Path
):
    asked = stubbed()
    top = "evaluation: {text_field: messages, chat_template: false, dtype: bfloat16, seqlen: 64}"
    run_gate(gate_file(f"theirs: {{{CHECKS}}}", top), only=["theirs"])
    how = asked[0][2]
    assert (how["text_field"], how["chat_template"], str(how["dtype"])) == (
        "messages",
        False,
        "torch.bfloat16",
    )
    for wrong in ("text_field: 3", "chat_template: 1", "dtype: int8"):
        with pytest.raises(RecipeError, match=r"evaluation\.\w+: must be"):
            load_gate(gate_file(f"theirs: {{{CHECKS}}}", f"evaluation: {{{wrong}}}"))


@pytest.mark.parametrize(
    ("value", "status"), [(0.0229, "pass"), (0.0231, "FAIL"), (0.0171, "pass"), (0.0169, "better")]
)
def test_a_tolerance_in_standard_errors(value: float, status: str):
    check = Check("kld_mean", "value", 0.02, 3.0, "se", stderr=0.001)
    assert judge("x", check, Measurement(value)).status == status


def test_an_update_takes_the_standard_error_along(
    gate_file: Callable[..., Path], stubbed: Callable[..., list[Any]], theirs: Path
):
    stubbed(protocol="strided-512", kld_mean=0.0123456, kld_stderr=0.000789)
    path = gate_file(f"theirs: {{{CHECKS}}}  # why")
    changes = update_baselines(path, run_gate(path, only=["theirs"], renew=True), "better scales")
    assert changes[:2] == [
        "theirs.kld_mean 0.02 -> 0.01235",
        "theirs.kld_mean stderr 0.001 -> 0.000789",
    ]
    text = path.read_text()
    assert "kld_mean: {value: 0.01235, stderr: 0.000789, tolerance: 3 se}}  # why" in text
    assert load_gate(path).entries[0].protocol == "strided-512"
    assert run_gate(path, only=["theirs"]).ok
    stubbed(protocol="strided-512", kld_mean=0.001, kld_stderr=None)
    with pytest.raises(QualityError, match="no standard error"):
        update_baselines(path, run_gate(path, only=["theirs"]), "one window")


def test_a_foreign_checkpoint_and_a_plain_one_are_really_measured(
    gate_file: Callable[..., Path], theirs: Path, tiny: Maker, text_file: Path
):
    top = f"evaluation: {{dataset: {text_file}, seqlen: 32, max_windows: 4}}"
    path = gate_file(
        "theirs: {bits_per_weight: {value: 4.125, tolerance: 0}, kld_mean: {value: 0, tolerance: 9}}\n"
        f"plain: {{folder: {tiny('llama')}, kld_mean: {{value: 0, tolerance: 0}}}}",
        top,
    )
    result = run_gate(path, only=["theirs", "plain"])
    assert [v.status for v in result.verdicts] == ["pass", "pass", "pass"]
    assert (result.verdicts[1].value or 0) > 0
    assert (result.verdicts[1].stderr or 0) > 0
