"""The script that makes the table of a real model: rows that are there are not measured again; the page takes them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import request_for
from safetensors.torch import load_file
from torch import Tensor

from quantize.conversion.loop import convert
from quantize.methods.ladimo.budget import neurons_for
from quantize.methods.ladimo.split import Layout

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EVAL))
    return importlib.import_module("gemma")


def row_of(script: ModuleType, index: int, kld: float) -> dict[str, Any]:
    figures = {
        "perplexity": 30.0,
        "baseline_perplexity": 26.0,
        "kld_mean": kld,
        "kld_stderr": 0.01,
        "kld_p99": 1.5,
        "top1_agreement": 0.8,
    }
    row = script.ROWS[index]
    return {
        "model": "gemma",
        "row": row.name,
        "recipe": row.recipe,
        "bits_per_weight": 4.125 if row.recipe else None,
        "seconds": 1.0,
        "cpu_seconds": 2.0,
        "peak_rss_mb": 2048,
        "figures": {"one.txt": figures, "two.txt": figures | {"kld_mean": kld / 2}},
    }


def test_missing_rows_alone_are_measured(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    output, asked = tmp_path / "gemma.json", []

    def measured(index: int, arguments: list[str]) -> dict[str, Any]:
        asked.append(index)
        return row_of(script, index, 0.1 * len(asked))

    monkeypatch.setattr(script, "_measured_apart", measured)
    monkeypatch.setattr(script.measuring, "head", lambda args: {"protocol": "p", "rows": []})

    def run(*more: str) -> str:
        told = ["gemma.py", "--model", "M", "--second", "two.txt", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [*told, *more])
        script.main()
        return str(capsys.readouterr().out)

    run("--only", "^GPTQ, W4A16$")
    run("--only", "^GPTQ, W4A16$|without scales")
    names = [row.name for row in script.ROWS]
    first, cache = names.index("GPTQ, W4A16"), names.index("INT4 cache without scales")
    assert asked == [first, cache]
    run("--only", "^GPTQ, W4A16$", "--again")
    assert asked == [first, cache, first]
    assert "there   GPTQ, W4A16\n" in run("--list")
    run("--seconds", "0.000001", "--only", "^AWQ")
    assert len(asked) == 3
    rows = json.loads(output.read_text())["rows"]
    assert sorted(row["row"] for row in rows) == sorted({names[first], names[cache]})
    assert next(r for r in rows if r["row"] == names[first])["figures"]["one.txt"][
        "kld_mean"
    ] == pytest.approx(0.3)


def test_the_page_takes_the_rows_in_their_order(script: ModuleType):
    found = {"rows": [row_of(script, 7, 0.5), row_of(script, 1, 0.25)]}
    lines = script.table(found).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].startswith(f"| {script.ROWS[1].name} | 4.125 | 0.2500 |")
    assert lines[3].startswith(f"| {script.ROWS[7].name} | 16 | 0.5000 |")
    render = importlib.import_module("render")
    assert render._table(found)[1] == "A real model: Gemma 3 270M"


def test_every_row_is_a_recipe_with_its_changes(script: ModuleType):
    for row in script.ROWS:
        if row.recipe is None:
            assert row.cache
            continue
        args = type("Args", (), {"calibration": "builtin", "nsamples": 4, "seqlen": 64})
        recipe = script.recipe_of(row, args)
        assert recipe.calibration.nsamples == (row.nsamples or 4)
        assert recipe.calibration.bos == ("auto" if row.bos else "never")
        assert all(
            str(getattr(stage, change.partition("=")[0].rpartition(".")[2], None)).lower()
            == change.partition("=")[2].lower()
            for change in row.changes
            for stage in recipe.stages
            if stage.method == change.partition(".")[0]
        )
    assert len({row.name for row in script.ROWS}) == len(script.ROWS)


@pytest.mark.filterwarnings(
    "ignore:Pydantic serializer"
)  # the baseline is no stage that recipes know
def test_what_is_pruned_where_ffns_know_no_bias(
    script: ModuleType, tiny: Callable[..., Path], text_file: Path, tmp_path: Path
):
    """A Gemma stays one, without the neurons that no token would meet."""
    model = tiny("gemma3_text", sliding_window=8)
    sizes = ("shared=128", "experts=2", "mean_experts=0", "activated_reduction=0.01", "steps=2")
    asked = request_for(model, "ladimo", tmp_path / "out", text_file, *sizes)
    convert(dataclasses.replace(asked, recipe=script.ladimo.pruned(asked.recipe)))
    config = json.loads((model / "config.json").read_text())
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "gemma3_text"
    tensors: dict[str, Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(shard)
    assert not any("bias" in name for name in tensors)
    kept = [
        int(tensor.any(dim=0).sum())
        for name, tensor in tensors.items()
        if name.endswith("down_proj.weight")
    ]
    layout = Layout(2, (config["intermediate_size"] - 128) // 2, 128)
    # As many as the shared expert has, and what the router would cost.
    left = neurons_for(config["hidden_size"], layout, 0)
    assert 128 <= left < config["intermediate_size"]
    assert kept == [left] * config["num_hidden_layers"]
