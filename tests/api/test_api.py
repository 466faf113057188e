"""`quantize.convert`, `evaluate`, `load` and `compare`: the commands as functions."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

import quantize
from quantize.api.html import table
from quantize.cli import app
from quantize.errors import ModelError, PqError, RecipeError, UsageError

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]
SMALL = {"nsamples": 6, "seqlen": 32, "device": "cpu"}
CALLED = {"convert": "convert", "evaluate": "eval", "compare": "compare"}
"""Function → its command."""
OF_THE_SCREEN = {"json", "help", "format"}
OF_THE_GATE = {"gate", "update_baselines", "reason", "only", "junit", "summary_file", "no_cache"}
"""`pq eval --gate` is another errand than `quantize.evaluate`."""
OF_PYTHON = {"progress", "say", "stop"}
"""Functions that the caller is told by."""


def options(command: str) -> dict[str, Any]:
    """Name of every argument and option as Python writes it → its default."""
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    out = {}
    for parameter in found.params:
        longest = max(parameter.opts, key=len)
        out[longest.removeprefix("--").replace("-", "_")] = parameter.default
    return out


@pytest.mark.parametrize("function", CALLED)
def test_a_function_takes_what_its_command_takes(function: str):
    command = options(CALLED[function])
    python = inspect.signature(getattr(quantize, function)).parameters
    assert {*command} - OF_THE_SCREEN - OF_THE_GATE == {*python} - OF_PYTHON
    for name in {*command} & {*python}:
        empty = (inspect.Parameter.empty, None, "", ())
        theirs, ours = command[name], python[name].default
        assert theirs == ours or (theirs in empty and ours in empty), name


def test_the_package_alone_loads_no_library():
    code = (
        "import sys, quantize; from quantize import assisted; dir(quantize); "
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_names_that_the_package_lacks():
    with pytest.raises(AttributeError, match="quantise"):
        quantize.quantise  # noqa: B018
    assert set(quantize.__all__) <= set(dir(quantize))


def test_a_conversion_is_that_of_the_command(
    pq: Call, tiny: Maker, text_file: Path, tmp_path: Path
):
    told: list[tuple[str, int, int]] = []
    found = quantize.convert(
        tiny("llama"),
        "gptq",
        tmp_path / "python",
        dataset=str(text_file),
        set={"bits": 3},
        progress=lambda *step: told.append(step),
        **SMALL,
    )
    args = ("--dataset", text_file, "--nsamples", 6, "--seqlen", 32, "--device", "cpu")
    command = ("convert", "-m", tiny("llama"), "-r", "gptq", "-o", tmp_path / "command")
    code, out, err = pq(*command, *args, "--set", "bits=3", "--json")
    assert code == 0, err
    ours, theirs = dataclasses.asdict(found), json.loads(out)
    assert set(ours) | {"next"} == set(theirs)  # commands are for those who type
    for name in ("bits_per_weight", "quantized_linears", "mean_output_error", "loads_in"):
        assert ours[name] == theirs[name]
    names = {path.name for path in (tmp_path / "command").iterdir()}
    assert {path.name for path in (tmp_path / "python").iterdir()} == names
    for name in names:
        both = [(tmp_path / folder / name).read_bytes() for folder in ("python", "command")]
        assert both[0] == both[1], name
    assert not (tmp_path / "python.work").exists()
    assert ("quantizing", 1, 2) in told
    assert found.report() == tmp_path / "python.report.html"
    shown = found._repr_html_()
    assert "3.125" in shown
    assert str(tmp_path / "python") in shown
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.recipe = "other"  # type: ignore[misc]


def test_an_evaluation_is_that_of_the_command(
    pq: Call, converted: Maker, tiny: Maker, text_file: Path, tmp_path: Path
):
    model, parent = converted("rtn", "llama", "bits=3"), tiny("llama")
    how = {"dataset": str(text_file), "seqlen": 24, "max_windows": 2}
    found = quantize.evaluate(str(model), parent, output_path=tmp_path / "a", device="cpu", **how)
    args = ("--baseline", parent, "--dataset", text_file, "--seqlen", 24, "--max-windows", 2)
    _, out, err = pq("eval", model, *args, "--output-path", tmp_path / "b", "--json")
    assert json.loads(json.dumps(dataclasses.asdict(found.figures))) == json.loads(out), err
    assert found.kld_mean == found.figures.kld_mean > 0
    assert found.saved_in == tmp_path / "a"
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        p.name for p in (tmp_path / "b").iterdir()
    }
    assert f"{found.kld_mean:.5f}" in found._repr_html_()
    assert found.tasks is None


def test_a_model_is_loaded_as_it_is_served(converted: Maker, tiny: Maker):
    packed = converted("fireq-paper-linear", "llama")
    loaded = quantize.load(packed, device="cpu")
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer("The quick brown fox")["input_ids"]])
    stock = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
    assert loaded.memory_bytes > 0
    assert type(model).__name__ in loaded._repr_html_()
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": "no/such/folder"}, ModelError, "no such folder"),
        ({"recipe": "no-such"}, RecipeError, "no-such"),
        ({"device": "cuda:99"}, UsageError, "--device"),
        ({"dtype": "int7"}, UsageError, "--dtype"),
        ({"resume": "maybe"}, UsageError, "--resume"),
        ({"max_ram": "much"}, UsageError, "--max-ram"),
        ({"set": {"bits": 99}}, UsageError, "bits"),
        ({"nsamples": 0}, UsageError, "nsamples"),
    ],
)
def test_errors_are_the_packages_own(
    tiny: Maker, tmp_path: Path, arguments: dict[str, Any], error: type[PqError], says: str
):
    how = {"model": tiny("llama"), "recipe": "rtn", "output": tmp_path / "out", "device": "cpu"}
    with pytest.raises(error, match=says):
        quantize.convert(**(how | arguments))
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_of_the_others(tiny: Maker):
    with pytest.raises(UsageError, match="--seqlen 1"):
        quantize.evaluate(tiny("llama"), seqlen=1)
    with pytest.raises(UsageError, match="--bos"):
        quantize.evaluate(tiny("llama"), bos="perhaps")
    with pytest.raises(ModelError, match="no such folder"):
        quantize.load("/no/such")


def test_a_launch_of_several_processes_is_left_to_the_commands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        quantize.convert("model", "rtn", "out")
    with pytest.raises(UsageError, match="one process"):
        quantize.evaluate("model")


def test_what_is_shown_in_a_notebook_is_escaped():
    shown = table("<script>", [["a & b", "\udcff", "<b>"]])
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "a &amp; b" in shown
    shown.encode("utf-8")
