"""Baselines of one protocol are not compared with figures of another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import with_added_bos
from gates import GOOD, Maker, stub_runs, write_gate

from quantize.errors import RecipeError
from quantize.evaluation.protocols import Protocol
from quantize.files.resources import data_dir
from quantize.gate.file import load_gate
from quantize.gate.protocol import protocol_of
from quantize.gate.run import run_gate
from quantize.gate.update import update_baselines
from quantize.model.tokenizer import load_tokenizer


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Nothing is converted or measured; returns the list of what was asked for."""
    return stub_runs(monkeypatch)


@pytest.fixture
def gate_file(tmp_path: Path, tiny: Maker) -> Callable[..., Path]:
    """Write a gate file on a tiny model, whose tokenizer adds no BOS."""
    return functools.partial(write_gate, tmp_path / "gate.yaml", tiny("llama"))


def test_the_shipped_baselines_are_of_what_the_gate_measures():
    """The reference model's tokenizer adds no BOS, so that auto leaves its windows as they were."""
    gate = load_gate(data_dir("eval") / "baselines.yaml")
    assert gate.model is not None
    assert protocol_of(gate, gate.model).name == "strided-256"
    assert {entry.protocol for entry in gate.entries} == {"strided-256"}


@pytest.mark.shared
def test_nor_does_the_yardstick_add_bos(shared_dir: Path):
    tokenizer = load_tokenizer(shared_dir / "models" / "yardstick")
    assert Protocol("strided", 512).with_bos(tokenizer, "auto").name == "strided-512"


NO_FIGURES = "fireq: {perplexity: {recovery: 0.9}, bits_per_weight: {value: 4.125, tolerance: 0}}"
NAMED = "fireq:\n  protocol: {}\n  kld_mean: {{value: 0.02, tolerance: 30%}}"


@pytest.mark.parametrize(
    ("entry", "settings", "says"),
    [
        (GOOD, "", r":4: recipes\.fireq: .* as strided-512 \(the entry names no protocol, so they"),
        (GOOD, "bos: always", r":4: recipes\.fireq: .*no protocol.*measures strided-512-bos"),
        (NAMED.format("strided-512"), "", r":5: recipes\.fireq\.protocol: .* as strided-512, this"),
        (NAMED.format("strided-512-bos"), "", None),
        (NAMED.format("strided-512-bos"), "bos: never", "as strided-512-bos, this .*strided-512;"),
        (NAMED.format("strided-512"), "bos: never", None),
        (GOOD, "bos: never", None),
        (NAMED.format("strided-256-bos"), "", "as strided-256-bos, this .*strided-512-bos;"),
        (GOOD, "protocol: rolling", None),
        (NO_FIGURES, "", None),
    ],
)
def test_figures_of_other_protocols_are_not_compared(
    stubbed: Callable[..., list[Any]],
    tiny: Maker,
    tmp_path: Path,
    entry: str,
    settings: str,
    says: str | None,
):
    asked = stubbed()
    model = with_added_bos(tiny("llama"), tmp_path / "adding")
    path = write_gate(tmp_path / "gate.yaml", model, entry, f"evaluation: {{{settings}}}")
    if says is None:
        assert run_gate(path).ok
        return
    with pytest.raises(RecipeError, match=says) as err:
        run_gate(path)
    assert err.value.exit_code == 3
    assert "\n" not in str(err.value)
    assert not asked  # refused before anything is converted


def test_one_line_tells_of_all_entries(
    stubbed: Callable[..., list[Any]], tiny: Maker, tmp_path: Path
):
    stubbed()
    model = with_added_bos(tiny("llama"), tmp_path / "adding")
    entries = "\n".join(f"{n}: {{kld_mean: {{value: 1, tolerance: 1}}}}" for n in ("rtn", "gptq"))
    path = write_gate(
        tmp_path / "gate.yaml", model, f"{entries}\nawq: {{perplexity: {{recovery: 0.1}}}}"
    )
    with pytest.raises(RecipeError, match=r"recipes\.rtn: .*, as in 1 more; .*--update-baselines"):
        run_gate(path)
    assert run_gate(path, only=["awq"]).ok


def test_old_figures_are_renewed_under_the_new_protocol(
    stubbed: Callable[..., list[Any]], tiny: Maker, tmp_path: Path
):
    stubbed(kld_mean=0.02, protocol="strided-512-bos")
    model = with_added_bos(tiny("llama"), tmp_path / "adding")
    path = write_gate(tmp_path / "gate.yaml", model, GOOD)
    result = run_gate(path, renew=True)
    assert result.protocol == "strided-512-bos"
    assert [(v.metric, v.status, v.detail) for v in result.verdicts] == [
        ("kld_mean", "FAIL", "the baseline is of strided-512"),
        ("perplexity", "pass", result.verdicts[1].detail),
    ]
    assert update_baselines(path, result, "the tokenizer adds BOS") == [
        "fireq.protocol strided-512-bos"
    ]
    assert run_gate(path).ok


def test_the_choice_reaches_the_measurements(
    stubbed: Callable[..., list[Any]],
    gate_file: Callable[..., Path],
):
    asked = stubbed()
    entry = NAMED.format("strided-512-bos")
    run_gate(gate_file(entry, "evaluation: {bos: always}", "calibration: {bos: never}"))
    assert asked[0].recipe.calibration.bos == "never"
    assert asked[1][2]["bos"] == "always"


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ("bos: sometimes", "evaluation.bos: must be auto or always or never"),
        ("protocol: rolling, bos: always", "evaluation.bos: always belongs to the strided"),
        (
            "seqlen: 32, context: 31, bos: always",
            r"evaluation: context 31 must .* seqlen - 1 \(31\)",
        ),
    ],
)
def test_settings_about_bos_that_do_not_fit(
    stubbed: Callable[..., list[Any]], gate_file: Callable[..., Path], evaluation: str, says: str
):
    asked = stubbed()
    with pytest.raises(RecipeError, match=f"gate.yaml:2: {says}"):
        run_gate(gate_file(GOOD, f"evaluation: {{{evaluation}}}"))
    assert not asked
